"""
The closed form's geometry as matrices: how frames are resized to scales, which cells a patch covers, and the search on them.

This module owns tables that follow from a grid alone, and choosing patches by the errors of cells; how errors come about
is `composite_autogaze`'s matter.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cuda_graphs_autogaze import ReplayedCall
from .grid_autogaze import GazeGrid


_MAX_SEARCHES = 4  # sizes of a batch whose memory and graphs are kept
_UNCHECKED_STEPS = 8  # between two looks at whether all clips are done, each of which waits for the device


class Resize(NamedTuple):
    """Matrices that resize a frame to one scale, and the patches there to the blocks they cover."""

    down_rows: torch.Tensor  # (height at the scale, height)
    down_cols: torch.Tensor  # (width, width at the scale)
    up_rows: torch.Tensor  # (height of a block, patch size)
    up_cols: torch.Tensor  # (patch size, width of a block)


class CellTables(NamedTuple):
    """
    The geometry of a grid as matrices: resizing in the pixels' dtype, the search in float64.

    The search sums over the rows of cells, then the columns, of the patches of all scales alike. So it keeps patches in
    slots `(rows of all scales, columns of all scales)`, of which only those whose row and column share a scale exist.
    """

    resizes: list[Resize]  # every scale but the finest
    gain_rows: torch.Tensor  # (rows, scales * cell rows): the cells of a patch, at its own scale and all coarser ones
    gain_cols: torch.Tensor  # (cell columns, columns)
    rows_of_slot: torch.Tensor  # (slots, scales * cell rows, 1): those of `gain_rows`
    cols_of_slot: torch.Tensor  # (slots, 1, cell columns)
    closed: torch.Tensor  # (rows, columns): 0 for patches, -inf where there is none
    id_of_slot: torch.Tensor  # (slots,)

    @classmethod
    def build(cls, grid: GazeGrid, cells: tuple[int, int], pixels: torch.Tensor) -> "CellTables":
        """Makes the tables for pixels of some dtype and device."""
        (height, width), patch = grid.sizes[-1], grid.patch_size
        resizes = []
        for (h, w), (rows, cols) in zip(grid.sizes[:-1], grid.grids[:-1], strict=True):
            down_rows, down_cols = _resize_matrix(height, h, antialias=True), _resize_matrix(width, w, antialias=True)
            up_rows, up_cols = _resize_matrix(patch, height // rows), _resize_matrix(patch, width // cols)
            resizes.append(Resize(*(m.contiguous().to(pixels) for m in (down_rows, down_cols.T, up_rows, up_cols.T))))

        scales = torch.arange(len(grid.grids))
        num_rows, num_cols = zip(*grid.grids, strict=True)
        rows = torch.cat([_parts(count, cells[0]) for count in num_rows])
        cols = torch.cat([_parts(count, cells[1]) for count in num_cols])
        row_scale = scales.repeat_interleave(torch.tensor(num_rows))
        col_scale = scales.repeat_interleave(torch.tensor(num_cols))
        gain_rows = ((scales <= row_scale[:, None])[:, :, None] * rows[:, None]).flatten(1)
        is_patch = row_scale[:, None] == col_scale
        search = (
            gain_rows,
            cols.T.contiguous(),
            gain_rows.repeat_interleave(len(cols), dim=0)[:, :, None],
            cols.repeat(len(rows), 1)[:, None],
            torch.zeros(is_patch.shape, dtype=torch.float64).masked_fill(~is_patch, -math.inf),
            is_patch.flatten().cumsum(0) - 1,
        )
        return cls(resizes, *(table.to(pixels.device) for table in search))


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
    Chooses the patches of one frame.

    Args:
        tables (`CellTables`): of the grid.
        errors (`torch.DoubleTensor` of shape `(batch, scales, *cells)`):
            Squared error of every cell as it is and with each scale but the finest, which leaves none, laid there.
        budget (`int`): patches to choose.
        limit (`torch.DoubleTensor` of shape `(batch,)`, *optional*): squared error of the frame at which a clip is done.
        is_kept (`torch.BoolTensor` of shape `(batch, patches)`, *optional*): patches that are not to be chosen.
        min_gain (`torch.DoubleTensor` of shape `(batch,)`, *optional*):
            Choosing ends after a choice by which no clip gained as much.
        least (`int`, *optional*, defaults to 1): patches to choose before that.

    Returns:
        `tuple` of ids and of squared errors of the frame after each, both of shape `(batch, steps)`. A clip that is done
        before others repeats its last choice, which changes nothing.
    """
    batch, drops = len(errors), _drops(errors)
    gain_rows, gain_cols = tables.gain_rows.expand(batch, -1, -1), tables.gain_cols.expand(batch, -1, -1)
    closed = tables.closed.repeat(batch, 1, 1)
    if is_kept is not None:
        is_patch = tables.closed.flatten() == 0  # patches lie in the order of their ids
        closed.view(batch, -1)[:, is_patch] = closed.new_zeros(is_kept.shape).masked_fill_(is_kept, -math.inf)
    slots, totals, total = [], [], drops.sum((1, 2))
    for _ in range(budget):
        gains = torch.baddbmm(closed, torch.bmm(gain_rows, drops), gain_cols)
        gain, slot = gains.flatten(1).max(-1)
        if limit is not None and slots:
            is_done = total <= limit
            slot, gain = torch.where(is_done, slots[-1], slot), gain.masked_fill(is_done, 0)
        closed.view(batch, -1).scatter_(1, slot[:, None], -math.inf)
        covered = tables.rows_of_slot.index_select(0, slot) * tables.cols_of_slot.index_select(0, slot)
        drops.addcmul_(drops, covered, value=-1)
        total = total - gain  # as exact as a sum of what is left, since all are whole numbers
        slots.append(slot)
        totals.append(total)
        if limit is not None and (total <= limit).all():
            break
        if min_gain is not None and len(slots) >= least and (gain < min_gain).all():
            break
    return tables.id_of_slot[torch.stack(slots, dim=1)], torch.stack(totals, dim=1)


