"""Gazing at frames that were normalised for an encoder, on the encoder's grid, tile by tile and chunk by chunk."""

from collections.abc import Sequence
from typing import Any

import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector, resize_frames
from ..video.tiles import Setting, slice_setting
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .normalization import normalizing_part, undo_normalization
from .video_tokens import cut_tiles


PER_FRAME_SETTINGS = ("gazing_ratio", "task_loss_requirement")
"""Settings that apply to each frame by itself."""


class EncoderFrameGazer:
    """
    Gazes at frames that were preprocessed for an encoder.

    A selector that takes any grid gazes at whole frames on the encoder's own grid, whatever tiles they are cut into. Others
    gaze at each tile separately, resized to their own scales.

    Args:
        selector ([`GazeSelector`]): chooses the patches.
        processor:
            The encoder's processor, video processor or image processor; its `image_mean`, `image_std` and
            `rescale_factor` are needed to undo the normalisation.
        gaze_processor ([`AutoGazeVideoProcessor`]): normalises the frames for the selector.
        grid ([`GazeGrid`]): the encoder's scales and patch size.
        chunk_frames (`int`): frames of a clip, a multiple of the selector's rate.
        max_batch_size (`int`): tiles in a batch of the selector. It changes no result.

    Raises:
        ValueError: if the selector cannot gaze for the grid or in such chunks, or the processor lacks these attributes.

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
        Gazes at videos.

        Args:
            videos (`Sequence[torch.FloatTensor]` of shape `(frames, channels, height, width)`):
                Frames normalised for the encoder.
            gazing_ratio, task_loss_requirement, tiles, clip_ratio, tokens_per_clip (*optional*):
                As in [`~GazeVideoLM.gaze`].

        Returns:
            `list[GazeOutput]`, one per video, a batch of one over whole frames, with ascending ids inside a frame.

        Raises:
            ValueError: if an argument does not fit the frames.
        """
        (rows, cols), rate = tiles, self.selector.config.frame_sampling_rate
        for index, video in enumerate(videos):
            if min(tiles) < 1 or video.shape[-2] % rows or video.shape[-1] % cols:
                raise ValueError(
                    f"`tiles` must cut frames into equal rows and columns, got {tiles} for frames of "
                    f"{tuple(video.shape[-2:])} pixels in video {index}"
                )
            if len(video) % rate:
                raise ValueError(f"video {index} must have a multiple of {rate} frames, got {len(video)}")
        settings: dict[str, Any] = {
            "gazing_ratio": gazing_ratio,
            "task_loss_requirement": task_loss_requirement,
            "clip_ratio": clip_ratio,
            "tokens_per_clip": tokens_per_clip,
        }
        settings = {name: setting for name, setting in settings.items() if setting is not None}
        frame_grid = GazeGrid(
            [(rows * height, cols * width) for height, width in self.grid.sizes], self.grid.patch_size
        )
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, video in enumerate(videos):
            by_shape.setdefault(tuple(video.shape), []).append(index)
        gazes = {}
        for indices in by_shape.values():
            group = [videos[index] for index in indices]
            if self.selector.takes_any_grid:
                batch_size = max(1, self.max_batch_size // (rows * cols))
                masks = self._gaze_frames(group, frame_grid, batch_size, settings)
            else:
                group_tiles = [tile for video in group for tile in cut_tiles(video, rows, cols)]
                masks = frame_grid.stitch_tiles(self._gaze_tiles(group_tiles, settings), self.grid)
            for index, *video_masks in zip(indices, *(mask.split(1) for mask in masks), strict=True):
                gazes[index] = GazeOutput.from_masks(video_masks, frame_grid, rate)
        return [gazes[index] for index in range(len(videos))]

    def _gaze_frames(
        self, videos: list[torch.Tensor], grid: GazeGrid, batch_size: int, settings: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Gazes at whole videos of one shape; returns masks `(videos, frames, patches)`, one per scale."""
        selector = self.selector if self.selector.config.grid == grid else self.selector.for_grid(grid)
        # A budget for the clip, which may be that of the configuration, needs the whole clip at once.
        is_per_frame = bool(settings) and settings.keys() <= set(PER_FRAME_SETTINGS)
        chunk_frames = self.chunk_frames if is_per_frame else len(videos[0])
        parts = [
            self._gaze_batch(selector, videos[first : first + batch_size], grid, chunk_frames, settings)
            for first in range(0, len(videos), batch_size)
        ]
        return [torch.cat(masks) for masks in zip(*parts, strict=True)]

    def _gaze_tiles(self, tiles: list[torch.Tensor], settings: dict[str, Any]) -> list[torch.Tensor]:
        """Gazes at tiles of one shape; returns masks `(tiles, frames, patches)`, one per scale."""
        options, batch_size = dict(settings), self.max_batch_size
        if self.selector.config.grid != self.grid:
            options |= {"target_scales": self.grid.scales, "target_patch_size": self.grid.patch_size}
        parts = [
            self._gaze_batch(self.selector, tiles[first : first + batch_size], self.grid, self.chunk_frames, options)
            for first in range(0, len(tiles), batch_size)
        ]
        return [torch.cat(masks) for masks in zip(*parts, strict=True)]

    def _gaze_batch(
        self,
        selector: GazeSelector,
        views: list[torch.Tensor],
        grid: GazeGrid,
        chunk_frames: int,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Gazes at a batch chunk by chunk, with frames resized to the finest scale of a grid."""
        config, state, masks = selector.config, None, []
        for start in range(0, len(views[0]), chunk_frames):
            chunk = torch.stack([view[start : start + chunk_frames] for view in views])
            chunk = self.to_gaze_values(chunk.to(getattr(selector, "device", "cpu")))
            length = chunk.shape[1] // config.frame_sampling_rate
            chunk_options: dict[str, Any] = {
                name: slice_setting(value, 0, length) if name in PER_FRAME_SETTINGS else value
                for name, value in options.items()
            }
            gaze = selector.generate(
                resize_frames(chunk, grid.sizes[-1]),
                **chunk_options,
                past_key_values=state,
                # A selector without a maximum of frames streams; for others every chunk is a clip of its own.
                use_cache=config.max_num_frames is None,
            )
            state = gaze.cache
            masks.append(gaze.gazing_mask)
        return [torch.cat(scale_masks, dim=1) for scale_masks in zip(*masks, strict=True)]

    def to_gaze_values(self, frames: torch.Tensor) -> torch.Tensor:
        """Converts frames `(.., 3, height, width)` from the encoder's normalisation to the selector's, in float32."""
        return self.gaze_processor.to_pixel_values(undo_normalization(frames, self.processor).float())
