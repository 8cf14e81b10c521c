"""
A small convolutional network that predicts an encoder's features at every place of a frame, and its configuration.

`feature_gaze_autogaze` chooses patches by these features.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_autogaze import GazeSelectorConfig, have_equal_content
from .grid_autogaze import GazeGrid
from .token_budgets_autogaze import check_clip_ratio, read_number


STRIDE = 16
"""Stride of the network: height and width in pixels of a place."""
_STEM = 4  # stride of the first stage
_KERNEL = 7
_PART = 1024  # places that an MLP computes at once on a CPU
_STRIP_PLACES = 2**14  # places that the early stages compute at once; larger frames are computed in strips


class FeatureGazeConfig(GazeSelectorConfig):
    """
    Configuration of a [`FeatureGazeModel`].

    Args:
        scales (`Sequence[int | tuple[int, int]]`, *optional*, defaults to `[224]`):
            Sizes in pixels at which patches are chosen, coarse to fine; each must be the last one times a scale factor.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels, at every scale.
        scale_factors (`Sequence[float]`, *optional*, defaults to `[1]`):
            Scales that the network predicts, relative to the finest, coarse to fine; the last is 1.
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `[48, 96, 192]`):
            Channels of the three stages, at a quarter, an eighth and a sixteenth of the frame's size.
        depths (`Sequence[int]`, *optional*, defaults to `[1, 2, 6]`): number of blocks of the stages.
        feature_size (`int`, *optional*, defaults to 96): size of the feature vector of a place.
        feature_variance (`float`, *optional*, defaults to 1.0):
            Mean squared length of the target vectors of the finest scale, whose mean is 0.
        loss_knots (`Sequence[tuple[float, float]]`, *optional*, defaults to `[(0, 0), (1, 1)]`):
            Pairs of predicted and measured loss, both ascending; losses are interpolated linearly between them.
        clip_ratio (`float`, *optional*, defaults to 0.25):
            Share of a dense encoder's tokens to keep in a clip if `generate` is given neither a budget nor a threshold;
            with `None`, the next two apply.
        gazing_ratio (`float`, *optional*, defaults to 1.0): maximum share of patches to keep of a frame in that case.
        task_loss_requirement (`float`, *optional*, defaults to 0.1): share of the variance that a frame may lose then.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new weights.
        kwargs: further arguments of [`GazeSelectorConfig`], such as `image_mean` and `image_std`.

    Raises:
        ValueError: if a number is out of range, or a scale is not among `scale_factors`.

    Example:

    ```python
    >>> from transformers_autogaze import FeatureGazeConfig

    >>> FeatureGazeConfig(scales=[112, 224], scale_factors=[0.25, 0.5, 1]).grid.grids
    ((7, 7), (14, 14))

    ```
    """

    model_type = "autogaze_features"
    __eq__ = have_equal_content

    def __init__(
        self,
        scales: Sequence[int | tuple[int, int]] = (224,),
        patch_size: int = 16,
        scale_factors: Sequence[float] = (1.0,),
        hidden_sizes: Sequence[int] = (48, 96, 192),
        depths: Sequence[int] = (1, 2, 6),
        feature_size: int = 96,
        feature_variance: float = 1.0,
        loss_knots: Sequence[Sequence[float]] = ((0.0, 0.0), (1.0, 1.0)),
        clip_ratio: float | None = 0.25,
        gazing_ratio: float = 1.0,
        task_loss_requirement: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        for name, sizes in {"hidden_sizes": hidden_sizes, "depths": depths}.items():
            if len(sizes) != 3 or any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ValueError(f"`{name}` must be three positive whole numbers, one per stage, got {list(sizes)}")
        if not isinstance(feature_size, int) or feature_size < 1:
            raise ValueError(f"`feature_size` must be a positive whole number, got {feature_size!r}")
        factors = [float(factor) for factor in scale_factors]
        if not factors or factors[0] <= 0 or factors[-1] != 1 or factors != sorted(set(factors)):
            raise ValueError(f"`scale_factors` must ascend from above 0 to 1, got {list(scale_factors)}")
        if not read_number("feature_variance", feature_variance) > 0:
            raise ValueError(f"`feature_variance` must be a number above 0, got {feature_variance}")
        for name, share in {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
        }.items():
            if not 0 <= read_number(name, share) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {share}")
        check_clip_ratio(clip_ratio)
        self.scale_factors = factors
        self.hidden_sizes, self.depths = list(hidden_sizes), list(depths)
        self.feature_size = feature_size
        self.feature_variance = feature_variance
        self.loss_knots = _checked_knots(loss_knots)
        self.clip_ratio = clip_ratio
        self.gazing_ratio = gazing_ratio
        self.task_loss_requirement = task_loss_requirement
        self.initializer_range = initializer_range
        super().__init__(scales, patch_size, **kwargs)
        self.known_scales(self.grid)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that frames are resized to."""
        return self.grid.sizes[-1]

    def known_scales(self, grid: GazeGrid) -> list[int]:
        """
        Finds the scales of a grid among `scale_factors`.

        Args:
            grid ([`GazeGrid`]): any grid.

        Returns:
            `list[int]`: index in `scale_factors` of each scale of the grid.

        Raises:
            ValueError: if a scale is not among them.
        """
        indices = []
        for size in grid.sizes:
            shares = [part / whole for part, whole in zip(size, grid.sizes[-1], strict=True)]
            found = [
                index
                for index, factor in enumerate(self.scale_factors)
                if all(math.isclose(share, factor, rel_tol=1e-3) for share in shares)
            ]
            if not found:
                raise ValueError(
                    f"`scales` must be {[round(factor, 4) for factor in self.scale_factors]} of the finest, or some of them, which "
                    f"are the `scale_factors` that this network was made for, got a scale of {size} pixels with a finest one of "
                    f"{grid.sizes[-1]}"
                )
            indices.append(found[0])
        return indices


