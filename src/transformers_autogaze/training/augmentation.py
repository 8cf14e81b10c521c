"""
Augmentation of clips: random crops, flips and colour changes, and camera motion over a still image.

All frames of a clip are augmented alike.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


# Weights of red, green and blue in the luma (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
# Largest changes of light: gamma as a logarithm; saturation, contrast and colours as factors; the others in pixel values.
_GAMMA, _SATURATION, _CONTRAST, _GAINS, _BRIGHTNESS, _NOISE = 0.6, 0.6, 0.4, 0.15, 0.15, 0.06


@dataclass
class ClipAugmentation:
    """
    Augments clips at random, all frames of a clip alike.

    The aspect ratio of a crop differs from that of the frame by a third at most, since models are applied to whole frames.
    For a share of the clips, a simulated camera pans and zooms over one of their frames.

    Args:
        min_crop (`float`, *optional*, defaults to 0.2):
            Smallest share of a frame's area that is kept, above 0 and up to 1; 1 keeps whole frames.
        flip (`float`, *optional*, defaults to 0.5):
            Share of clips that are flipped horizontally, 0..1.
        colour (`float`, *optional*, defaults to 0.3):
            Largest change of brightness, contrast and saturation, 0..1.
        still (`float`, *optional*, defaults to 0.15):
            Share of clips that are made of one frame by camera motion, 0..1.

    Raises:
        ValueError: if one of them is out of range.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.augmentation import ClipAugmentation

    >>> levels = torch.zeros(4, 3, 90, 160, dtype=torch.uint8)
    >>> ClipAugmentation()(levels, (64, 64), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 64, 64])

    ```
    """

    min_crop: float = field(default=0.2, metadata={"help": "Smallest share of a frame's area that a crop keeps."})
    flip: float = field(default=0.5, metadata={"help": "Share of clips that are flipped horizontally."})
    colour: float = field(default=0.3, metadata={"help": "Largest change of brightness, contrast and saturation."})
    still: float = field(
        default=0.15, metadata={"help": "Share of clips that are made of one frame by camera motion."}
    )

    def __post_init__(self):
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"`min_crop` must lie above 0 and not above 1, a share of the area, got {self.min_crop}")
        for name in ("flip", "colour", "still"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {getattr(self, name)}")

    def __call__(self, levels: torch.Tensor, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        """
        Augments one clip.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
            size (`tuple[int, int]`): height and width in pixels to resize to.
            generator (`torch.Generator`): source of random numbers.

        Returns:
            `torch.FloatTensor` of shape `(frames, 3, *size)`: pixels in 0..1.
        """
        if _uniform(generator) < self.still:
            chosen = int(_uniform(generator) * len(levels))
            frames = pan_and_zoom(levels[chosen], len(levels), size, generator, self.min_crop)
        else:
            frames = resize_pixels(self._crop(levels, generator), size)
        if _uniform(generator) < self.flip:
            frames = frames.flip(-1)
        return self._recolour(frames, generator).clamp_(0, 1)

    def _crop(self, levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        height, width = levels.shape[-2:]
        tall, wide = _draw_crop_shares(self.min_crop, generator)
        rows, cols = max(1, round(height * tall)), max(1, round(width * wide))
        top = int(_uniform(generator) * (height - rows + 1))
        left = int(_uniform(generator) * (width - cols + 1))
        return levels[..., top : top + rows, left : left + cols]

    def _recolour(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        brightness, contrast, saturation = (
            1 + self.colour * (2 * _uniform(generator) - 1) for _ in ("brightness", "contrast", "saturation")
        )
        grey = (frames * frames.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
        frames = torch.lerp(grey, frames, saturation)
        mean = grey.mean()
        return ((frames - mean) * contrast + mean) * brightness


def pan_and_zoom(
    image: torch.Tensor, num_frames: int, size: tuple[int, int], generator: torch.Generator, min_crop: float = 0.2
) -> torch.Tensor:
    """
    Makes a clip from one image by linear camera motion and constant zoom.

    Args:
        image (`torch.ByteTensor` of shape `(3, height, width)`): levels 0..255.
        num_frames (`int`): number of frames.
        size (`tuple[int, int]`): height and width in pixels of the clip.
        generator (`torch.Generator`): source of random numbers.
        min_crop (`float`, *optional*, defaults to 0.2): smallest share of the image's area that a frame shows.

    Returns:
        `torch.FloatTensor` of shape `(num_frames, 3, *size)`: pixels in 0..1.
    """
    first = torch.tensor(_draw_crop_shares(min_crop, generator))
    # The motion is limited to a thirtieth of the image, and the zoom to 3 %, from frame to frame.
    zoom = math.exp(0.03 * (2 * _uniform(generator) - 1) * max(num_frames - 1, 1))
    last = (first * zoom).clamp(math.sqrt(min_crop) / 2, 1)
    reach = [(1 - shares) * torch.tensor([2 * _uniform(generator) - 1 for _ in range(2)]) for shares in (first, last)]
    step = (reach[1] - reach[0]) / max(num_frames - 1, 1)
    speed = float(step.abs().max() * 30 / 2)
    if speed > 1:
        reach[1] = (reach[0] + (reach[1] - reach[0]) / speed).clamp(last - 1, 1 - last)
    progress = torch.linspace(0, 1, num_frames)[:, None]
    shares, centre = (torch.lerp(a, b, progress) for a, b in ((first, last), tuple(reach)))
    # The image is downscaled to about the scale of the clip first, since `grid_sample` does not antialias.
    mean = shares.mean(0)
    source_size = [
        min(side, max(1, round(target / share)))
        for side, target, share in zip(image.shape[-2:], size, mean.tolist(), strict=True)
    ]
    theta = torch.zeros(num_frames, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = shares[:, 1], shares[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = centre[:, 1], centre[:, 0]
    grid = F.affine_grid(theta, [num_frames, 3, *size], align_corners=False)
    source = resize_pixels(image[None], tuple(source_size)).expand(num_frames, -1, -1, -1)
    return F.grid_sample(source, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp_(0, 1)


def vary_light(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Changes gamma, brightness, contrast, saturation and colours of images at random, and adds noise.

    The strength is drawn for each image. In every other pair of images `2 i` and `2 i + 1`, both images change alike except
    for the noise.

    Args:
        pixels (`torch.FloatTensor` of shape `(images, 3, height, width)`): pixels in 0..1.
        generator (`torch.Generator`): source of random numbers, on the CPU.

    Returns:
        `torch.FloatTensor` of the same shape: pixels in 0..1.
    """
    draws = torch.rand(len(pixels), 9, generator=generator)
    first = 2 * torch.arange(0, len(pixels) // 2, 2)
    draws[first + 1] = draws[first]
    draws = draws.to(pixels.device)[..., None, None, None]
    strength = draws[:, 0]
    gamma, brightness, contrast, saturation = (2 * draws[:, number] - 1 for number in (1, 2, 3, 4))
    gains = torch.cat([2 * draws[:, number] - 1 for number in (5, 6, 7)], dim=1)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    pixels = pixels.clamp(min=1e-3) ** (strength * gamma * _GAMMA).exp()
    grey = (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    pixels = torch.lerp(grey, pixels, 1 + strength * saturation * _SATURATION)
    mean = grey.mean((2, 3), keepdim=True)
    pixels = (pixels - mean) * (1 + strength * contrast * _CONTRAST) + mean + strength * brightness * _BRIGHTNESS
    pixels = pixels * (1 + strength * gains * _GAINS)
    return pixels.add_(noise * (strength * draws[:, 8] * _NOISE)).clamp_(0, 1)


def resize_pixels(levels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resizes frames, antialiased.

    Args:
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
        size (`tuple[int, int]`): height and width in pixels.

    Returns:
        `torch.FloatTensor` of shape `(frames, 3, *size)`: pixels in 0..1.
    """
    # `interpolate` is several times faster on bytes than on floats.
    if tuple(levels.shape[-2:]) != tuple(size):
        levels = F.interpolate(levels, size, mode="bilinear", antialias=True)
    return levels.float().div_(255)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _draw_crop_shares(min_area: float, generator: torch.Generator) -> tuple[float, float]:
    """Draws the height and width of a crop, as shares of the frame's."""
    area = min_area + (1 - min_area) * _uniform(generator)
    aspect = math.exp(math.log(4 / 3) * (2 * _uniform(generator) - 1))
    return min(1.0, math.sqrt(area / aspect)), min(1.0, math.sqrt(area * aspect))
