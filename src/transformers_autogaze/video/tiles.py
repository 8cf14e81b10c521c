"""Gazing at the frames of one video chunk by chunk: frames are cut into tiles, and the gazes of tiles are joined."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor


Setting = float | Sequence[float] | None
"""A budget or threshold: one number, or one for each frame."""

MAX_WHOLE_FRAMES, MAX_WHOLE_PIXELS = 64, 2**25
"""Maximum length, and number of pixels, of frames that are searched as one clip if they have a budget over time."""
FRAME_RATE = 30.0
"""Frames per second of videos whose rate is unknown; it only affects the length of the intervals of a budget over time."""
_MAX_PIXELS = 2**22  # of frames that are searched together without tiles; at least one frame is


def slice_setting(setting: Setting, start: int, stop: int) -> Setting:
    """Returns the values of frames `start` to `stop` of a setting with one value for each frame; a number is unchanged."""
    return cast(Sequence[float], setting)[start:stop] if np.ndim(setting) else setting


def choose_tile_grid(height: int, width: int, max_tiles: int) -> tuple[int, int]:
    """
    Chooses how many rows and columns of square tiles to resize a frame to.

    Args:
        height, width (`int`): size of the frame in pixels.
        max_tiles (`int`): maximum number of tiles, at least 1.

    Returns:
        `tuple[int, int]`: the rows and columns with the aspect ratio nearest to the frame's; of several, the most tiles.

    Example:

    ```python
    >>> from transformers_autogaze.video.tiles import choose_tile_grid

    >>> choose_tile_grid(2160, 3840, max_tiles=45), choose_tile_grid(1080, 1920, max_tiles=12)
    ((5, 9), (2, 4))

    ```
    """

    def stretch(layout: tuple[int, int]) -> tuple[Fraction, int]:
        rows, cols = layout
        ratio = Fraction(cols * height, rows * width)
        return max(ratio, 1 / ratio), -rows * cols

    layouts = [(rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)]
    return min(layouts, key=stretch)


def to_levels(
    frames: np.ndarray,
    processor: AutoGazeVideoProcessor,
    tiles: str,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Converts frames to the tensor that patches are chosen in, resized according to `tiles`.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)` and type uint8): the frames.
        processor ([`AutoGazeVideoProcessor`]): resizes them; whole frames to its own size.
        tiles (`str`): see [`stream_gaze`].
        size (`tuple[int, int]`): height and width in pixels of all tiles together, used for `"grid"` only.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): device of the result.

    Returns:
        `torch.ByteTensor` of shape `(frames, 3, height, width)`: levels 0..255.
    """
    levels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)
    if tiles == "whole":
        # As in the pipeline: `generate` resizes to the selector's square afterwards.
        return processor.resize_levels(levels)
    return processor.resize_levels(levels, size) if tiles == "grid" else levels


