"""
Base class of the selectors that search on a canvas (`canvas_search_autogaze`): budgets, thresholds, streams and any grid.

A subclass defines what the search compares and how squared errors relate to losses.
"""

import copy
from typing import TYPE_CHECKING

import torch
from transformers.utils.generic import can_return_tuple

from .canvas_search_autogaze import Canvas, CanvasSearch, CanvasSearchOutput, FrameSearchOutput
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid
from .selection_autogaze import GazeSelector, check_cache
from .token_budgets_autogaze import ClipBudget, RateControl, StreamBudget


_MAX_GRIDS = 16  # grids for which a selector is cached; a server may get videos of any size


class CanvasGazeCache:
    """State of a batch of streams: the canvas, and the rate control of a budget over time."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Empties the cache, to start with new clips."""
        self.canvas: Canvas | None = None
        """Canvas after the last frame; `None` before the first frame."""
        self.rate_control: RateControl | None = None
        """Rate control for `tokens_per_second`."""
        self.num_frames: int = 0
        """Number of frames of gaze so far."""
        self.grid: GazeGrid | None = None
        """Grid of the stream; `None` before the first frame."""

    @property
    def batch_size(self) -> int | None:
        """Number of clips; `None` while the cache is empty."""
        return None if self.canvas is None else len(self.canvas.image)


