"""Videos to look at: panels side by side, and pixels as frames. How a gaze is painted, `gaze_pictures_autogaze` says."""

from collections.abc import Sequence

import numpy as np
import torch

from .gaze_pictures_autogaze import contact_sheet, paint_gaze


__all__ = ["contact_sheet", "paint_gaze", "side_by_side", "to_frames"]


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
