"""
What is told and shown of a video that is gazed at chunk by chunk: records, sums and pictures, in memory that hardly grows.

This module knows nothing of arguments, selectors or files.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .composite_autogaze import CompositeReconstruction
from .gaze_files_autogaze import GazeFileWriter
from .gazing_autogaze import GazeOutput
from .processing_autogaze import AutoGazeProcessor
from .selection_autogaze import resize_frames
from .video_gazing import GazeChunk
from .visualization import paint_gaze, to_frames


_PANEL = 448  # pixels on the shorter side of a panel at most
_PAINTED = 4  # frames that are painted together
_REBUILT = 2**22  # pixels of the frames that are rebuilt together, one frame at least


@dataclass
class GazeSummary:
    """
    Gathers what is to be told about a video that is gazed at chunk by chunk, and draws it.

    Args:
        processor ([`AutoGazeProcessor`]): what made the pixel values.
        records ([`GazeFileWriter`]): takes the records of kept patches.
    """

    processor: AutoGazeProcessor
    records: GazeFileWriter
    parts: list[dict[str, Any]] = field(default_factory=list)
    squared_errors: list[float] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    _composite: CompositeReconstruction | None = None
    _reconstruction: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, chunk: GazeChunk, shown: Collection[int] | None = None) -> list[np.ndarray]:
        """
        Takes the next chunk.

        Args:
            chunk ([`GazeChunk`]): the chunk.
            shown (`Collection[int]`, *optional*):
                Frames, counted from the first of the video, whose kept patches are painted; all by default.

        Returns:
            `list[np.ndarray]`, three times shape `(frames, height, width, 3)` and type uint8: its frames, their kept patches
            and their reconstruction, small enough to show.
        """
        height, width = chunk.frames.shape[1:3]
        self._composite = self._composite or CompositeReconstruction(chunk.gaze.grid)
        self._write_records(chunk, height, width)
        self.parts.append(chunk.gaze.statistics())

        shrink = min(1.0, _PANEL / min(height, width))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        frames = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        frames = self.processor.video_processor.resize_levels(frames, size).permute(0, 2, 3, 1).contiguous()
        # The grid may reach beyond the frame.
        bottom, right = (
            max(0, round(small * whole / part) - small)
            for small, whole, part in zip(size, chunk.extent, (height, width), strict=True)
        )
        padded = np.pad(frames.numpy(), ((0, 0), (0, bottom), (0, right), (0, 0)))
        rate, painted = chunk.gaze.frame_sampling_rate, []
        # Painting takes many times the memory of the frames, so few are painted together.
        for first in range(0, chunk.gaze.num_frames, _PAINTED):
            numbers = range(first * rate, min((first + _PAINTED) * rate, len(padded)))
            if shown is not None and not any(chunk.start + number in shown for number in numbers):
                painted.append(padded[numbers.start : numbers.stop, : size[0], : size[1]])
                continue
            masks = [mask[:, first : first + _PAINTED] for mask in chunk.gaze.gazing_mask]
            gaze = GazeOutput.from_masks(masks, chunk.gaze.grid, rate)
            drawn = paint_gaze(padded[numbers.start : numbers.stop], gaze)
            painted.append(drawn[:, : size[0], : size[1]])
        return [frames.numpy(), np.concatenate(painted), self._rebuild(chunk, size)]

    def _write_records(self, chunk: GazeChunk, height: int, width: int) -> None:
        rate, records = chunk.gaze.frame_sampling_rate, self.processor.post_process_gaze(chunk.gaze, chunk.extent)[0]
        self.layout = {"grid": chunk.gaze.grid, "extent": chunk.extent, "frame_sampling_rate": rate}
        for record in records:
            left, top, right, bottom = record["box"]
            record["box"] = [left, top, min(right, width), min(bottom, height)]
            record["frame"] = record["frame"] * rate + chunk.start
        self.records.add(records)

    def _rebuild(self, chunk: GazeChunk, size: tuple[int, int]) -> np.ndarray:
        """Rebuilds the frames from the kept patches, measures the error and gives them in a size to show."""
        processor, grid = self.processor.video_processor, chunk.gaze.grid
        # Of a grid that reaches beyond the frame, only the frame counts.
        inside = [
            round(side * part / whole)
            for side, part, whole in zip(grid.sizes[-1], chunk.frames.shape[1:3], chunk.extent, strict=True)
        ]
        bottom, right = (whole - part for whole, part in zip(chunk.extent, chunk.frames.shape[1:3], strict=True))
        step = max(1, _REBUILT // (grid.sizes[-1][0] * grid.sizes[-1][1]))
        shown = []
        for first in range(0, len(chunk.levels), step):
            values = processor.to_pixel_values(chunk.levels[first : first + step])
            values = F.pad(values, (0, right, 0, bottom))
            pixels = processor.to_pixels(resize_frames(values[None], grid.sizes[-1])).clamp(0, 1)
            masks = [mask[:, first : first + step] for mask in chunk.gaze.gazing_mask]
            rebuilt = self._composite.reconstruct(pixels, masks, self._reconstruction)
            self._reconstruction = rebuilt[:, -1].clone()
            rebuilt, pixels = (x[..., : inside[0], : inside[1]] for x in (rebuilt, pixels))
            self.squared_errors += (rebuilt - pixels).square().mean((0, 2, 3, 4)).tolist()
            shown.append(to_frames(rebuilt[0], size))
        return np.concatenate(shown)

    def statistics(self) -> dict[str, Any]:
        """Sums up the whole video; see [`~GazeOutput.statistics`]. `psnr` is that of the closed-form reconstruction."""
        frames, patches = (sum(part[key] for part in self.parts) for key in ("num_frames", "num_patches"))
        grid = self._composite.grid
        return {
            "num_frames": frames,
            "num_patches": patches,
            "kept_ratio": patches / (frames * grid.num_patches),
            "reduction_factor": frames * grid.num_patches_each_scale[-1] / patches if patches else None,
            "psnr": float(-10 * np.log10(max(np.mean(self.squared_errors), 1e-10))),
            "patches_each_frame": [count for part in self.parts for count in part["patches_each_frame"]],
            "patches_each_scale": {
                scale: sum(part["patches_each_scale"][scale] for part in self.parts)
                for scale in self.parts[0]["patches_each_scale"]
            },
        }