class CanvasGazeSelector(GazeSelector):
    """
    Keeps the patches that minimise the error between a canvas and each frame; base class of selectors that know gains.

    A subclass has a `config` with `grid`, `gazing_ratio` and `task_loss_requirement`, calls `set_search` in `__init__`, and
    implements `make_search`, `look`, `loss_to_mse` and `mse_to_loss`.
    """

    knows_gains = True
    takes_any_grid = True
    cache_class: type[CanvasGazeCache] = CanvasGazeCache
    """Class of the state of a stream."""
    search: CanvasSearch

    if TYPE_CHECKING:  # see [`GazeSelector`]

        @property
        def dtype(self) -> torch.dtype: ...

    def make_search(self, grid: GazeGrid) -> CanvasSearch:
        """Creates the search on a grid."""
        raise NotImplementedError

    def look(self, frames: torch.Tensor, tubelet_size: int) -> torch.Tensor:
        """
        Converts frames to the values that the search compares.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                Normalised frames in the size of the finest scale.
            tubelet_size (`int`): number of frames that are kept or dropped together.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames / tubelet_size, ..)`.
        """
        raise NotImplementedError

    def loss_to_mse(self, loss: torch.Tensor) -> torch.Tensor:
        """Converts task losses to mean squared errors of the compared values."""
        raise NotImplementedError

    def mse_to_loss(self, mse: torch.Tensor) -> torch.Tensor:
        """Converts mean squared errors of the compared values to task losses."""
        raise NotImplementedError

    def set_search(self, grid: GazeGrid) -> None:
        """Creates the search of a new selector."""
        self.search = self.make_search(grid)
        self._for_grid: dict[GazeGrid, CanvasGazeSelector] = {}

    @can_return_tuple
    def forward(self, pixel_values_videos: torch.Tensor, **kwargs) -> GazeOutput:
        """
        The same as [`~GazeSelector.generate`], as there is nothing else to compute.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): normalised frames.
            kwargs: the other arguments of [`~GazeSelector.generate`], and `return_dict` (`bool`).

        Returns:
            [`GazeOutput`], or a tuple of what is not `None` in it.
        """
        return self.generate(pixel_values_videos, **kwargs)

    def for_grid(self, grid: GazeGrid) -> "CanvasGazeSelector":
        """
        Returns the same selector for another grid, with the same weights.

        Args:
            grid ([`GazeGrid`]): any scales and patch size; frames are resized to the finest scale.

        Returns:
            A selector of the same class.

        Raises:
            ValueError: if this selector does not support the grid.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GreedyGazeSelector

        >>> GreedyGazeSelector().for_grid(GazeGrid([(252, 448)], patch_size=28)).config.scales
        [(252, 448)]

        ```
        """
        if grid == self.config.grid:
            return self
        other = self._for_grid.get(grid)
        if other is None:
            settings = {**self.config.to_diff_dict(), "scales": grid.scales, "patch_size": grid.patch_size}
            # A shallow copy shares its modules with this selector, also after they are moved to another device.
            other = copy.copy(self)
            other.config = type(self.config)(**settings)
            other.search = self.make_search(grid)
            if len(self._for_grid) >= _MAX_GRIDS:
                self._for_grid.pop(next(iter(self._for_grid)), None)
            self._for_grid[grid] = other
        return other

    def _gaze(
        self,
        frames: torch.Tensor,
        budget: torch.Tensor,
        threshold: torch.Tensor | None,
        past_key_values: CanvasGazeCache | None,
        use_cache: bool,
        token_budget: ClipBudget | StreamBudget | None = None,
        tubelet_size: int = 1,
    ) -> GazeOutput:
        cache = self.cache_class() if past_key_values is None else past_key_values
        self._check_cache(cache, len(frames))
        tubelet_size = int(tubelet_size)
        values = self.look(frames, tubelet_size)
        start = self._initial_canvas(cache, values)
        num_values = start.image[0].numel()
        max_error = None if threshold is None else self.loss_to_mse(threshold).double() * num_values
        found: FrameSearchOutput | CanvasSearchOutput
        losses = None
        if token_budget is None:
            found = self._search_frames(values, budget, max_error, start)
            losses = self.mse_to_loss((found.errors / num_values).to(values.dtype))
        elif isinstance(token_budget, ClipBudget):
            num_tokens = torch.full((len(values),), token_budget.num_tokens)
            found = self.search.search_clip(values, num_tokens, max_error, start)
        else:
            continues = cache.rate_control is not None and cache.rate_control.budget == token_budget
            # A copy, so that a call that fails does not change the cache.
            control = cache.rate_control.copy() if continues else RateControl(token_budget, len(values), values.device)
            found = self.search.search_stream(values, control, max_error, start)
            cache.rate_control = control
        first_frame = cache.num_frames if past_key_values is not None or use_cache else None
        cache.canvas = found.canvas
        cache.num_frames += values.shape[1]
        cache.grid = self.config.grid
        return self._to_output(found.ids, found.counts, losses, tubelet_size).replace(
            first_frame=first_frame, cache=cache if use_cache else None
        )

    def _search_frames(
        self, values: torch.Tensor, budget: torch.Tensor, max_error: torch.Tensor | None, start: Canvas
    ) -> FrameSearchOutput:
        return self.search.search_frames(values, budget, max_error, start)

    def _to_output(
        self, ids: torch.Tensor, counts: torch.Tensor, losses: torch.Tensor | None, tubelet_size: int
    ) -> GazeOutput:
        """Builds the gaze from ids counted from their frame, `(batch, frames, K)`, and counts `(batch, frames)`."""
        grid, device = self.config.grid, ids.device
        num_slots = counts.amax(0)
        place = torch.arange(ids.shape[2], device=device)
        is_slot = place < num_slots[:, None]
        is_padding = place >= counts[..., None]
        first = torch.arange(ids.shape[1], device=device)[:, None] * grid.num_patches
        ids = ids.masked_fill(is_padding, grid.num_patches) + first
        return GazeOutput.from_ids(
            ids[:, is_slot],
            is_padding[:, is_slot],
            num_slots,
            grid,
            tubelet_size,
            task_loss_prediction=None if losses is None else losses[:, is_slot],
            clip_num_gazing_each_frame=counts,
        )

    def _check_cache(self, cache: CanvasGazeCache, num_clips: int) -> None:
        check_cache(cache, self.cache_class, num_clips)
        if cache.grid not in (None, self.config.grid):
            raise ValueError(
                f"`past_key_values` is of {cache.grid}, but patches of {self.config.grid} are requested now; a stream keeps "
                f"its grid and its `tubelet_size`, or begins with a new {self.cache_class.__name__}"
            )

    def _initial_canvas(self, cache: CanvasGazeCache, values: torch.Tensor) -> Canvas:
        """Returns the canvas of the stream, or the initial one."""
        start = self.search.start_canvas(values)
        if cache.canvas is None:
            return start
        if cache.canvas.image.shape != start.image.shape:
            raise ValueError(
                f"`past_key_values` holds frames of shape {tuple(cache.canvas.image.shape[1:])}, but those given now have "
                f"{tuple(start.image.shape[1:])}; a stream keeps its grid and its `tubelet_size`"
            )
        return cache.canvas

    def _draw_settings(self, num_frames: int, generator: torch.Generator | None) -> tuple[float, float]:
        return self.config.gazing_ratio, self.config.task_loss_requirement
