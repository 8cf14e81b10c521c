"""Frames rebuilt from their kept patches, chunk by chunk, and the PSNR of these frames."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from ..composite_autogaze import CompositeReconstruction
from ..selection_autogaze import resize_frames
from ..video.streaming import GazeChunk
from ..video_processing_autogaze import AutoGazeVideoProcessor


_MAX_PIXELS = 2**22  # of frames that are processed together; at least one frame is


def chunk_pixels(chunk: GazeChunk, processor: AutoGazeVideoProcessor) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Yields the frames of a chunk as the selector received them, in the size of the finest scale, a few at a time.

    Args:
        chunk ([`GazeChunk`]): the chunk.
        processor ([`AutoGazeVideoProcessor`]): the processor that made its pixel values.

    Yields:
        `tuple` of a `slice` of the chunk's frames and these frames, a `torch.FloatTensor` of shape
        `(1, frames, 3, height, width)` in the size of the finest scale, pixels in 0..1.
    """
    height, width = chunk.gaze.grid.sizes[-1]
    bottom, right = (whole - part for whole, part in zip(chunk.extent, chunk.frames.shape[1:3], strict=True))
    step = max(1, _MAX_PIXELS // (height * width))
    for first in range(0, len(chunk.levels), step):
        part = slice(first, min(first + step, len(chunk.levels)))
        # The grid may reach beyond the frame.
        values = F.pad(processor.to_pixel_values(chunk.levels[part]), (0, right, 0, bottom))
        yield part, processor.to_pixels(resize_frames(values[None], (height, width))).clamp(0, 1)


class VideoRebuilder:
    """
    Rebuilds a video from its kept patches, chunk by chunk, and measures the errors.

    Args:
        processor ([`AutoGazeVideoProcessor`]): the processor that made the pixel values.
    """

    def __init__(self, processor: AutoGazeVideoProcessor):
        self.processor = processor
        self.squared_errors: list[float] = []
        """Mean squared errors of the frames so far, pixels in 0..1."""
        self._composite: CompositeReconstruction | None = None
        self._last: torch.Tensor | None = None

    @torch.no_grad()
    def rebuild(self, chunk: GazeChunk) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """
        Rebuilds the frames of the next chunk; see [`CompositeReconstruction`].

        Args:
            chunk ([`GazeChunk`]): the chunk.

        Yields:
            `tuple` of both values of [`chunk_pixels`] and the same frames rebuilt, a `torch.FloatTensor` of shape
            `(frames, 3, height, width)`, pixels in 0..1; where the grid reaches beyond the frame, cropped to the frame.
        """
        grid = chunk.gaze.grid
        self._composite = self._composite or CompositeReconstruction(grid)
        height, width = (
            round(side * part / whole)
            for side, part, whole in zip(grid.sizes[-1], chunk.frames.shape[1:3], chunk.extent, strict=True)
        )
        masks_of_frames = [
            mask.repeat_interleave(chunk.gaze.frame_sampling_rate, 1) for mask in chunk.gaze.gazing_mask
        ]
        for part, pixels in chunk_pixels(chunk, self.processor):
            masks = [mask[:, part] for mask in masks_of_frames]
            rebuilt = self._composite.reconstruct(pixels, masks, self._last)
            self._last = rebuilt[:, -1].clone()
            rebuilt = rebuilt[..., :height, :width]
            self.squared_errors += (rebuilt - pixels[..., :height, :width]).square().mean((0, 2, 3, 4)).tolist()
            yield part, pixels, rebuilt[0]


def psnr_of(squared_errors: list[float]) -> float:
    """
    Computes the peak signal-to-noise ratio of several frames together.

    Args:
        squared_errors (`list[float]`): mean squared error of each, pixels in 0..1.

    Returns:
        `float`: in dB, at most 100.
    """
    return float(-10 * np.log10(max(float(np.mean(squared_errors)), 1e-10)))
