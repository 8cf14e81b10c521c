"""
Tables of a grid of cells, as matrices, and the greedy search for patches on the squared errors of cells.

Cells form the coarsest regular grid that has the edges of the patches of all scales. Their errors are computed in
`canvas_search_autogaze`.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cuda_graphs_autogaze import ReplayedCall
from .grid_autogaze import GazeGrid


_MAX_SEARCHES = 4  # batch sizes for which memory and graphs are kept
_STEPS_PER_CHECK = 8  # steps between two checks whether all clips are done, which synchronise with the device


class Resize(NamedTuple):
    """Matrices that resize a frame to one scale, and patches of that scale to the blocks that they cover."""

    down_rows: torch.Tensor  # (height at the scale, height)
    down_cols: torch.Tensor  # (width, width at the scale)
    up_rows: torch.Tensor  # (height of a block, patch size)
    up_cols: torch.Tensor  # (patch size, width of a block)


class CellTables(NamedTuple):
    """
    The geometry of a grid as matrices, those for resizing in the dtype of pixels and those for the search in float64.

    The search sums errors over the rows of cells, then over the columns, for all scales at once. So patches are slots of a
    table `(rows of all scales, columns of all scales)`. A slot is a patch only if its row and column have the same scale.
    """

    resizes: list[Resize]  # every scale but the finest
    gain_rows: torch.Tensor  # (rows, scales * cell rows): the cells of a patch, at its own scale and all coarser ones
    gain_cols: torch.Tensor  # (cell columns, columns)
    rows_of_slot: torch.Tensor  # (slots, scales * cell rows, 1): those of `gain_rows`
    cols_of_slot: torch.Tensor  # (slots, 1, cell columns)
    slot_mask: torch.Tensor  # (rows, columns): 0 for patches, -inf for slots that are no patch
    id_of_slot: torch.Tensor  # (slots,)

    @classmethod
    def build(cls, grid: GazeGrid, cells: tuple[int, int], pixels: torch.Tensor) -> "CellTables":
        """Builds the tables for the dtype and device of `pixels`."""
        (height, width), patch = grid.sizes[-1], grid.patch_size
        resizes = []
        for (h, w), (rows, cols) in zip(grid.sizes[:-1], grid.grids[:-1], strict=True):
            down_rows, down_cols = _resize_matrix(height, h, antialias=True), _resize_matrix(width, w, antialias=True)
            up_rows, up_cols = _resize_matrix(patch, height // rows), _resize_matrix(patch, width // cols)
            resizes.append(Resize(*(m.contiguous().to(pixels) for m in (down_rows, down_cols.T, up_rows, up_cols.T))))

        scales = torch.arange(len(grid.grids))
        num_rows, num_cols = zip(*grid.grids, strict=True)
        row_parts = torch.cat([_parts(count, cells[0]) for count in num_rows])
        col_parts = torch.cat([_parts(count, cells[1]) for count in num_cols])
        row_scale = scales.repeat_interleave(torch.tensor(num_rows))
        col_scale = scales.repeat_interleave(torch.tensor(num_cols))
        gain_rows = ((scales <= row_scale[:, None])[:, :, None] * row_parts[:, None]).flatten(1)
        is_patch = row_scale[:, None] == col_scale
        search = (
            gain_rows,
            col_parts.T.contiguous(),
            gain_rows.repeat_interleave(len(col_parts), dim=0)[:, :, None],
            col_parts.repeat(len(row_parts), 1)[:, None],
            torch.zeros(is_patch.shape, dtype=torch.float64).masked_fill(~is_patch, -math.inf),
            is_patch.flatten().cumsum(0) - 1,
        )
        return cls(resizes, *(table.to(pixels.device) for table in search))


class _SearchState:
    """
    The state of a search, which changes with every choice.

    Args:
        tables (`CellTables`): tables of the grid.
        drops (`torch.DoubleTensor` of shape `(batch, scales * cell rows, cell columns)`): as `_error_drops` returns them.
    """

    def __init__(self, tables: CellTables, drops: torch.Tensor):
        self.tables, self.drops = tables, drops
        self.gain_rows, self.gain_cols = (
            table.expand(len(drops), -1, -1) for table in (tables.gain_rows, tables.gain_cols)
        )
        self.mask = tables.slot_mask.repeat(len(drops), 1, 1)

    def gains(self) -> torch.Tensor:
        """Computes the decrease of error by each slot, `(batch, slots)`; -inf for slots that cannot be chosen."""
        return torch.baddbmm(self.mask, torch.bmm(self.gain_rows, self.drops), self.gain_cols).flatten(1)

    def choose(self, slot: torch.Tensor) -> None:
        """Adds the patches of slots `(batch,)`; one that was chosen before changes nothing."""
        self.mask.view(len(slot), -1).scatter_(1, slot[:, None], -math.inf)
        tables = self.tables
        covered = tables.rows_of_slot.index_select(0, slot) * tables.cols_of_slot.index_select(0, slot)
        self.drops.addcmul_(self.drops, covered, value=-1)


def choose_patches(
    tables: CellTables,
    errors: torch.Tensor,
    budget: int,
    limit: torch.Tensor | None,
    is_kept: torch.Tensor | None = None,
    min_gain: torch.Tensor | None = None,
    least: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Chooses the patches of one frame greedily.

    Args:
        tables (`CellTables`): tables of the grid.
        errors (`torch.DoubleTensor` of shape `(batch, scales, *cells)`):
            Squared error of every cell before the first choice, and with each scale but the finest, whose error is 0.
        budget (`int`): maximum number of patches.
        limit (`torch.DoubleTensor` of shape `(batch,)`, *optional*): squared error of the frame at which a clip is done.
        is_kept (`torch.BoolTensor` of shape `(batch, patches)`, *optional*): patches that must not be chosen.
        min_gain (`torch.DoubleTensor` of shape `(batch,)`, *optional*):
            The search ends after a choice that decreases the error of every clip by less than this.
        least (`int`, *optional*, defaults to 1): minimum number of patches before that.

    Returns:
        `tuple` of ids and of squared errors of the frame after each, both of shape `(batch, steps)`. A clip that is done
        before others repeats its last choice, which changes nothing.
    """
    state = _SearchState(tables, _error_drops(errors))
    if is_kept is not None:
        is_patch = tables.slot_mask.flatten() == 0  # patches are in the order of their ids
        state.mask.view(len(errors), -1)[:, is_patch] = state.mask.new_zeros(is_kept.shape).masked_fill_(
            is_kept, -math.inf
        )
    slots: list[torch.Tensor] = []
    totals, total = [], state.drops.sum((1, 2))
    for _ in range(budget):
        gain, slot = state.gains().max(-1)
        if limit is not None and slots:
            is_done = total <= limit
            slot, gain = torch.where(is_done, slots[-1], slot), gain.masked_fill(is_done, 0)
        state.choose(slot)
        total = total - gain  # exact, as all are whole numbers
        slots.append(slot)
        totals.append(total)
        if limit is not None and (total <= limit).all():
            break
        if min_gain is not None and len(slots) >= least and (gain < min_gain).all():
            break
    return tables.id_of_slot[torch.stack(slots, dim=1)], torch.stack(totals, dim=1)


