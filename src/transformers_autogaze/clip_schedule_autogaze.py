"""
When to keep each place of a clip, where there is a single scale: the schedule that leaves the least error for its tokens.

A kept token lies at its place until the next one is kept there. So what it is worth is not the error that it takes from its
own frame alone, but from all frames that it is shown in; a change that lasts is worth a token, one that is gone with the next
frame may not be. Places do not depend on each other, and for a price per token the best schedule of each is a shortest path
over its frames. What the price must be is its caller's matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


_WINDOW = 64  # frames that are scheduled together; what they end with goes on into the next ones
_VALUES = 2**24  # of the patches that are compared at a time, in float64


class _Window(NamedTuple):
    """Some consecutive frames: their patches, `(batch, places, frames, values)`, and what it costs to show one in others."""

    patches: torch.Tensor
    costs: torch.Tensor  # (batch, places, frames, frames + 1); see `_sum_errors`


class ClipSchedule:
    """
    Schedules the tokens of clips for any price.

    Args:
        patches (`Sequence[torch.FloatTensor]` of shape `(batch, places, values)`): what every frame shows at each place.
        shown (`torch.FloatTensor` of shape `(batch, places, values)`): what lies there before the first frame.
        extra (`torch.DoubleTensor` of shape `(batch, places)`):
            What a frame in which that is shown costs beside its squared error: much where nothing was ever kept.
        unit (`float`): errors are whole multiples of this, so that equal ones are equal however they were computed.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.clip_schedule_autogaze import ClipSchedule

    >>> frames = [torch.tensor([[[value]]]) for value in (0.0, 1.0, 1.0, 1.0, 0.9, 5.0, 1.0)]  # one place, one value
    >>> schedule = ClipSchedule(frames, frames[0], torch.zeros(1, 1).double(), unit=2**-28)
    >>> gains = schedule.gains(torch.tensor([2.5 * 2**28]))  # it changes for good, then for a moment
    >>> (gains > 0)[0, :, 0].tolist()
    [False, True, False, False, False, True, True]
    >>> (schedule.gains(torch.tensor([17.0 * 2**28])) > 0)[0, :, 0].tolist()
    [False, False, False, False, False, False, False]

    ```
    """

    def __init__(self, patches: Sequence[torch.Tensor], shown: torch.Tensor, extra: torch.Tensor, unit: float):
        self.shown, self.extra, self.unit = shown, extra, unit
        self.windows = []
        for first in range(0, len(patches), _WINDOW):
            window = torch.stack(patches[first : first + _WINDOW], dim=2)
            start = torch.arange(window.shape[2], device=window.device)
            self.windows.append(_Window(window, _sum_errors(self._compare(window, window), start)))
        self._first_costs = self._costs(self.windows[0], shown, extra)

    def gains(self, price: torch.Tensor) -> torch.Tensor:
        """
        Schedules the clips.

        Args:
            price (`torch.DoubleTensor` of shape `(batch,)`):
                Error, in units, that a token must take away at least; 0 to keep everything.

        Returns:
            `torch.DoubleTensor` of shape `(batch, frames, places)`: for kept tokens the error that they take away from the
            frames that they are shown in, in units; `-inf` elsewhere.
        """
        price = torch.where(price > 0, price, -1)  # For nothing at all, what takes away nothing is kept as well.
        shown, extra, gains = self.shown, self.extra, []
        for number, window in enumerate(self.windows):
            costs = self._costs(window, shown, extra) if number else self._first_costs
            of_window, last = _shortest_path(costs, price[:, None])
            gains.append(of_window.transpose(1, 2))
            if number == len(self.windows) - 1:
                break
            is_kept = last > 0
            index = (last - 1).clamp(min=0)[:, :, None, None].expand(-1, -1, 1, shown.shape[2])
            shown = torch.where(is_kept[..., None], window.patches.gather(2, index)[:, :, 0], shown)
            extra = extra.masked_fill(is_kept, 0)
        return torch.cat(gains, dim=1)

    def _costs(self, window: _Window, shown: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """Puts before a window's costs those of what lies there before: `(batch, places, 1 + frames, frames + 1)`."""
        before = self._compare(shown[:, :, None], window.patches) + extra[:, :, None, None]
        return torch.cat(
            [_sum_errors(before, torch.zeros(1, dtype=torch.long, device=before.device)), window.costs], dim=2
        )

    def _compare(self, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gives squared errors between patches `(batch, places, frames, values)`, in units: `(.., sources, targets)`."""
        step = max(1, _VALUES // targets[:, 0].numel())
        parts = []
        for first in range(0, targets.shape[1], step):
            target = targets[:, first : first + step].double()
            source = target if sources is targets else sources[:, first : first + step].double()
            # In float64, equal lengths cost no digits that count.
            lengths = (
                torch.linalg.vecdot(source, source)[..., None] + torch.linalg.vecdot(target, target)[..., None, :]
            )
            parts.append(torch.baddbmm(lengths.flatten(0, 1), source.flatten(0, 1), target.flatten(0, 1).mT, alpha=-2))
        errors = torch.cat([part.view(len(targets), -1, *part.shape[1:]) for part in parts], dim=1)
        return errors.clamp_(min=0).div_(self.unit).round_()


def _sum_errors(errors: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """
    Sums errors `(.., rows, frames)` over the frames before each, from the one on in which a row is kept.

    Gives `(.., rows, frames + 1)`; before a row's start it is negative, and not used.
    """
    cost = F.pad(errors.cumsum(-1), (1, 0))
    return cost - cost.gather(-1, start[:, None].expand(*cost.shape[:-1], 1))


def _shortest_path(cost: torch.Tensor, price: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the cheapest schedule of every place.

    Takes costs `(batch, places, 1 + frames, frames + 1)`, whose row 0 is shown first and row i is frame i - 1, and prices
    `(batch, 1)`. Gives gains of kept tokens `(batch, places, frames)`, `-inf` for others, and the row that is shown last,
    `(batch, places)`.
    """
    num_frames = cost.shape[3] - 1
    total = cost.new_zeros(*cost.shape[:2], num_frames + 1)
    previous = torch.zeros(total.shape, dtype=torch.long, device=cost.device)
    for number in range(1, num_frames + 1):
        least, previous[..., number] = (total[..., :number] + cost[..., :number, number - 1]).min(-1)
        total[..., number] = least + price
    last = (total + cost[..., num_frames]).argmin(-1)

    gains = torch.full_like(total, -torch.inf)
    current, end = last, torch.full_like(last, num_frames)
    for _ in range(num_frames):
        is_kept = current > 0
        before = previous.gather(2, current[..., None])[..., 0]
        # Without this token, the one before would be shown in its frames as well.
        own = cost.flatten(2).gather(2, (current * (num_frames + 1) + end)[..., None])[..., 0]
        start = (current - 1).clamp(min=0)
        instead, until = (
            cost.flatten(2).gather(2, (before * (num_frames + 1) + frame)[..., None])[..., 0] for frame in (end, start)
        )
        gain = (instead - until - own).where(is_kept, gains.gather(2, current[..., None])[..., 0])
        gains.scatter_(2, current[..., None], gain[..., None])
        current, end = before.where(is_kept, current), start.where(is_kept, end)
    return gains[..., 1:], last
