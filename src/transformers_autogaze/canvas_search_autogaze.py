"""
The search on a canvas: chooses the patches that minimise the squared error between the canvas and each frame.

A canvas is the image that results when each kept patch is pasted over the earlier ones. The search has three kinds of
budgets: for each frame, for a whole clip, and for a stream. The image consists of pixels or features, as a subclass
defines. `cells_autogaze` has the geometry of patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cells_autogaze import CellTables, PatchSearch
from .cells_autogaze import scale_of_patch as compute_scale_of_patch
from .clip_schedule_autogaze import ClipSchedule
from .grid_autogaze import GazeGrid
from .token_budgets_autogaze import RateControl


# Squared errors are rounded to multiples of this. Sums over up to 2**25 values of 0..1 are then exact in float64 in any
# order, so equal gains are equal to the last bit and the choice for a clip does not depend on its batch.
ERROR_UNIT = 2.0**-28
_EXCESS = 0.02  # share of excess tokens at which the search over a clip stops; those of least gain are dropped
_MAX_PASSES = 16  # passes over a clip to find its marginal gain
_FIRST_BRACKET = 8.0  # factor between tried marginal gains until a lower and an upper bound are found


class Canvas(NamedTuple):
    """
    The image that kept patches result in.

    Args:
        image (`torch.FloatTensor` of shape `(batch, channels, height, width)`): values, such as pixels in 0..1.
        is_empty (`torch.BoolTensor` of shape `(batch, *cells)`): true where no patch was ever kept.
    """

    image: torch.Tensor
    is_empty: torch.Tensor

    def clone(self) -> "Canvas":
        """Returns a copy."""
        return Canvas(self.image.clone(), self.is_empty.clone())


class CanvasSearchOutput(NamedTuple):
    """
    Patches that a search under a budget over time chose; `K` is the largest count of a frame.

    Args:
        ids (`torch.LongTensor` of shape `(batch, frames, K)`):
            Patches in the order of choice, counted from the first patch of their frame; -1 after the last.
        counts (`torch.LongTensor` of shape `(batch, frames)`): number of chosen patches.
        canvas ([`Canvas`]): canvas after the last frame, to continue with the next frames.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    canvas: Canvas


class FrameSearchOutput(NamedTuple):
    """
    Patches that a search under a budget for every frame chose; `K` is the largest budget.

    Args:
        ids, counts, canvas: as in [`CanvasSearchOutput`].
        errors (`torch.DoubleTensor` of shape `(batch, frames, K)`):
            Squared error of the frame after each choice, summed over all values; constant after the last choice.
    """

    ids: torch.Tensor
    errors: torch.Tensor
    counts: torch.Tensor
    canvas: Canvas


class _Choices(NamedTuple):
    """Choices of a pass over clips, for every patch: `(batch, frames, patches)`."""

    gains: torch.Tensor  # decreasing in the order of choice; `-inf` where a patch was not chosen
    order: torch.Tensor  # order of choice in the frame

    def num_chosen(self) -> torch.Tensor:
        """Counts the chosen patches of each clip, `(batch,)`."""
        return (self.gains > -math.inf).sum((1, 2))


