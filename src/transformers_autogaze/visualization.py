"""
Pictures of a gaze: kept patches coloured by scale, panels side by side, contact sheets.

This module owns colours and layout; it takes frames and a [`GazeOutput`] and knows nothing of files or selectors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .gazing_autogaze import GazeOutput


# Coarse to fine; told apart with any kind of colour vision (Okabe and Ito, 2008).
SCALE_COLOURS = ((0, 114, 178), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (86, 180, 233))
_TINT = 90  # of 256
_DIM = 4


def paint_gaze(frames: np.ndarray, gaze: GazeOutput, clip: int = 0) -> np.ndarray:
    """
    Paints the kept patches of one clip: tinted and outlined in the colour of their scale, everything else dimmed.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): the frames, of any size.
        gaze ([`GazeOutput`]): a gaze for these frames.
        clip (`int`, *optional*, defaults to 0): which clip of the gaze's batch.

    Returns:
        `np.ndarray` of shape `(frames, height, width, 3)`, uint8.

    Raises:
        ValueError: if frames and gaze differ in length.

    Example:

    ```python
    >>> import numpy as np
    >>> import torch
    >>> from transformers_autogaze import GazeGrid, GazeOutput, paint_gaze

    >>> gaze = GazeOutput.from_masks([torch.tensor([[[True, False, False, False]]])], GazeGrid([32], 16))
    >>> painted = paint_gaze(np.full((1, 32, 32, 3), 200, np.uint8), gaze)
    >>> painted[0, 8, 8].tolist(), painted[0, 24, 24].tolist()
    ([130, 170, 192], [50, 50, 50])

    ```
    """
    frames = np.asarray(frames)
    if len(frames) != gaze.num_frames * gaze.frame_sampling_rate:
        raise ValueError(
            f"`frames` must be {gaze.num_frames * gaze.frame_sampling_rate} as the gaze's, got {len(frames)}"
        )
    gaze = gaze.select(clip)
    patch = gaze.finest_patches(*frames.shape[1:3])[0].repeat_interleave(gaze.frame_sampling_rate, 0).cpu().numpy()
    is_edge = np.zeros(patch.shape, bool)
    is_edge[:, 1:] |= patch[:, 1:] != patch[:, :-1]
    is_edge[:, :, 1:] |= patch[:, :, 1:] != patch[:, :, :-1]
    is_edge[:, 0] = is_edge[:, :, 0] = True

    # One row per patch, and a last one, which -1 picks, for pixels that no patch covers.
    counts = gaze.grid.num_patches_each_scale
    scale = np.repeat(np.arange(len(counts)) % len(SCALE_COLOURS), counts)
    colours = np.zeros((len(scale) + 1, 3), np.uint16)
    colours[:-1] = np.array(SCALE_COLOURS)[scale]
    is_kept = patch >= 0
    painted = (frames.astype(np.uint16) * (256 - _TINT) + (colours * _TINT)[patch] + 128) >> 8
    painted = painted.astype(np.uint8)
    painted[~is_kept] = frames[~is_kept] // _DIM
    outlined = is_edge & is_kept
    painted[outlined] = colours[patch[outlined]]
    return painted


def side_by_side(panels: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """
    Puts videos of equal size next to each other, with white gaps.

    Args:
        panels (`Sequence[np.ndarray]` of shape `(frames, height, width, 3)`, uint8): the videos, left to right.
        gap (`int`, *optional*, defaults to 4): width of the gaps in pixels.

    Returns:
        `np.ndarray` of shape `(frames, height, total width, 3)`, uint8.
    """
    white = np.full((*panels[0].shape[:2], gap, 3), 255, np.uint8)
    parts = [panels[0]]
    for panel in panels[1:]:
        parts += [white, panel]
    return np.concatenate(parts, axis=2)


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], scales: Sequence[object], max_width: int = 2400
) -> Image.Image:
    """
    Lays out strips of frames below each other, one strip with its name per row, and a legend of the scales' colours.

    Args:
        rows (`Sequence` of `(str, np.ndarray)`): name of each row and its frames `(frames, height, width, 3)`, uint8.
        scales (`Sequence`): the gaze's scales, for the legend.
        max_width (`int`, *optional*, defaults to 2400): frames are shrunk until the sheet is at most this wide, in pixels.

    Returns:
        `PIL.Image.Image`: the sheet, in RGB.
    """
    gap, count = 4, max(len(frames) for _, frames in rows)
    height, width = rows[0][1].shape[1:3]
    shrink = min(1.0, (max_width - gap * (count + 1)) / (count * width))
    cell = max(1, round(width * shrink)), max(1, round(height * shrink))
    font = ImageFont.load_default(size=18)
    title = 26
    sheet = Image.new(
        "RGB", (gap + count * (cell[0] + gap), title + len(rows) * (title + cell[1] + gap)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    x = gap
    for index, scale in enumerate(scales):
        label = f"scale {scale}"
        draw.rectangle([x, 5, x + 16, 21], fill=SCALE_COLOURS[index % len(SCALE_COLOURS)])
        draw.text((x + 22, 2), label, fill=(0, 0, 0), font=font)
        x += 36 + round(draw.textlength(label, font=font))
    y = title
    for name, frames in rows:
        draw.text((gap, y + 2), name, fill=(0, 0, 0), font=font)
        for index, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (gap + index * (cell[0] + gap), y + title))
        y += title + cell[1] + gap
    return sheet


def to_frames(pixels: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """
    Turns pixels into frames to look at.

    Args:
        pixels (`torch.FloatTensor` of shape `(frames, 3, height, width)`): values in 0..1.
        size (`tuple[int, int]`): height and width in pixels of the frames to make.

    Returns:
        `np.ndarray` of shape `(frames, *size, 3)`, uint8.
    """
    pixels = pixels.float()
    if tuple(pixels.shape[-2:]) != tuple(size):
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
