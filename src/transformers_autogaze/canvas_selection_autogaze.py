"""
What selectors that search on a canvas share: budgets, thresholds, streams and any grid, whatever it is that they compare.

This module turns the search of `canvas_search_autogaze` into a selector; a subclass says what of a frame is compared, and what
a squared error is worth as a loss.
"""

import copy

import torch
from transformers.utils.generic import can_return_tuple

from .canvas_search_autogaze import Canvas, CanvasSearch, FrameSearchOutput
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid
from .selection_autogaze import GazeSelector
from .token_budgets_autogaze import ClipBudget, RateControl, StreamBudget


_MAX_GRIDS = 16  # grids whose search is cached; a server may get videos of any size


class CanvasGazeCache:
    """What a selector on a canvas remembers of a stream: the canvas, and the account of a budget over time."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets everything, to start with new clips."""
        self.canvas: Canvas | None = None
        """What was kept of the last frame and those before; `None` before the first frame."""
        self.rate_control: RateControl | None = None
        """Follows `tokens_per_second`."""
        self.num_frames: int = 0
        """Frames of gaze seen so far."""
        self.grid: GazeGrid | None = None
        """The patches that were chosen from; `None` before the first frame."""


class CanvasGazeSelector(GazeSelector):
    """
    Keeps the patches that bring a canvas nearest to each frame; the base of selectors that can tell what a patch gains.

    A subclass has a `config` with a `grid`, `gazing_ratio` and `task_loss_requirement`, calls `set_search` when it is made, and
    implements `make_search`, `look`, `loss_to_mse` and `mse_to_loss`.
    """

    knows_gains = True
    takes_any_grid = True
    cache_class = CanvasGazeCache
    """What it remembers of a stream."""

    def make_search(self, grid: GazeGrid) -> CanvasSearch:
        """Makes the search on a grid."""
        raise NotImplementedError

    def look(self, frames: torch.Tensor, tubelet_size: int) -> torch.Tensor:
        """
        Turns frames into what the search compares.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): normalised, of the grid's finest size.
            tubelet_size (`int`): frames that are kept or dropped together.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames / tubelet_size, ..)`.
        """
        raise NotImplementedError

    def loss_to_mse(self, loss: torch.Tensor) -> torch.Tensor:
        """Turns task losses into mean squared errors of what is compared."""
        raise NotImplementedError

    def mse_to_loss(self, mse: torch.Tensor) -> torch.Tensor:
        """Turns mean squared errors of what is compared into task losses."""
        raise NotImplementedError

    def set_search(self, grid: GazeGrid) -> None:
        """Sets the search; called when a selector is made."""
        self.search = self.make_search(grid)
        self._for_grid: dict[GazeGrid, CanvasGazeSelector] = {}

    @can_return_tuple
    def forward(self, pixel_values_videos: torch.Tensor, **kwargs) -> GazeOutput:
        """
        Gazes, as [`~GazeSelector.generate`] does: there is nothing else to compute.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): normalised frames.
            kwargs: the other arguments of [`~GazeSelector.generate`], and `return_dict` (`bool`).

        Returns:
            [`GazeOutput`], or a tuple of what is not `None` in it.
        """
        return self.generate(pixel_values_videos, **kwargs)

    def for_grid(self, grid: GazeGrid) -> "CanvasGazeSelector":
        """
        Gives the same selector for another grid, with the same weights.

        Args:
            grid ([`GazeGrid`]): any scales and patch size; frames are resized to the finest scale.

        Returns:
            a selector of the same class.

        Raises:
            ValueError: if this selector cannot choose among the patches of such a grid.

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
            # A shallow copy has its parts in common with this one, wherever they are moved.
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
        seen = self.look(frames, tubelet_size)
        start = self._start(cache, seen)
        num_values = start.image[0].numel()
        max_error = None if threshold is None else self.loss_to_mse(threshold).double() * num_values
        losses = None
        if token_budget is None:
            found = self._search_frames(seen, budget, max_error, start)
            losses = self.mse_to_loss((found.errors / num_values).to(seen.dtype))
        elif isinstance(token_budget, ClipBudget):
            num_tokens = torch.full((len(seen),), token_budget.num_tokens)
            found = self.search.search_clip(seen, num_tokens, max_error, start)
        else:
            goes_on = cache.rate_control is not None and cache.rate_control.budget == token_budget
            # A call that fails leaves the account as it was.
            control = cache.rate_control.copy() if goes_on else RateControl(token_budget, len(seen), seen.device)
            found = self.search.search_stream(seen, control, max_error, start)
            cache.rate_control = control
        first_frame = cache.num_frames if past_key_values is not None or use_cache else None
        cache.canvas = found.canvas
        cache.num_frames += seen.shape[1]
        cache.grid = self.config.grid
        return self._to_output(found.ids, found.counts, losses, tubelet_size).replace(
            first_frame=first_frame, cache=cache if use_cache else None
        )

    def _search_frames(
        self, seen: torch.Tensor, budget: torch.Tensor, max_error: torch.Tensor | None, start: Canvas
    ) -> FrameSearchOutput:
        return self.search.search_frames(seen, budget, max_error, start)

    def _to_output(
        self, ids: torch.Tensor, counts: torch.Tensor, losses: torch.Tensor | None, tubelet_size: int
    ) -> GazeOutput:
        """Makes a gaze of ids that count from their frame, `(batch, frames, K)`, and how many there are of each."""
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
        name = self.cache_class.__name__
        if not isinstance(cache, self.cache_class):
            raise ValueError(f"`past_key_values` must be a {name}, got {type(cache).__name__}")
        if cache.canvas is not None and len(cache.canvas.image) != num_clips:
            raise ValueError(
                f"`past_key_values` holds {len(cache.canvas.image)} clips, but {num_clips} are given now (tiles count); "
                f"pass the frames of the same clips, or a new {name}"
            )
        if cache.grid not in (None, self.config.grid):
            raise ValueError(
                f"`past_key_values` is of {cache.grid}, but patches of {self.config.grid} are asked for now; a stream keeps "
                f"its grid and its `tubelet_size`, or begins with a new {name}"
            )

    def _start(self, cache: CanvasGazeCache, seen: torch.Tensor) -> Canvas:
        """Gives the canvas to start from: that of the stream, or one on which nothing was kept yet."""
        start = self.search.start_canvas(seen)
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