class CanvasSearch:
    """
    Base class of searches for the patches that minimise the squared error between a canvas and each frame.

    A subclass implements `_render`, the images of a frame at every scale, and `start_canvas`.

    The edges of the patches of all scales lie on one regular grid of cells. Its number of cells per axis is the least common
    multiple of the numbers of patches. A patch is a union of cells, so the search sums errors of cells instead of values.

    Args:
        grid (`GazeGrid`): scales and patches.
    """

    empty_error = 1.0
    """
    Squared error per value that is added where no patch was ever kept, under budgets over time; no error is larger. It is not
    added under budgets for each frame.
    """

    def __init__(self, grid: GazeGrid):
        self.grid = grid
        num_rows, num_cols = zip(*grid.grids, strict=True)
        self.cells: tuple[int, int] = (math.lcm(*num_rows), math.lcm(*num_cols))
        """Rows and columns of cells."""
        self._cached_tables: dict[tuple[torch.device, torch.dtype], CellTables] = {}
        self._cached_scales: torch.Tensor | None = None
        self._search = PatchSearch()

    def start_canvas(self, frames: torch.Tensor) -> Canvas:
        """Returns the initial canvas, on which no patch was kept, for clips `(batch, frames, ..)`."""
        raise NotImplementedError

    def _render(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """Returns a frame `(batch, ..)` made of all patches of each scale: `(batch, channels, height, width)`, coarse to fine."""
        raise NotImplementedError

    @torch.no_grad()
    def search_frames(
        self,
        frames: torch.Tensor,
        budgets: Sequence[int] | torch.Tensor,
        max_error: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> FrameSearchOutput:
        """
        Chooses patches of every frame greedily, each time the one that decreases the error of the frame most.

        Of equal gains, the lowest id is chosen. Without `max_error`, the search continues to the end of the budget.

        Args:
            frames, canvas: as in [`~CanvasSearch.search_clip`].
            budgets (`Sequence[int]` or `torch.LongTensor` of shape `(frames,)`): patches to choose in each frame.
            max_error (`torch.DoubleTensor` of shape `(batch, frames)`, *optional*):
                A frame is done as soon as one patch is chosen and its squared error, summed over all values, is at most
                this. If not given, every frame uses its whole budget.

        Returns:
            [`FrameSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        budgets = torch.as_tensor(budgets).tolist()
        shape = (*frames.shape[:2], max(1, *budgets))
        ids = torch.full(shape, -1, device=frames.device)
        errors_left = torch.zeros(shape, dtype=torch.float64, device=frames.device)
        counts = torch.tensor(budgets, device=frames.device).repeat(len(frames), 1)
        # Inference mode makes many small operations a tenth faster. Returned tensors are cloned outside it.
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            for t, budget in enumerate(budgets):
                images = self._render(frames[:, t].contiguous())
                errors = self._errors_on(canvas, images, prefers_empty=False)
                limit = None if max_error is None else max_error[:, t].to(errors) / ERROR_UNIT
                chosen, totals = self._search(self._search_tables(images[-1]), errors, max(1, budget), limit)
                steps = chosen.shape[1]
                if limit is not None:
                    counts[:, t] = ((totals > limit[:, None]).sum(1) + 1).clamp(max=min(steps, budget))
                step = torch.arange(steps, device=frames.device)
                chosen = chosen.where(step < counts[:, t, None], -1)
                ids[:, t, :steps] = chosen
                # The error is constant after the last choice.
                totals = totals.gather(1, torch.minimum(step, (counts[:, t, None] - 1).clamp(min=0)))
                errors_left[:, t] = F.pad(totals, (0, shape[2] - steps), mode="replicate") * ERROR_UNIT
                canvas = self._update_canvas(canvas, images, chosen)
        return FrameSearchOutput(ids, errors_left, counts, canvas.clone())

    @torch.no_grad()
    def search_clip(
        self,
        frames: torch.Tensor,
        num_tokens: torch.Tensor,
        max_error: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> CanvasSearchOutput:
        """
        Chooses the patches of whole clips that gain most.

        All patches of a clip gain at least the same marginal gain. With a single scale, a [`ClipSchedule`] chooses when to keep
        a patch; its gain is the decrease of error in its own frame and in those after it until it is kept again. With several
        scales, or a threshold, every frame is searched greedily until the gain falls below the marginal gain. Several passes
        find the marginal gain that results in `num_tokens`; the few excess patches of the last pass, those of least gain, are
        dropped.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, ..)`): clips, in the form that `_render` takes.
            num_tokens (`torch.LongTensor` of shape `(batch,)`): number of patches to choose of each clip.
            max_error (`torch.DoubleTensor` of shape `(batch, frames)`, *optional*):
                A frame is done when its squared error, summed over all values, is at most this, so a clip may keep fewer.
            canvas ([`Canvas`], *optional*): canvas before the first frame.

        Returns:
            [`CanvasSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            choices = self._choose_of_clip(frames, num_tokens.to(frames.device), max_error, canvas)
            ids, counts = self._keep_best(choices, num_tokens.to(frames.device))
            for t, chosen in enumerate(ids.unbind(1)):
                canvas = self._update_canvas(canvas, self._render(frames[:, t].contiguous()), chosen)
        return CanvasSearchOutput(ids.clone(), counts.clone(), canvas.clone())

    @torch.no_grad()
    def search_stream(
        self,
        frames: torch.Tensor,
        control: RateControl,
        max_error: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> CanvasSearchOutput:
        """
        Chooses the patches of a stream that gain most, frame by frame, without looking ahead.

        Args:
            frames, max_error, canvas: as in [`~CanvasSearch.search_clip`].
            control ([`RateControl`]): rate control of the streams; it is updated.

        Returns:
            [`CanvasSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        chosen_ids, chosen_counts = [], []
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            for t in range(frames.shape[1]):
                images = self._render(frames[:, t].contiguous())
                errors = self._errors_on(canvas, images)
                least, most, target = control.limits()
                needed = int(torch.maximum(least, target).max()) + int(canvas.is_empty.sum((1, 2)).max())
                limit = None if max_error is None else max_error[:, t].to(errors) / ERROR_UNIT
                gain = control.log_gain.exp2()
                budget = max(1, min(self.grid.num_patches, int(most.max())))
                ids, gains, totals = self._choose(errors, self._search_tables(images[-1]), budget, gain, needed)
                num_needed = (gains >= self._empty_cell_error(images[-1])).sum(1)
                count = control.count(gains, num_needed)
                if limit is not None:
                    done = self._errors_left(canvas, images[-1], errors, ids, totals) <= limit[:, None]
                    count = torch.where(done.any(1), torch.minimum(count, done.int().argmax(1)), count)
                control.update(count)
                chosen = ids.where(torch.arange(ids.shape[1], device=ids.device) < count[:, None], -1)
                canvas = self._update_canvas(canvas, images, chosen)
                chosen_ids.append(chosen)
                chosen_counts.append(count)
        counts = torch.stack(chosen_counts, dim=1)
        longest = max(1, int(counts.max()))
        ids = torch.stack(
            [F.pad(ids, (0, max(0, longest - ids.shape[1])), value=-1)[:, :longest] for ids in chosen_ids], 1
        )
        return CanvasSearchOutput(ids.clone(), counts.clone(), canvas.clone())

    def _choose_of_clip(
        self, frames: torch.Tensor, num_tokens: torch.Tensor, max_error: torch.Tensor | None, canvas: Canvas
    ) -> _Choices:
        """Finds the marginal gain at which each clip chooses `num_tokens` patches or a few more."""
        best = None
        low, high = (torch.full((len(frames),), bound, dtype=torch.float64) for bound in (-math.inf, math.inf))
        count_low, count_high, is_done = torch.zeros_like(low), torch.zeros_like(low), low > 0
        wanted = num_tokens.double().cpu()
        guess = self._guess_marginal_gain(frames, num_tokens).log2().cpu()
        is_scheduled = len(self.grid.grids) == 1 and max_error is None
        schedule = self._schedule(frames, canvas) if is_scheduled else None
        for number in range(_MAX_PASSES + 1):
            if number == _MAX_PASSES:
                guess = low  # too little changes in a clip, so it keeps all patches
            min_gain = guess.exp2().to(frames.device)
            if schedule is None:
                choices = self._pass(frames, min_gain, max_error, canvas)
            else:
                gains = schedule.gains(min_gain)
                choices = _Choices(gains, gains.argsort(dim=2, descending=True, stable=True).argsort(dim=2))
            count = choices.num_chosen().double().cpu()
            enough = (count >= wanted) | (number == _MAX_PASSES)
            # The choices for a clip that is done do not change, so they do not depend on other clips of the batch.
            better = enough & (guess >= low) & ~is_done
            if best is None:
                best = choices
            else:
                taken = better.to(frames.device)[:, None, None]
                best = _Choices(*(torch.where(taken, new, old) for new, old in zip(choices, best, strict=True)))
            low, count_low = torch.where(better, guess, low), torch.where(better, count, count_low)
            high, count_high = torch.where(enough, high, guess), torch.where(enough, count_high, count)
            is_done = (count_low >= wanted) & (count_low <= wanted * (1 + _EXCESS) + 1)
            if bool(is_done.all()):
                break
            guess = _next_guess(low, high, count_low, count_high, wanted)
        return best

    def _schedule(self, frames: torch.Tensor, canvas: Canvas) -> ClipSchedule:
        """Builds the schedule of clips from the patches of the finest scale."""
        images = [self._render(frame)[-1] for frame in frames.unbind(1)]
        extra = canvas.is_empty.flatten(1) * self._empty_cell_error(images[0])
        patches = [self._cut_patches(image) for image in images]
        return ClipSchedule(patches, self._cut_patches(canvas.image), extra, ERROR_UNIT)

    def _cut_patches(self, image: torch.Tensor) -> torch.Tensor:
        """Cuts an image `(batch, channels, height, width)` into patches of the finest scale, `(batch, patches, values)`."""
        rows, cols = self.grid.grids[-1]
        return (
            image.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )

    def _guess_marginal_gain(self, frames: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        """Guesses the marginal gain from the changes between frames at the finest scale; `(batch,)`, in error units."""
        if frames.shape[1] == 1:
            return torch.full((len(frames),), 1e-3 / ERROR_UNIT, dtype=torch.float64, device=frames.device)
        errors, before = [], self._render(frames[:, 0])[-1]
        for t in range(1, frames.shape[1]):
            frame = self._render(frames[:, t])[-1]
            errors.append(self._squared_errors(frame, (before,)).flatten(1))
            before = frame
        changes = torch.cat(errors, dim=1)
        cells = math.prod(self.cells) // self.grid.num_patches_each_scale[-1]
        rank = (num_tokens * cells).clamp(max=changes.shape[1])
        return cells * changes.sort(dim=1, descending=True).values.gather(1, rank[:, None] - 1)[:, 0].clamp(min=1)

    def _pass(
        self, frames: torch.Tensor, min_gain: torch.Tensor, max_error: torch.Tensor | None, canvas: Canvas
    ) -> _Choices:
        """Chooses the patches of every frame that gain at least `min_gain`, `(batch,)` in error units."""
        shape = (*frames.shape[:2], self.grid.num_patches)
        all_gains = torch.full(shape, -math.inf, dtype=torch.float64, device=frames.device)
        order = torch.zeros(shape, dtype=torch.long, device=frames.device)
        for t in range(frames.shape[1]):
            images = self._render(frames[:, t].contiguous())
            errors = self._errors_on(canvas, images)
            ids, gains, totals = self._choose(errors, self._search_tables(images[-1]), self.grid.num_patches, min_gain)
            is_kept = gains >= min_gain[:, None]
            if max_error is not None:
                limit = max_error[:, t].to(errors) / ERROR_UNIT
                is_kept &= self._errors_left(canvas, images[-1], errors, ids, totals)[:, :-1] > limit[:, None]
            all_gains[:, t].scatter_(1, ids, gains.masked_fill(~is_kept, -math.inf))
            order[:, t].scatter_(1, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
            canvas = self._update_canvas(canvas, images, ids.where(is_kept, -1))
        return _Choices(all_gains, order)

    def _keep_best(self, choices: _Choices, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the `num_tokens` choices of most gain in each clip; returns ids in order of choice, and counts."""
        gains = choices.gains.flatten(1)
        ranked = gains.sort(dim=1, descending=True, stable=True).indices
        is_kept = torch.zeros_like(gains, dtype=torch.bool)
        is_first = torch.arange(gains.shape[1], device=gains.device) < num_tokens[:, None]
        is_kept.scatter_(1, ranked, is_first)
        is_kept = (is_kept & (gains > -math.inf)).view_as(choices.gains)
        counts = is_kept.sum(2)
        last = choices.order.shape[2]
        ids = choices.order.masked_fill(~is_kept, last).argsort(dim=2, stable=True)[..., : max(1, int(counts.max()))]
        return ids.where(torch.arange(ids.shape[2], device=ids.device) < counts[..., None], -1), counts

    def _choose(
        self,
        errors: torch.Tensor,
        tables: CellTables | None,
        most: int,
        min_gain: torch.Tensor | None = None,
        least: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Chooses between `least` and `most` patches of one frame, as long as some clip gains at least `min_gain`.

        Returns ids, gains and the remaining errors, each `(batch, steps)`. Where patches overlap, a patch may gain more than
        the previous one; its gain is then set to that of the previous one, so that gains decrease.
        """
        start = errors[:, 0].sum((1, 2))
        ids, totals = self._search(tables, errors, most, None, min_gain, least)
        gains = torch.cat([start[:, None], totals[:, :-1]], dim=1) - totals
        return ids, gains.cummin(1).values, totals

    def _errors_on(self, canvas: Canvas, images: Sequence[torch.Tensor], prefers_empty: bool = True) -> torch.Tensor:
        """
        Computes the errors of cells with the canvas and with each scale but the finest, `(batch, scales, *cells)`.

        With `prefers_empty`, `empty_error` is added where the canvas is empty.
        """
        errors = self._squared_errors(images[-1], (canvas.image, *images[:-1]))
        if prefers_empty:
            errors[:, 0] += canvas.is_empty * self._empty_cell_error(images[-1])
        return errors

    def _empty_cell_error(self, image: torch.Tensor) -> float:
        """Returns `empty_error` of a cell, in whole error units."""
        return round(image[0].numel() / math.prod(self.cells) * self.empty_error / ERROR_UNIT)

    def _errors_left(
        self, canvas: Canvas, image: torch.Tensor, errors: torch.Tensor, ids: torch.Tensor, totals: torch.Tensor
    ) -> torch.Tensor:
        """
        Computes the errors of a frame before the first choice and after each, `(batch, 1 + steps)`, without `empty_error`.

        `ids`, `totals` and `errors` are those of a search with `empty_error`.
        """
        totals = torch.cat([errors[:, :1].flatten(1).sum(1, keepdim=True), totals], dim=1)
        # The first step that covers each cell; the number of steps where none does.
        steps, last = ids.shape[1], self.grid.num_patches
        step_of_patch = torch.full((len(ids), last + 1), steps, device=ids.device)
        order = torch.arange(steps, device=ids.device).expand_as(ids)
        step_of_patch = step_of_patch.scatter_reduce(1, ids.where(ids >= 0, last), order, "amin")[:, :-1]
        parts = zip(self.grid.split_by_scale(step_of_patch), self.grid.grids, strict=True)
        first = torch.stack([self._spread(part, grid) for part, grid in parts]).amin(0)
        covered = totals.new_zeros(len(ids), steps + 1)
        covered.scatter_add_(1, first.flatten(1), canvas.is_empty.flatten(1).to(covered))
        num_empty = covered.flip(1).cumsum(1).flip(1)
        return totals - num_empty * self._empty_cell_error(image)

    def _spread(self, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Expands values of the patches of a scale, `(batch, rows * columns)`, to the cells that they cover."""
        rows, cols = grid
        values = values.view(-1, rows, 1, cols, 1)
        values = values.expand(-1, -1, self.cells[0] // rows, -1, self.cells[1] // cols)
        return values.reshape(len(values), *self.cells)

    def _squared_errors(self, frame: torch.Tensor, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums squared errors over cells and channels: float64 `(batch, images, *cells)`, in whole error units."""
        cell = tuple(size // count for size, count in zip(frame.shape[-2:], self.cells, strict=True))
        errors = []
        for image in images:
            squares = F.mse_loss(image, frame, reduction="none")
            if cell != (1, 1):
                squares = F.avg_pool2d(squares, cell, divisor_override=1)
            sums = squares.sum(1)
            errors.append(sums.double().div_(ERROR_UNIT).round_())
        return torch.stack(errors, dim=1)

    def _masks_of(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Returns the masks `(batch, patches)`, one per scale, of chosen patches `(batch, K)`, -1 for none."""
        last = self.grid.num_patches
        kept = torch.zeros(len(ids), last + 1, dtype=torch.bool, device=ids.device)
        return self.grid.split_by_scale(kept.scatter_(1, ids.where(ids >= 0, last), True)[:, :-1])

    def _update_canvas(self, canvas: Canvas, images: Sequence[torch.Tensor], ids: torch.Tensor) -> Canvas:
        """Pastes chosen patches, `(batch, K)` and -1 for none, over a canvas."""
        masks, is_covered = self._masks_of(ids), torch.zeros_like(canvas.is_empty)
        for mask, grid in zip(masks, self.grid.grids, strict=True):
            is_covered |= self._spread(mask, grid)
        return Canvas(self._paste(canvas.image, images, masks), canvas.is_empty & ~is_covered)

    def _paste(
        self, image: torch.Tensor, images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Pastes the patches of masks `(batch, patches)`, one per scale, over an image, coarse to fine."""
        height, width = image.shape[-2:]
        for number, (source, mask, (rows, cols)) in enumerate(zip(images, masks, self.grid.grids, strict=True)):
            mask = mask.to(image.dtype).view(-1, 1, rows, 1, cols, 1)
            mask = mask.expand(-1, -1, -1, height // rows, -1, width // cols).reshape(-1, 1, height, width)
            # With weights of 0 and 1, lerp is exact; on a CPU it is many times faster than torch.where.
            image = image.lerp_(source, mask) if number else torch.lerp(image, source, mask)
        return image

    def scale_of_patch(self, device: torch.device) -> torch.Tensor:
        """
        Returns the scale of each patch at the cells that it covers; see `cells_autogaze.scale_of_patch`.

        It is computed when needed, as it takes gigabytes for a grid of many tiles.
        """
        if self._cached_scales is None or self._cached_scales.device != device:
            self._cached_scales = compute_scale_of_patch(self.grid, self.cells).to(device)
        return self._cached_scales

    def _tables(self, values: torch.Tensor) -> CellTables:
        key = (values.device, values.dtype)
        if key not in self._cached_tables:
            self._cached_tables[key] = CellTables.build(self.grid, self.cells, values)
        return self._cached_tables[key]

    def _search_tables(self, values: torch.Tensor) -> CellTables | None:
        """Returns the tables of the search; `None` for a single scale, whose patches do not overlap."""
        return None if len(self.grid.grids) == 1 else self._tables(values)


def _next_guess(
    low: torch.Tensor, high: torch.Tensor, count_low: torch.Tensor, count_high: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Returns the logarithm of the next marginal gain to try, between a lower and an upper bound."""
    step = math.log2(_FIRST_BRACKET)
    # The interpolation is linear between logarithms of gains and counts.
    logs = [count.clamp(min=0.5).log2() for count in (count_low, count_high, wanted)]
    share = ((logs[0] - logs[2]) / (logs[0] - logs[1]).clamp(min=1e-9)).clamp(0.1, 0.9)
    between = low + (high - low) * share
    guess = torch.where(low.isinf(), high - step, torch.where(high.isinf(), low + step, between))
    # A gain below one error unit is none, so all patches are kept.
    return torch.where(guess < 0, torch.full_like(guess, -math.inf), guess)
