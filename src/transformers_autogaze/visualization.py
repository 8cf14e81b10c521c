"""Pictures of a video and what was kept of it: panels side by side, and pixels as frames."""

from collections.abc import Sequence

import numpy as np
import torch

from .gaze_pictures_autogaze import contact_sheet, paint_gaze
from .gazing_autogaze import GazeOutput
from .video_gazing import GazeChunk
from .video_processing_autogaze import AutoGazeVideoProcessor


__all__ = ["PANELS", "contact_sheet", "draw_panels", "paint_gaze", "side_by_side", "to_frames"]

PANELS = ("original", "kept patches", "reconstruction from the kept patches")
"""What [`draw_panels`] draws."""
_SIDE = 448  # pixels on the shorter side of a panel at most


def draw_panels(
    chunk: GazeChunk, frame: int, rebuilt: torch.Tensor, processor: AutoGazeVideoProcessor
) -> list[np.ndarray]:
    """
    Draws one frame of a chunk.

    Args:
        chunk ([`GazeChunk`]): the chunk.
        frame (`int`): which of its frames, counted from its first.
        rebuilt (`torch.FloatTensor` of shape `(3, height, width)`): the same frame rebuilt from kept patches, pixels in 0..1.
        processor ([`AutoGazeVideoProcessor`]): how to resize.

    Returns:
        `list[np.ndarray]`, three times shape `(height, width, 3)` and type uint8: see [`PANELS`]; small enough to show.
    """
    height, width = chunk.frames.shape[1:3]
    shrink = min(1.0, _SIDE / min(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    levels = torch.from_numpy(chunk.frames[frame : frame + 1]).permute(0, 3, 1, 2)
    shown = processor.resize_levels(levels, size).permute(0, 2, 3, 1).contiguous().numpy()
    # The grid may reach beyond the frame.
    bottom, right = (
        max(0, round(small * whole / part) - small)
        for small, whole, part in zip(size, chunk.extent, (height, width), strict=True)
    )
    place = frame // chunk.gaze.frame_sampling_rate
    gaze = GazeOutput.from_masks([mask[:, place : place + 1] for mask in chunk.gaze.gazing_mask], chunk.gaze.grid)
    painted = paint_gaze(np.pad(shown, ((0, 0), (0, bottom), (0, right), (0, 0))), gaze)
    return [shown[0], painted[0, : size[0], : size[1]], to_frames(rebuilt[None], size)[0]]


def side_by_side(panels: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """
    Puts frames or videos of equal height next to each other, with white gaps.

    Args:
        panels (`Sequence[np.ndarray]` of shape `(.., height, width, 3)`, uint8): the frames or videos, left to right.
        gap (`int`, *optional*, defaults to 4): width of the gaps in pixels.

    Returns:
        `np.ndarray` of shape `(.., height, total width, 3)`, uint8.
    """
    white = np.full((*panels[0].shape[:-2], gap, 3), 255, np.uint8)
    parts = [panels[0]]
    for panel in panels[1:]:
        parts += [white, panel]
    return np.concatenate(parts, axis=-2)


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
