"""
Gazing at the very frames that an encoder gets: its normalisation undone, its tiles and scales, chunk by chunk.

This module makes whole-video gazes for an encoder's grid out of a selector's gazes at chunks of tiles. It knows nothing of
what encodes them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector, resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .normalization import normalizing_part, undo_normalization
from .video_tokens import cut_tiles


Setting = float | Sequence[float] | None

_PER_FRAME = ("gazing_ratio", "task_loss_requirement")


class EncoderFrameGazer:
    """
    Gazes at frames as they were preprocessed for an encoder.

    A selector that takes any grid gazes at whole frames on the encoder's own grid, whatever tiles they are cut into. Others
    gaze at every tile by itself, resized to their own scales.

    Args:
        selector ([`GazeSelector`]): what chooses.
        processor:
            The encoder's processor, video processor or image processor, whose `image_mean`, `image_std` and
            `rescale_factor` say how to undo its normalisation.
        gaze_processor ([`AutoGazeVideoProcessor`]): whose normalisation the selector needs.
        grid ([`GazeGrid`]): the encoder's scales and patch size.
        chunk_frames (`int`): frames of a clip, a multiple of the selector's rate.
        max_batch_size (`int`): tiles that are gazed at together. Changes no result.

    Raises:
        ValueError: if the selector cannot gaze for the grid or in such chunks, or the processor says none of this.

    Example:

    ```python
    >>> from transformers_autogaze import AutoGazeVideoProcessor, GazeGrid, GreedyGazeSelector
    >>> from transformers_autogaze.integrations.encoder_gazing import EncoderFrameGazer

    >>> grid = GazeGrid([378], patch_size=14)
    >>> siglip = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    >>> gazer = EncoderFrameGazer(GreedyGazeSelector(), siglip, AutoGazeVideoProcessor(), grid, 16, 4)
    >>> gaze = gazer.gaze([torch.zeros(2, 3, 384, 384)], gazing_ratio=0.1)[0]
    >>> gaze.scales, gaze.num_real.tolist()
    ([378], [144])

    ```
    """

    def __init__(
        self,
        selector: GazeSelector,
        processor: Any,
        gaze_processor: AutoGazeVideoProcessor,
        grid: GazeGrid,
        chunk_frames: int,
        max_batch_size: int,
    ):
        self.selector, self.gaze_processor, self.grid = selector, gaze_processor, grid
        self.chunk_frames, self.max_batch_size = chunk_frames, max_batch_size
        self.processor = normalizing_part(processor)
        rate = selector.config.frame_sampling_rate
        if chunk_frames % rate:
            raise ValueError(f"`chunk_frames` must be a multiple of {rate}, the selector's rate, got {chunk_frames}")
        try:
            if not selector.takes_any_grid:
                grid.tile_layout(selector.config.grid)
        except ValueError as error:
            raise ValueError(f"a selector with {selector.config.grid} cannot gaze for {grid}: {error}") from error

    @torch.no_grad()
    def gaze(
        self,
        videos: Sequence[torch.Tensor],
        gazing_ratio: Setting = None,
        task_loss_requirement: Setting = None,
        tiles: tuple[int, int] = (1, 1),
        clip_ratio: float | None = None,
        tokens_per_clip: int | None = None,
    ) -> list[GazeOutput]:
        """
        Gazes at videos. Where no ratio, threshold or budget is given, the selector's configuration decides.

        Args:
            videos (`Sequence[torch.FloatTensor]` of shape `(frames, channels, height, width)`):
                Frames normalised for the encoder.
            gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
                As in [`~GazeSelector.generate`], for every frame or, with a selector of fixed scales, for every tile; a
                sequence names one value per frame of a chunk, and every chunk takes it from its start.
            tiles (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
                Rows and columns of tiles to cut every frame into; each is as large as the encoder's finest scale.
            clip_ratio (`float`, *optional*):
                Share of the patches of the finest scale, over the whole of each video, to keep where they gain most.
                For selectors that know gains.
            tokens_per_clip (`int`, *optional*): the same as a number of patches.

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames; ids ascend inside a frame.

        Raises:
            ValueError: if an argument does not fit the frames.
        """
        (rows, cols), rate = tiles, self.selector.config.frame_sampling_rate
        for number, video in enumerate(videos):
            if min(tiles) < 1 or video.shape[-2] % rows or video.shape[-1] % cols:
                raise ValueError(
                    f"`tiles` must cut frames into equal rows and columns, got {tiles} for frames of "
                    f"{tuple(video.shape[-2:])} pixels in video {number}"
                )
            if len(video) % rate:
                raise ValueError(f"video {number} must have a multiple of {rate} frames, got {len(video)}")
        settings = {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
            "clip_ratio": clip_ratio,
            "tokens_per_clip": tokens_per_clip,
        }
        settings = {name: setting for name, setting in settings.items() if setting is not None}
        whole = GazeGrid([(rows * height, cols * width) for height, width in self.grid.sizes], self.grid.patch_size)
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, video in enumerate(videos):
            alike.setdefault(tuple(video.shape), []).append(number)
        gazes = {}
        for numbers in alike.values():
            of_shape = [videos[number] for number in numbers]
            if self.selector.takes_any_grid:
                masks = self._gaze_frames(of_shape, whole, max(1, self.max_batch_size // (rows * cols)), settings)
            else:
                tiles_of_all = [tile for video in of_shape for tile in cut_tiles(video, rows, cols)]
                masks = whole.stitch_tiles(self._gaze_tiles(tiles_of_all, settings), self.grid)
            for number, *of_video in zip(numbers, *(mask.split(1) for mask in masks), strict=True):
                gazes[number] = GazeOutput.from_masks(of_video, whole, rate)
        return [gazes[number] for number in range(len(videos))]

    def _gaze_frames(
        self, videos: list[torch.Tensor], whole: GazeGrid, batch_size: int, settings: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Gazes at whole frames `(frames, channels, height, width)` of one shape; gives masks `(videos, frames, patches)`."""
        selector = self.selector if self.selector.config.grid == whole else self.selector.for_grid(whole)
        # A budget for the clip, which may be the configuration's own, needs all of it.
        is_per_frame = bool(settings) and settings.keys() <= set(_PER_FRAME)
        chunk_frames = self.chunk_frames if is_per_frame else len(videos[0])
        parts = [
            self._gaze_batch(selector, videos[first : first + batch_size], whole, chunk_frames, settings)
            for first in range(0, len(videos), batch_size)
        ]
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def _gaze_tiles(self, tiles: list[torch.Tensor], settings: dict[str, Any]) -> list[torch.Tensor]:
        """Gazes at tiles `(frames, channels, height, width)` of one shape; gives masks `(tiles, frames, patches)`."""
        options, size = dict(settings), self.max_batch_size
        if self.selector.config.grid != self.grid:
            options |= {"target_scales": self.grid.scales, "target_patch_size": self.grid.patch_size}
        parts = [
            self._gaze_batch(self.selector, tiles[first : first + size], self.grid, self.chunk_frames, options)
            for first in range(0, len(tiles), size)
        ]
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def _gaze_batch(
        self,
        selector: GazeSelector,
        views: list[torch.Tensor],
        grid: GazeGrid,
        chunk_frames: int,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Gazes at a batch chunk by chunk, resized to the finest scale of a grid."""
        config, state, masks = selector.config, None, []
        for start in range(0, len(views[0]), chunk_frames):
            chunk = torch.stack([view[start : start + chunk_frames] for view in views])
            chunk = self.to_gaze_values(chunk.to(getattr(selector, "device", "cpu")))
            length = chunk.shape[1] // config.frame_sampling_rate
            gaze = selector.generate(
                resize_frames(chunk, grid.sizes[-1]),
                **{name: _first(value, length) if name in _PER_FRAME else value for name, value in options.items()},
                past_key_values=state,
                # A selector without a longest clip streams; for others every chunk is a clip of its own.
                use_cache=config.max_num_frames is None,
            )
            state = gaze.cache
            masks.append(gaze.gazing_mask)
        return [torch.cat(scale, dim=1) for scale in zip(*masks, strict=True)]

    def to_gaze_values(self, frames: torch.Tensor) -> torch.Tensor:
        """Brings frames `(.., 3, height, width)` from the encoder's normalisation to the selector's, in float32."""
        return self.gaze_processor.to_pixel_values(undo_normalization(frames, self.processor).float())


def _first(setting: Setting, count: int) -> Setting:
    """Cuts a setting that names one value per frame to the frames of a shorter chunk."""
    return setting[:count] if np.ndim(setting) else setting