class TileGazer:
    """
    Gazes at chunks of frames of one size, tile by tile, and keeps the state of a streaming selector for each tile.

    Args:
        selector, processor, tiles, max_tiles, max_batch_size: as in [`stream_gaze`].
        settings (`dict[str, Any]`): budgets and thresholds.
        frame_rate (`float`): frames per second.
    """

    def __init__(
        self,
        selector: GazeSelector,
        processor: AutoGazeVideoProcessor,
        tiles: str,
        max_tiles: int,
        max_batch_size: int,
        settings: dict[str, Any],
        frame_rate: float,
    ):
        self.selector, self.processor, self.settings, self.frame_rate = selector, processor, settings, frame_rate
        self.tiles, self.max_tiles, self.max_batch_size = tiles, max_tiles, max_batch_size
        side = selector.config.image_size
        self.tile_size: tuple[int, int] = (side, side) if isinstance(side, int) else tuple(side)
        self.device = torch.device(getattr(selector, "device", "cpu"))
        self.dtype = torch.promote_types(getattr(selector, "dtype", torch.float32), torch.float32)
        self.streams = selector.config.max_num_frames is None
        self.needs_no_tiles = selector.takes_any_grid and len(selector.config.grid.grids) == 1 and tiles != "whole"
        self.size: tuple[int, int] | None = None
        self.states: dict[int, object] = {}
        self.searches_clips: bool | None = None
        """Whether every chunk keeps its own share of a budget over time; `None` before the first chunk."""

    @torch.no_grad()
    def gaze(self, frames: np.ndarray, is_clip: bool) -> tuple[GazeOutput, torch.Tensor, tuple[int, int]]:
        """
        Gazes at the frames of the next chunk.

        Args:
            frames (`np.ndarray` of shape `(frames, height, width, 3)` and type uint8): the frames.
            is_clip (`bool`): whether they keep their own share of a budget over time, if they are small enough.

        Returns:
            `tuple`: `gaze`, `levels` and `extent` of [`GazeChunk`].
        """
        if self.size is None:
            self._plan(frames.shape[1:3])
        size = self.rows * self.tile_size[0], self.cols * self.tile_size[1]
        levels = to_levels(frames, self.processor, self.tiles, size, self.device)
        if self.tiles == "whole":
            self.tile_size = levels.shape[-2], levels.shape[-1]
        settings, step = self._settings(levels, is_clip)
        if self.rows * self.cols == 1:
            steps = range(0, len(levels), step)
            gazes = [self._gaze_tiles(levels[first : first + step], range(1), settings, first) for first in steps]
            gaze = GazeOutput.concatenate(gazes)
            return self._drop_outside(gaze.replace(cache=None)), levels, self.extent
        return self._gaze_grid(levels, settings), levels, self.extent

    def _gaze_grid(self, levels: torch.Tensor, settings: dict[str, Any]) -> GazeOutput:
        """Gazes at all tiles of frames and joins their gazes."""
        count = self.rows * self.cols
        parts = [
            self._gaze_tiles(levels, range(first, min(first + self.max_batch_size, count)), settings)
            for first in range(0, count, self.max_batch_size)
        ]
        masks = [torch.cat(scale_masks) for scale_masks in zip(*(part.gazing_mask for part in parts), strict=True)]
        masks = self.grid.stitch_tiles(masks, self.selector.config.grid)
        if self.inside is not None:
            masks = [mask & inside for mask, inside in zip(masks, self.inside, strict=True)]
        threshold = parts[0].task_loss_requirement
        return GazeOutput.from_masks(
            masks,
            self.grid,
            self.selector.config.frame_sampling_rate,
            task_loss_requirement=None if threshold is None else threshold[:1],
            first_frame=parts[0].first_frame,
        )

    def _settings(self, levels: torch.Tensor, is_clip: bool) -> tuple[dict[str, Any], int]:
        """Returns the settings for the next frames, and the number of frames that are gazed at together."""
        settings = dict(self.settings)
        pixels = levels[0, 0].numel()
        step = max(1, _MAX_PIXELS // pixels) if self.needs_no_tiles else len(levels)
        if settings["clip_ratio"] is not None:
            if self.searches_clips is None:
                self.searches_clips = is_clip and len(levels) * pixels <= MAX_WHOLE_PIXELS
            if self.searches_clips:
                step = len(levels)
            else:
                share = settings.pop("clip_ratio") * self.selector.config.grid.num_patches_each_scale[-1]
                settings["tokens_per_second"] = share * self.frame_rate
        elif settings["tokens_per_second"] is not None:
            settings["tokens_per_second"] = settings["tokens_per_second"] / (self.rows * self.cols)
        if settings["tokens_per_second"] is not None:
            settings["frame_rate"] = self.frame_rate
        return settings, step

    def _plan(self, size: tuple[int, int]) -> None:
        """Chooses the tiles for frames of a height and width."""
        self.size, own = size, self.selector.config.grid
        self.rows = self.cols = 1
        self.extent, self.inside = self.size, None
        if self.tiles == "grid":
            tall, wide = self.tile_size
            self.rows, self.cols = choose_tile_grid(size[0] * wide, size[1] * tall, self.max_tiles)
        if self.needs_no_tiles:
            patch, wanted = own.patch_size, (self.rows * self.tile_size[0], self.cols * self.tile_size[1])
            if self.tiles == "native":
                wanted = self.extent = -(-size[0] // patch) * patch, -(-size[1] // patch) * patch
            self.rows, self.cols, self.tile_size = 1, 1, wanted
            self.grid = GazeGrid([wanted], patch)
            self.selector = self.selector.for_grid(self.grid)
            return
        if self.tiles == "native":
            self.rows, self.cols = (-(-whole // tile) for whole, tile in zip(size, self.tile_size, strict=True))
            self.extent = self.rows * self.tile_size[0], self.cols * self.tile_size[1]
        scales = [(self.rows * height, self.cols * width) for height, width in own.sizes]
        self.grid = own if self.rows * self.cols == 1 else GazeGrid(scales, own.patch_size)
        if self.extent != self.size:
            boxes = self.grid.boxes(torch.arange(self.grid.num_patches, device=self.device), *self.extent)
            inside = (boxes[:, 0] < size[1]) & (boxes[:, 1] < size[0])
            self.inside = self.grid.split_by_scale(inside)

    def _gaze_tiles(
        self, levels: torch.Tensor, numbers: range, settings: dict[str, Any], first_frame: int = 0
    ) -> GazeOutput:
        """
        Gazes at some tiles of frames.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): the frames.
            numbers (`range`): which tiles, numbered row by row.
            settings (`dict[str, Any]`): budgets and thresholds, for the frames of the whole chunk.
            first_frame (`int`, *optional*, defaults to 0): index of the first of these frames in the chunk.
        """
        height, width = self.tile_size
        # Padding is zeros after normalisation, as in `GazeGrid.cut_tiles`.
        video = torch.zeros(len(numbers), len(levels), 3, height, width, dtype=self.dtype, device=self.device)
        for tile, number in zip(video, numbers, strict=True):
            top, left = number // self.cols * height, number % self.cols * width
            part = levels[..., top : top + height, left : left + width]
            tile[..., : part.shape[-2], : part.shape[-1]] = self.processor.to_pixel_values(part)
        start, count = (frames // self.selector.config.frame_sampling_rate for frames in (first_frame, len(levels)))
        settings = {name: slice_setting(setting, start, start + count) for name, setting in settings.items()}
        if not self.streams:
            return self.selector.generate(video, **settings)
        state = self.states.get(numbers.start)
        gaze = self.selector.generate(video, **settings, past_key_values=state, use_cache=True)
        self.states[numbers.start] = gaze.cache
        return gaze

    def _drop_outside(self, gaze: GazeOutput) -> GazeOutput:
        """Replaces kept patches outside the frame by padding, in the gaze of a single tile; the order is unchanged."""
        if self.inside is None:
            return gaze
        first = gaze.frame_of_slot * self.grid.num_patches
        local = (gaze.gazing_pos - first).masked_fill(gaze.if_padded_gazing, 0)
        is_padding = gaze.if_padded_gazing | ~torch.cat(self.inside)[local]
        return gaze.replace(
            # Padding has the id after the last patch of its frame.
            gazing_pos=torch.where(
                is_padding & ~gaze.if_padded_gazing, first + self.grid.num_patches, gaze.gazing_pos
            ),
            if_padded_gazing=is_padding,
            gazing_mask=[mask & inside for mask, inside in zip(gaze.gazing_mask, self.inside, strict=True)],
        )