def rank_patches(errors: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Chooses the patches of one frame of a single scale, where patches do not overlap, so that sorting replaces the search.

    Args:
        errors (`torch.DoubleTensor` of shape `(batch, 1, *cells)`): squared error of every patch before the first choice.
        budget (`int`): number of patches.

    Returns:
        `tuple` of ids and of squared errors of the frame after each, both of shape `(batch, budget)`.
    """
    gains, ids = errors.flatten(1).sort(dim=1, descending=True, stable=True)
    # The difference is exact, as all are whole numbers.
    totals = gains.sum(1, keepdim=True) - gains[:, :budget].cumsum(1)
    return ids[:, :budget], totals


def _error_drops(errors: torch.Tensor) -> torch.Tensor:
    """
    Computes how much the error of a cell decreases from each scale to the next finer one.

    The sum over all scales is the error of the cell, the sum up to a patch's scale is its gain, and adding the patch sets
    just these summands to zero. Returns `(batch, scales * cell rows, cell columns)`.
    """
    drops = errors.clone()
    drops[:, :-1] -= errors[:, 1:]
    return drops.flatten(1, 2)


class ReplayedSearch:
    """
    The same search as [`choose_patches`], in steps on memory at fixed addresses that CUDA replays as a graph.

    Args:
        tables (`CellTables`): tables of the grid.
        batch (`int`): number of frames that are searched together.
    """

    def __init__(self, tables: CellTables, batch: int):
        rows = tables.gain_rows
        self.state = _SearchState(tables, rows.new_zeros(batch, rows.shape[1], tables.cols_of_slot.shape[2]))
        num_patches = int((tables.slot_mask == 0).sum())
        self.slots = tables.id_of_slot.new_zeros(batch, num_patches)
        self.totals = rows.new_zeros(batch, num_patches)
        self.slot, self.total, self.limit = self.slots[:, 0].clone(), self.totals[:, 0].clone(), rows.new_zeros(batch)
        self.number = torch.zeros(1, dtype=torch.long, device=rows.device)
        self.step = ReplayedCall(self._step, rows.device)

    def __call__(
        self,
        errors: torch.Tensor,
        budget: int,
        limit: torch.Tensor | None,
        min_gain: torch.Tensor | None = None,
        least: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the same as [`choose_patches`], with up to some steps more after all clips are done."""
        tables = self.state.tables
        self.state.drops.copy_(_error_drops(errors))
        self.state.mask.copy_(tables.slot_mask)
        # A comparison with NaN is false, so no clip is done before the first step.
        self.total.fill_(math.nan)
        self.limit.copy_(torch.full_like(self.limit, -math.inf) if limit is None else limit)
        self.number.zero_()
        for done in range(1, budget + 1):
            self.step()
            if done % _STEPS_PER_CHECK:
                continue
            if limit is not None and bool((self.total <= self.limit).all()):
                break
            if min_gain is not None and done > least:
                if bool((self.totals[:, done - 2] - self.total < min_gain).all()):
                    break
        return tables.id_of_slot[self.slots[:, :done]], self.totals[:, :done].clone()

    def _step(self) -> None:
        slot = torch.where(self.total <= self.limit, self.slot, self.state.gains().argmax(-1))
        self.state.choose(slot)
        self.slot.copy_(slot)
        self.total.copy_(self.state.drops.sum((1, 2)))
        self.slots.index_copy_(1, self.number, self.slot[:, None])
        self.totals.index_copy_(1, self.number, self.total[:, None])
        self.number.add_(1)


class PatchSearch:
    """Chooses the patches of a frame, on CUDA with a [`ReplayedSearch`] for each of the latest batch sizes."""

    def __init__(self):
        self.replayed: dict[tuple[torch.device, torch.Size], ReplayedSearch] = {}

    def __getstate__(self) -> dict:
        # CUDA graphs can be neither copied nor pickled; they are captured again when needed.
        return {"replayed": {}}

    def __call__(
        self,
        tables: CellTables | None,
        errors: torch.Tensor,
        budget: int,
        limit: torch.Tensor | None,
        min_gain: torch.Tensor | None = None,
        least: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the same as [`choose_patches`], or as [`rank_patches`] without tables."""
        if tables is None:
            return rank_patches(errors, budget)
        if not self._replays_steps(errors.device):
            return choose_patches(tables, errors, budget, limit, min_gain=min_gain, least=least)
        key = (errors.device, errors.shape)
        search = self.replayed.pop(key, None) or ReplayedSearch(tables, len(errors))
        self.replayed[key] = search  # the latest comes last
        for oldest in list(self.replayed)[:-_MAX_SEARCHES]:
            del self.replayed[oldest]
        return search(errors, budget, limit, min_gain, least)

    @staticmethod
    def _replays_steps(device: torch.device) -> bool:
        return device.type == "cuda"


def scale_of_patch(grid: GazeGrid, cells: tuple[int, int]) -> torch.Tensor:
    """
    Returns the scale of each patch at the cells that it covers.

    Args:
        grid (`GazeGrid`): the patches.
        cells (`tuple[int, int]`): rows and columns of cells.

    Returns:
        `torch.LongTensor` of shape `(patches + 1, cells)`: 1 + the index of the patch's scale where it covers a cell, else
        0. The last entry, for padding, is 0 everywhere.
    """
    covered = [torch.kron(_parts(rows, cells[0]), _parts(cols, cells[1])) for rows, cols in grid.grids]
    scales = torch.cat([number * cover.long() for number, cover in enumerate(covered, start=1)])
    return F.pad(scales, (0, 0, 0, 1))


def _resize_matrix(old: int, new: int, antialias: bool = False) -> torch.Tensor:
    """Returns the weights `(new, old)` of torch's bicubic resize along one axis."""
    identity = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(new, old), mode="bicubic", align_corners=False, antialias=antialias)[0, 0]


def _parts(count: int, size: int) -> torch.Tensor:
    """Divides `size` cells into equal parts: float64 `(count, size)`, 1 where a part covers a cell."""
    return torch.eye(count, dtype=torch.float64).repeat_interleave(size // count, dim=1)