def rank_patches(errors: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Chooses the patches of one frame where there is a single scale: none overlaps another, so ranking them is the search.

    Args:
        errors (`torch.DoubleTensor` of shape `(batch, 1, *cells)`): squared error of every patch as it is.
        budget (`int`): patches to choose.

    Returns:
        `tuple` of ids and of squared errors of the frame after each, both of shape `(batch, budget)`.
    """
    gains, ids = errors.flatten(1).sort(dim=1, descending=True, stable=True)
    # Whole numbers, so the difference is as exact as a sum of what is left.
    totals = gains.sum(1, keepdim=True) - gains[:, :budget].cumsum(1)
    return ids[:, :budget], totals


def _drops(errors: torch.Tensor) -> torch.Tensor:
    """
    Tells by how much the error of a cell falls from one layer to the next finer one, `(batch, scales * cell rows, columns)`.

    The error itself is the sum over all scales, what a patch gains is the sum up to its own scale, and laying it makes just
    these numbers zero.
    """
    drops = errors.clone()
    drops[:, :-1] -= errors[:, 1:]
    return drops.flatten(1, 2)


class ReplayedSearch:
    """
    Chooses patches as [`choose_patches`] does, step by step on memory that stays where it is, for CUDA to replay.

    Args:
        tables (`CellTables`): of the grid.
        batch (`int`): frames that are searched together.
    """

    def __init__(self, tables: CellTables, batch: int):
        self.tables, rows = tables, tables.gain_rows
        self.gain_rows, self.gain_cols = rows.expand(batch, -1, -1), tables.gain_cols.expand(batch, -1, -1)
        self.drops = rows.new_zeros(batch, rows.shape[1], tables.cols_of_slot.shape[2])
        self.closed = tables.closed.repeat(batch, 1, 1)
        num_patches = int((tables.closed == 0).sum())
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
        """Takes and gives what [`choose_patches`] does; clips that are all done may go on for some steps more."""
        self.drops.copy_(_drops(errors))
        self.closed.copy_(self.tables.closed)
        # Comparing with no number is never true, so the first step always chooses.
        self.total.fill_(math.nan)
        self.limit.copy_(torch.full_like(self.limit, -math.inf) if limit is None else limit)
        self.number.zero_()
        for done in range(1, budget + 1):
            self.step()
            if done % _UNCHECKED_STEPS:
                continue
            if limit is not None and bool((self.total <= self.limit).all()):
                break
            if min_gain is not None and done > least:
                if bool((self.totals[:, done - 2] - self.total < min_gain).all()):
                    break
        return self.tables.id_of_slot[self.slots[:, :done]], self.totals[:, :done].clone()

    def _step(self) -> None:
        tables = self.tables
        gains = torch.baddbmm(self.closed, torch.bmm(self.gain_rows, self.drops), self.gain_cols)
        slot = torch.where(self.total <= self.limit, self.slot, gains.flatten(1).argmax(-1))
        self.closed.view(len(slot), -1).scatter_(1, slot[:, None], -math.inf)
        covered = tables.rows_of_slot.index_select(0, slot) * tables.cols_of_slot.index_select(0, slot)
        self.drops.addcmul_(self.drops, covered, value=-1)
        self.slot.copy_(slot)
        self.total.copy_(self.drops.sum((1, 2)))
        self.slots.index_copy_(1, self.number, self.slot[:, None])
        self.totals.index_copy_(1, self.number, self.total[:, None])
        self.number.add_(1)


class PatchSearch:
    """Chooses the patches of a frame; on CUDA by replayed steps, whose memory it keeps."""

    def __init__(self):
        self.replayed: dict[tuple[torch.device, torch.Size], ReplayedSearch] = {}

    def __getstate__(self) -> dict:
        # Graphs of a device can be neither copied nor saved; they are made again when they are needed.
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
        """Takes and gives what [`choose_patches`] does; without tables what [`rank_patches`] does."""
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


def layer_of_patch(grid: GazeGrid, cells: tuple[int, int]) -> torch.Tensor:
    """
    Tells which cells patches cover.

    Args:
        grid (`GazeGrid`): the patches.
        cells (`tuple[int, int]`): rows and columns of cells.

    Returns:
        `torch.LongTensor` of shape `(patches + 1, cells)`: 1 + the scale of a patch where it covers a cell, else 0, as in
        the last row, which stands for no patch.
    """
    covered = [torch.kron(_parts(rows, cells[0]), _parts(cols, cells[1])) for rows, cols in grid.grids]
    layers = torch.cat([layer * cover.long() for layer, cover in enumerate(covered, start=1)])
    return F.pad(layers, (0, 0, 0, 1))


def _resize_matrix(old: int, new: int, antialias: bool = False) -> torch.Tensor:
    """Gives the weights `(new, old)` of a bicubic resize along one axis, as torch has them."""
    identity = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(new, old), mode="bicubic", align_corners=False, antialias=antialias)[0, 0]


def _parts(count: int, size: int) -> torch.Tensor:
    """Cuts `size` places into equal parts: float64 `(count, size)`, 1 where a part covers a place."""
    return torch.eye(count, dtype=torch.float64).repeat_interleave(size // count, dim=1)
