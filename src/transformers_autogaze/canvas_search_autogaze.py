"""
The search on a canvas: which patches bring what was kept so far nearest to each frame, under any kind of budget.

A canvas is the picture that kept patches make when each is laid over what stood there before. This module owns the
canvas, the squared errors that it leaves, and choosing by them frame by frame, for a whole clip and along a stream. What
is compared, pixels or features, is a subclass's matter; the geometry of patches is that of `cells_autogaze`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cells_autogaze import CellTables, PatchSearch
from .cells_autogaze import layer_of_patch as find_layers
from .clip_schedule_autogaze import ClipSchedule
from .grid_autogaze import GazeGrid
from .token_budgets_autogaze import RateControl


# The search counts squared errors in whole multiples of this. Sums over up to 2**25 values of 0..1 are then exact in
# float64 in whatever order they are taken, so equal gains are equal to the last bit and no batch can sway a choice.
ERROR_UNIT = 2.0**-28
_SPARE = 0.02  # tokens too many that a search over a whole clip may find, before the least of them are left out
_MAX_PASSES = 16  # over a clip, to find its marginal gain
_FIRST_BRACKET = 8.0  # factor between two marginal gains before one was found too low and one too high


class Canvas(NamedTuple):
    """
    What kept patches show.

    Args:
        image (`torch.FloatTensor` of shape `(batch, channels, height, width)`): values, such as pixels in 0..1.
        is_empty (`torch.BoolTensor` of shape `(batch, *cells)`): true where nothing was ever kept.
    """

    image: torch.Tensor
    is_empty: torch.Tensor


class CanvasSearchOutput(NamedTuple):
    """
    What a search under a budget over time found; `K` is the largest count of a frame.

    Args:
        ids (`torch.LongTensor` of shape `(batch, frames, K)`):
            Patches in the order of choice, counted from the first patch of their frame; -1 after the last.
        counts (`torch.LongTensor` of shape `(batch, frames)`): number of chosen patches.
        canvas ([`Canvas`]): after the last frame, to go on with the frames that follow.
    """

    ids: torch.LongTensor
    counts: torch.LongTensor
    canvas: Canvas


class FrameSearchOutput(NamedTuple):
    """
    What a search under a budget for every frame found; `K` is the largest budget.

    Args:
        ids, counts, canvas: as in [`CanvasSearchOutput`].
        errors (`torch.DoubleTensor` of shape `(batch, frames, K)`):
            Squared error of the frame after each choice, summed over all values; after the last it stays what it was.
    """

    ids: torch.LongTensor
    errors: torch.Tensor
    counts: torch.LongTensor
    canvas: Canvas


class _Choices(NamedTuple):
    """What a pass over clips chose, patch by patch: `(batch, frames, patches)`."""

    gains: torch.Tensor  # falling in the order of choice; `-inf` where a patch was not chosen
    order: torch.Tensor  # of choice inside the frame

    def count(self) -> torch.Tensor:
        """Counts the chosen patches of each clip, `(batch,)`."""
        return (self.gains > -math.inf).sum((1, 2))


class CanvasSearch:
    """
    Chooses the patches that bring a canvas nearest to each frame; the base of every search on squared errors.

    A subclass says how a frame looks at every scale, in `_render`, and how a canvas starts, in `start_canvas`.

    The edges of the blocks of all scales lie on one regular grid of cells, whose number per axis is the least common
    multiple of the patches there. A patch is a union of cells, so the search adds up cells and never touches values.

    Args:
        grid (`GazeGrid`): scales and patches.
    """

    empty_error = 1.0
    """
    Squared error per value that a place counts with, beside that of the canvas, on which nothing was ever kept, where
    budgets over time are spent; no error is larger. Frames that are held to a budget or an error of their own do without.
    """

    def __init__(self, grid: GazeGrid):
        self.grid = grid
        self.cells: tuple[int, int] = tuple(math.lcm(*patches) for patches in zip(*grid.grids, strict=True))
        """Rows and columns of cells."""
        self._cached_tables: dict[tuple[torch.device, torch.dtype], CellTables] = {}
        self._cached_layers: torch.Tensor | None = None
        self._search = PatchSearch()

    def start_canvas(self, frames: torch.Tensor) -> Canvas:
        """Gives the canvas on which nothing was kept yet, for clips `(batch, frames, ..)`."""
        raise NotImplementedError

    def _render(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """Draws a frame `(batch, ..)` from all patches of each scale: `(batch, channels, height, width)`, coarse to fine."""
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
        Chooses patches of every frame greedily: next is always the one that lowers the error of its frame most.

        Equal gains go to the lowest id. With a budget to use up, the search goes on when nothing helps any more.

        Args:
            frames, canvas: as in [`~CanvasSearch.search_clip`].
            budgets (`Sequence[int]` or `torch.LongTensor` of shape `(frames,)`): patches to choose in each frame.
            max_error (`torch.DoubleTensor` of shape `(batch, frames)`, *optional*):
                A frame is done as soon as one patch is chosen and its squared error, summed over all values, is at most
                this. If not given, every frame uses up its budget.

        Returns:
            [`FrameSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        budgets = torch.as_tensor(budgets).tolist()
        shape = (*frames.shape[:2], max(1, *budgets))
        ids = torch.full(shape, -1, device=frames.device)
        errors_left = torch.zeros(shape, dtype=torch.float64, device=frames.device)
        counts = torch.tensor(budgets, device=frames.device).repeat(len(frames), 1)
        # Many small operations, a tenth quicker without autograd's notes. What leaves must be free of the mode.
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            for t, budget in enumerate(budgets):
                layers = self._render(frames[:, t].contiguous())
                errors = self._errors_on(canvas, layers, prefers_empty=False)
                limit = None if max_error is None else max_error[:, t].to(errors) / ERROR_UNIT
                chosen, totals = self._search(self._search_tables(layers[-1]), errors, max(1, budget), limit)
                steps = chosen.shape[1]
                if limit is not None:
                    counts[:, t] = ((totals > limit[:, None]).sum(1) + 1).clamp(max=min(steps, budget))
                step = torch.arange(steps, device=frames.device)
                chosen = chosen.where(step < counts[:, t, None], -1)
                ids[:, t, :steps] = chosen
                # After its last choice a clip's error stays what it was.
                totals = totals.gather(1, torch.minimum(step, (counts[:, t, None] - 1).clamp(min=0)))
                errors_left[:, t] = F.pad(totals, (0, shape[2] - steps), mode="replicate") * ERROR_UNIT
                canvas = self._lay_chosen(canvas, layers, chosen)
        return FrameSearchOutput(ids, errors_left, counts, Canvas(*(part.clone() for part in canvas)))

    @torch.no_grad()
    def search_clip(
        self,
        frames: torch.Tensor,
        num_tokens: torch.Tensor,
        max_error: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> CanvasSearchOutput:
        """
        Spends the tokens of whole clips where they gain most.

        One marginal gain holds for a clip. With a single scale, a place is kept when the error that this takes away, from
        its frame and those that follow until it is kept again, is at least that much, as a [`ClipSchedule`] has it. With
        several scales, or a threshold, every frame keeps, one by one, the patch that gains most in it, as long as each gains at
        least that much. Passes over the clip find the marginal gain that the tokens buy; the few patches that the last pass
        chose too many, those of least gain, are left out.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, ..)`): clips as `_render` takes them.
            num_tokens (`torch.LongTensor` of shape `(batch,)`): patches to choose of each clip.
            max_error (`torch.DoubleTensor` of shape `(batch, frames)`, *optional*):
                A frame is done when its squared error, summed over all values, is at most this; then a clip may keep fewer.
            canvas ([`Canvas`], *optional*): what was kept before the first frame.

        Returns:
            [`CanvasSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            choices = self._choose_of_clip(frames, num_tokens.to(frames.device), max_error, canvas)
            ids, counts = self._keep_best(choices, num_tokens.to(frames.device))
            for t, chosen in enumerate(ids.unbind(1)):
                canvas = self._lay_chosen(canvas, self._render(frames[:, t].contiguous()), chosen)
        return CanvasSearchOutput(ids.clone(), counts.clone(), Canvas(*(part.clone() for part in canvas)))

    @torch.no_grad()
    def search_stream(
        self,
        frames: torch.Tensor,
        control: RateControl,
        max_error: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> CanvasSearchOutput:
        """
        Spends the tokens of a stream where they gain most, frame by frame, without knowing what follows.

        Args:
            frames, max_error, canvas: as in [`~CanvasSearch.search_clip`].
            control ([`RateControl`]): the account of the streams; it is carried on.

        Returns:
            [`CanvasSearchOutput`]
        """
        canvas = self.start_canvas(frames) if canvas is None else canvas
        chosen_ids, counts = [], []
        with torch.autocast(frames.device.type, enabled=False), torch.inference_mode():
            for t in range(frames.shape[1]):
                layers = self._render(frames[:, t].contiguous())
                errors = self._errors_on(canvas, layers)
                least, most, foreseen = control.limits()
                needed = int(torch.maximum(least, foreseen).max()) + int(canvas.is_empty.sum((1, 2)).max())
                limit = None if max_error is None else max_error[:, t].to(errors) / ERROR_UNIT
                gain = control.log_gain.exp2()
                most = max(1, min(self.grid.num_patches, int(most.max())))
                ids, gains, totals = self._choose(errors, self._search_tables(layers[-1]), most, gain, needed)
                num_needed = (gains >= self._empty_cell_error(layers[-1])).sum(1)
                count = control.count(gains, num_needed)
                if limit is not None:
                    done = self._errors_left(canvas, layers[-1], errors, ids, totals) <= limit[:, None]
                    count = torch.where(done.any(1), torch.minimum(count, done.int().argmax(1)), count)
                control.book(count)
                chosen = ids.where(torch.arange(ids.shape[1], device=ids.device) < count[:, None], -1)
                canvas = self._lay_chosen(canvas, layers, chosen)
                chosen_ids.append(chosen)
                counts.append(count)
        counts = torch.stack(counts, dim=1)
        longest = max(1, int(counts.max()))
        ids = torch.stack(
            [F.pad(ids, (0, max(0, longest - ids.shape[1])), value=-1)[:, :longest] for ids in chosen_ids], 1
        )
        return CanvasSearchOutput(ids.clone(), counts.clone(), Canvas(*(part.clone() for part in canvas)))

    def _choose_of_clip(
        self, frames: torch.Tensor, num_tokens: torch.Tensor, max_error: torch.Tensor | None, canvas: Canvas
    ) -> _Choices:
        """Finds for each clip the marginal gain at which it chooses `num_tokens` patches or a few more."""
        best = None
        low, high = (torch.full((len(frames),), bound, dtype=torch.float64) for bound in (-math.inf, math.inf))
        count_low, count_high, is_done = torch.zeros_like(low), torch.zeros_like(low), low > 0
        wanted = num_tokens.double().cpu()
        guess = self._guess_marginal_gain(frames, num_tokens).log2().cpu()
        is_scheduled = len(self.grid.grids) == 1 and max_error is None
        schedule = self._schedule(frames, canvas) if is_scheduled else None
        for number in range(_MAX_PASSES + 1):
            if number == _MAX_PASSES:
                guess = low  # of a clip in which too little changes, all patches
            min_gain = guess.exp2().to(frames.device)
            if schedule is None:
                choices = self._pass(frames, min_gain, max_error, canvas)
            else:
                gains = schedule.gains(min_gain)
                choices = _Choices(gains, gains.argsort(dim=2, descending=True, stable=True).argsort(dim=2))
            count = choices.count().double().cpu()
            enough = (count >= wanted) | (number == _MAX_PASSES)
            # A clip that is done stays as it is, whatever others of its batch still need.
            better = enough & (guess >= low) & ~is_done
            if best is None:
                best = choices
            else:
                taken = better.to(frames.device)[:, None, None]
                best = _Choices(*(torch.where(taken, new, old) for new, old in zip(choices, best, strict=True)))
            low, count_low = torch.where(better, guess, low), torch.where(better, count, count_low)
            high, count_high = torch.where(enough, high, guess), torch.where(enough, count_high, count)
            is_done = (count_low >= wanted) & (count_low <= wanted * (1 + _SPARE) + 1)
            if bool(is_done.all()):
                break
            guess = _next_guess(low, high, count_low, count_high, wanted)
        return best

    def _schedule(self, frames: torch.Tensor, canvas: Canvas) -> ClipSchedule:
        """Compares what all frames show at each place, at the finest scale."""
        layers = [self._render(frame)[-1] for frame in frames.unbind(1)]
        extra = canvas.is_empty.flatten(1) * self._empty_cell_error(layers[0])
        return ClipSchedule([self._places(layer) for layer in layers], self._places(canvas.image), extra, ERROR_UNIT)

    def _places(self, image: torch.Tensor) -> torch.Tensor:
        """Cuts an image `(batch, channels, height, width)` into the places of the finest scale: `(batch, places, values)`."""
        rows, cols = self.grid.grids[-1]
        return (
            image.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )

    def _guess_marginal_gain(self, frames: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        """Guesses from what changes between neighbouring frames, at the finest scale; `(batch,)`, in error units."""
        if frames.shape[1] == 1:
            return torch.full((len(frames),), 1e-3 / ERROR_UNIT, dtype=torch.float64, device=frames.device)
        changes, before = [], self._render(frames[:, 0])[-1]
        for t in range(1, frames.shape[1]):
            frame = self._render(frames[:, t])[-1]
            changes.append(self._errors_of_layers(frame, (before,)).flatten(1))
            before = frame
        changes = torch.cat(changes, dim=1)
        cells = math.prod(self.cells) // self.grid.num_patches_each_scale[-1]
        rank = (num_tokens * cells).clamp(max=changes.shape[1])
        return cells * changes.sort(dim=1, descending=True).values.gather(1, rank[:, None] - 1)[:, 0].clamp(min=1)

    def _pass(
        self, frames: torch.Tensor, min_gain: torch.Tensor, max_error: torch.Tensor | None, canvas: Canvas
    ) -> _Choices:
        """Lets every frame keep what gains at least `min_gain`, `(batch,)` in error units."""
        shape = (*frames.shape[:2], self.grid.num_patches)
        all_gains = torch.full(shape, -math.inf, dtype=torch.float64, device=frames.device)
        order = torch.zeros(shape, dtype=torch.long, device=frames.device)
        for t in range(frames.shape[1]):
            layers = self._render(frames[:, t].contiguous())
            errors = self._errors_on(canvas, layers)
            ids, gains, totals = self._choose(errors, self._search_tables(layers[-1]), self.grid.num_patches, min_gain)
            is_kept = gains >= min_gain[:, None]
            if max_error is not None:
                limit = max_error[:, t].to(errors) / ERROR_UNIT
                is_kept &= self._errors_left(canvas, layers[-1], errors, ids, totals)[:, :-1] > limit[:, None]
            all_gains[:, t].scatter_(1, ids, gains.masked_fill(~is_kept, -math.inf))
            order[:, t].scatter_(1, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
            canvas = self._lay_chosen(canvas, layers, ids.where(is_kept, -1))
        return _Choices(all_gains, order)

    def _keep_best(self, choices: _Choices, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps of what each clip chose the `num_tokens` of most gain; gives ids in order of choice, and counts."""
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
        Chooses patches of one frame, best first; at most `most`, at least `least`, and then as long as some clip gains.

        Gives ids, gains and what error is left, each `(batch, steps)`. Where patches overlap, one may gain more than the
        one before; it counts with the lesser gain, so that gains fall.
        """
        start = errors[:, 0].sum((1, 2))
        ids, totals = self._search(tables, errors, most, None, min_gain, least)
        gains = torch.cat([start[:, None], totals[:, :-1]], dim=1) - totals
        return ids, gains.cummin(1).values, totals

    def _errors_on(self, canvas: Canvas, layers: Sequence[torch.Tensor], prefers_empty: bool = True) -> torch.Tensor:
        """
        Gives the errors of cells with the canvas and with each scale but the finest, `(batch, scales, *cells)`; empty places
        count with `empty_error` as well if they are to be preferred.
        """
        errors = self._errors_of_layers(layers[-1], (canvas.image, *layers[:-1]))
        if prefers_empty:
            errors[:, 0] += canvas.is_empty * self._empty_cell_error(layers[-1])
        return errors

    def _empty_cell_error(self, layer: torch.Tensor) -> float:
        """What `empty_error` is for a cell, in whole error units."""
        return round(layer[0].numel() / math.prod(self.cells) * self.empty_error / ERROR_UNIT)

    def _errors_left(
        self, canvas: Canvas, layer: torch.Tensor, errors: torch.Tensor, ids: torch.Tensor, totals: torch.Tensor
    ) -> torch.Tensor:
        """
        Tells what error a frame has before any choice and after each, `(batch, 1 + steps)`, without `empty_error`; `ids`,
        `totals` and `errors` are those of a search that counted with it.
        """
        totals = torch.cat([errors[:, :1].flatten(1).sum(1, keepdim=True), totals], dim=1)
        # The step that covers a cell first; one more than there are where none does.
        steps, last = ids.shape[1], self.grid.num_patches
        step_of_patch = torch.full((len(ids), last + 1), steps, device=ids.device)
        order = torch.arange(steps, device=ids.device).expand_as(ids)
        step_of_patch = step_of_patch.scatter_reduce(1, ids.where(ids >= 0, last), order, "amin")[:, :-1]
        parts = zip(self.grid.split_by_scale(step_of_patch), self.grid.grids, strict=True)
        first = torch.stack([self._spread(part, grid) for part, grid in parts]).amin(0)
        covered = totals.new_zeros(len(ids), steps + 1)
        covered.scatter_add_(1, first.flatten(1), canvas.is_empty.flatten(1).to(covered))
        num_empty = covered.flip(1).cumsum(1).flip(1)
        return totals - num_empty * self._empty_cell_error(layer)

    def _spread(self, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Spreads what the patches of a scale have, `(batch, rows * columns)`, over the cells that they cover."""
        rows, cols = grid
        values = values.view(-1, rows, 1, cols, 1)
        values = values.expand(-1, -1, self.cells[0] // rows, -1, self.cells[1] // cols)
        return values.reshape(len(values), *self.cells)

    def _errors_of_layers(self, frame: torch.Tensor, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums squared errors over cells and channels: float64 `(batch, layers, *cells)`, whole multiples of the unit."""
        cell = tuple(size // count for size, count in zip(frame.shape[-2:], self.cells, strict=True))
        errors = []
        for layer in layers:
            squares = F.mse_loss(layer, frame, reduction="none")
            if cell != (1, 1):
                squares = F.avg_pool2d(squares, cell, divisor_override=1)
            sums = squares.sum(1)
            errors.append(sums.double().div_(ERROR_UNIT).round_())
        return torch.stack(errors, dim=1)

    def _masks_of(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Gives the masks `(batch, patches)`, one per scale, of chosen patches `(batch, K)`, -1 for none."""
        last = self.grid.num_patches
        kept = torch.zeros(len(ids), last + 1, dtype=torch.bool, device=ids.device)
        return self.grid.split_by_scale(kept.scatter_(1, ids.where(ids >= 0, last), True)[:, :-1])

    def _lay_chosen(self, canvas: Canvas, layers: Sequence[torch.Tensor], ids: torch.Tensor) -> Canvas:
        """Lays chosen patches, `(batch, K)` and -1 for none, over a canvas."""
        masks, is_covered = self._masks_of(ids), torch.zeros_like(canvas.is_empty)
        for mask, grid in zip(masks, self.grid.grids, strict=True):
            is_covered |= self._spread(mask, grid)
        return Canvas(self._lay(canvas.image, layers, masks), canvas.is_empty & ~is_covered)

    def _lay(self, image: torch.Tensor, layers: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Lays the patches that masks `(batch, patches)` mark, one per scale, over an image, coarse to fine."""
        height, width = image.shape[-2:]
        for number, (layer, mask, (rows, cols)) in enumerate(zip(layers, masks, self.grid.grids, strict=True)):
            mask = mask.to(image.dtype).view(-1, 1, rows, 1, cols, 1)
            mask = mask.expand(-1, -1, -1, height // rows, -1, width // cols).reshape(-1, 1, height, width)
            # With weights of 0 and 1, lerp is an exact choice; on a CPU it is many times faster than torch.where.
            image = image.lerp_(layer, mask) if number else torch.lerp(image, layer, mask)
        return image

    def layers_of_patches(self, device: torch.device) -> torch.Tensor:
        """Tells which cells patches cover; see [`layer_of_patch`]. Made when asked for: of many tiles it takes gigabytes."""
        if self._cached_layers is None or self._cached_layers.device != device:
            self._cached_layers = find_layers(self.grid, self.cells).to(device)
        return self._cached_layers

    def _tables(self, values: torch.Tensor) -> CellTables:
        key = (values.device, values.dtype)
        if key not in self._cached_tables:
            self._cached_tables[key] = CellTables.build(self.grid, self.cells, values)
        return self._cached_tables[key]

    def _search_tables(self, values: torch.Tensor) -> CellTables | None:
        """Gives the tables that choosing needs; of a single scale none, as its patches do not overlap."""
        return None if len(self.grid.grids) == 1 else self._tables(values)


def _next_guess(
    low: torch.Tensor, high: torch.Tensor, count_low: torch.Tensor, count_high: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Gives the next logarithm of a marginal gain to try, between one that is too low and one that is too high."""
    step = math.log2(_FIRST_BRACKET)
    # Between the two, counts are taken for a power of the gain.
    logs = [count.clamp(min=0.5).log2() for count in (count_low, count_high, wanted)]
    share = ((logs[0] - logs[2]) / (logs[0] - logs[1]).clamp(min=1e-9)).clamp(0.1, 0.9)
    between = low + (high - low) * share
    guess = torch.where(low.isinf(), high - step, torch.where(high.isinf(), low + step, between))
    # No error is less than one unit, so below it lie all patches.
    return torch.where(guess < 0, torch.full_like(guess, -math.inf), guess)