def _checked_knots(knots: Sequence[Sequence[float]]) -> list[list[float]]:
    """Checks pairs of predicted and measured loss."""
    pairs = [[float(value) for value in knot] for knot in knots]
    are_pairs = len(pairs) > 1 and all(len(pair) == 2 and min(pair) >= 0 for pair in pairs)
    if not are_pairs or not all(low[0] < high[0] and low[1] < high[1] for low, high in pairwise(pairs)):
        raise ValueError(
            "`loss_knots` must be two or more pairs of predicted and measured loss, at least 0 and ascending, got "
            f"{[list(knot) for knot in knots]}"
        )
    return pairs


def _is_plain(linear: nn.Module) -> bool:
    """Returns whether a layer's weight can be used directly; adapted, quantised or offloaded layers must be called."""
    return type(linear) is nn.Linear and not linear.weight.is_meta


class FeatureGazeDepthwise(nn.Conv2d):
    """A depthwise convolution; under autocast on a CPU it stays in float32, which trains three times faster."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(hidden)
        with torch.autocast("cpu", enabled=False):
            return super().forward(hidden.float())


class FeatureGazeBlock(nn.Module):
    """
    A residual block of a depthwise convolution and an MLP, as in ConvNeXt.

    The MLP has no biases, as the layers before and after it have some.
    """

    def __init__(self, size: int):
        super().__init__()
        self.depthwise = FeatureGazeDepthwise(size, size, _KERNEL, padding=_KERNEL // 2, groups=size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.up = nn.Linear(size, 4 * size, bias=False)
        self.down = nn.Linear(4 * size, size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(frames, channels, rows, columns)` to the same shape, channels last in memory."""
        update = self.norm(self.depthwise(hidden).permute(0, 2, 3, 1))
        if not (_is_plain(self.up) and _is_plain(self.down)):
            places = update.flatten(0, 2)  # two dimensions, which all kinds of adapted layers support
            return hidden + self.down(F.gelu(self.up(places))).view_as(update).permute(0, 3, 1, 2)
        if torch.is_grad_enabled() or hidden.is_cuda or torch.is_autocast_enabled("cpu"):
            return hidden + self.down(F.gelu(self.up(update))).permute(0, 3, 1, 2)
        # Computed in parts that fit into the CPU's cache, in reused memory: allocating takes longer than the arithmetic.
        total = hidden.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        count = -(-total[..., 0].numel() // _PART)
        parts = [tensor.view(-1, tensor.shape[-1]).chunk(count) for tensor in (total, update.contiguous())]
        inner = total.new_empty(len(parts[0][0]), self.up.out_features)
        for sums, part in zip(*parts, strict=True):
            activations = torch.mm(part, self.up.weight.t(), out=inner[: len(part)])
            sums.addmm_(torch.ops.aten.gelu_(activations), self.down.weight.t())
        return total.permute(0, 3, 1, 2)


class FeatureGazeNorm(nn.LayerNorm):
    """A layer norm over the channels of `(frames, channels, rows, columns)`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeatureGazeContext(nn.Module):
    """Adds a projection of the mean over the frame to every place."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.project = nn.Linear(size, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(frames, channels, rows, columns)` to the same shape."""
        return hidden + self.project(self.norm(hidden.mean((2, 3))))[:, :, None, None]


class FeatureGazeNetwork(PreTrainedModel):
    """
    Predicts an encoder's features at every place of a frame, as seen at every scale.

    It has stages of ConvNeXt blocks at a quarter, an eighth and a sixteenth of the frame's size. In the middle of the last one,
    the mean over the frame is added to every place. It is fully convolutional, so frames may have any size.

    Args:
        config ([`FeatureGazeConfig`]): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import FeatureGazeConfig
    >>> from transformers_autogaze.feature_network_autogaze import FeatureGazeNetwork

    >>> network = FeatureGazeNetwork(FeatureGazeConfig(scale_factors=[0.5, 1], feature_size=8)).eval()
    >>> network(torch.zeros(2, 3, 64, 96)).shape
    torch.Size([2, 2, 8, 4, 6])

    ```
    """

    config: FeatureGazeConfig
    config_class = FeatureGazeConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: FeatureGazeConfig):
        super().__init__(config)
        first, second, last = config.hidden_sizes
        self.stem = nn.Sequential(nn.Conv2d(3, first, _STEM, _STEM), FeatureGazeNorm(first, eps=1e-6))
        self.early = nn.Sequential(
            *(FeatureGazeBlock(first) for _ in range(config.depths[0])),
            FeatureGazeNorm(first, eps=1e-6),
            nn.Conv2d(first, second, 2, 2),
            *(FeatureGazeBlock(second) for _ in range(config.depths[1])),
            FeatureGazeNorm(second, eps=1e-6),
            nn.Conv2d(second, last, 2, 2),
        )
        blocks: list[nn.Module] = [FeatureGazeBlock(last) for _ in range(config.depths[2])]
        blocks.insert(len(blocks) // 2, FeatureGazeContext(last))
        self.late = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(last, eps=1e-6)
        self.head = nn.Linear(last, len(config.scale_factors) * config.feature_size)
        # Rows of places by which strips overlap: the receptive field of the early stages.
        reach = (_KERNEL // 2) * (_STEM * config.depths[0] + 2 * _STEM * config.depths[1])
        self.overlap = -(-reach // STRIDE)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @staticmethod
    def normalize(pixels: torch.Tensor) -> torch.Tensor:
        """Normalises pixels in 0..1, `(.., 3, height, width)`, by ImageNet's mean and standard deviation."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        factor, offset = ((part[:, None, None]).to(pixels) for part in (1 / std, -mean / std))
        return torch.addcmul(offset, pixels, factor)

    def forward(self, pixel_values: torch.Tensor, scales: Sequence[int] | None = None) -> torch.Tensor:
        """
        Predicts the features of frames.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(frames, 3, 16 * rows, 16 * columns)`):
                Frames normalised by `normalize`.
            scales (`Sequence[int]`, *optional*): indices in `config.scale_factors` of the scales to return; all by default.

        Returns:
            `torch.FloatTensor` of shape `(frames, scales, feature_size, rows, columns)`: a vector for every place of the
            finest scale and each of the scales.

        Raises:
            ValueError: if the height or width is not a multiple of 16.
        """
        rows, cols = (side // STRIDE for side in pixel_values.shape[-2:])
        if (
            pixel_values.ndim != 4
            or tuple(pixel_values.shape[1:]) != (3, rows * STRIDE, cols * STRIDE)
            or not rows * cols
        ):
            raise ValueError(
                f"`pixel_values` must be of shape (frames, 3, {STRIDE} * rows, {STRIDE} * columns), got "
                f"{tuple(pixel_values.shape)}"
            )
        pixel_values = pixel_values.to(memory_format=torch.channels_last)
        hidden = self.late(self._look_early(pixel_values, rows, cols))
        hidden = self.norm(hidden.permute(0, 2, 3, 1))
        size = self.config.feature_size
        if not _is_plain(self.head):
            vectors = self.head(hidden.flatten(0, 2)).view(*hidden.shape[:3], -1, size)
            vectors = vectors if scales is None else vectors[..., list(scales), :]
            return vectors.permute(0, 3, 4, 1, 2)
        weight, bias = (part.unflatten(0, (-1, size)) for part in (self.head.weight, self.head.bias))
        if scales is not None:
            weight, bias = weight[list(scales)], bias[list(scales)]
        vectors = F.linear(hidden, weight.flatten(0, 1), bias.flatten())
        return vectors.unflatten(-1, (len(weight), -1)).permute(0, 3, 4, 1, 2)

    def _look_early(self, pixel_values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Computes the early stages, of large frames in strips, as these stages need much memory."""
        height = max(1, _STRIP_PLACES // cols)
        if rows <= height or torch.is_grad_enabled():
            return self.early(self.stem(pixel_values))
        strips = []
        for top in range(0, rows, height):
            start, stop = max(0, top - self.overlap), min(rows, top + height + self.overlap)
            strip = self.early(self.stem(pixel_values[:, :, start * STRIDE : stop * STRIDE]))
            strips.append(strip[:, :, top - start : min(rows, top + height) - start])
        return torch.cat(strips, dim=2).to(memory_format=torch.channels_last)
