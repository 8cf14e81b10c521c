"""
The frames of a clip in which each place of a single scale is kept, chosen to minimise the error for a number of tokens.

A kept token is visible at its place until the next one is kept there. So its gain is the decrease of error in all frames in
which it is visible: a lasting change is worth a token, a change of a single frame may not be. Places are independent. For a
given price per token, the best schedule of a place is a shortest path over its frames. The caller searches for the price.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


_WINDOW = 64  # frames that are scheduled together; the next window starts with the last patches of the previous one
_MAX_VALUES = 2**24  # float64 values of patches that are compared at once


class _Window(NamedTuple):
    """
    Consecutive frames.

    Args:
        patches (`torch.FloatTensor` of shape `(batch, places, frames, values)`): their patches.
        costs (`torch.DoubleTensor` of shape `(batch, places, frames, frames + 1)`):
            Summed errors of the patch of one frame in later frames; see `_sum_errors`.
    """

    patches: torch.Tensor
    costs: torch.Tensor


class ClipSchedule:
    """
    Schedules the tokens of clips for any price.

    Args:
        patches (`Sequence[torch.FloatTensor]` of shape `(batch, places, values)`): the patches of every frame.
        previous_patches (`torch.FloatTensor` of shape `(batch, places, values)`): visible patches before the first frame.
        extra (`torch.DoubleTensor` of shape `(batch, places)`):
            Error of each frame in which these are visible, added to the squared error: large where nothing was ever kept.
        unit (`float`): errors are rounded to multiples of this, so that equal errors are equal in any order of summation.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.clip_schedule_autogaze import ClipSchedule

    >>> frames = [torch.tensor([[[value]]]) for value in (0.0, 1.0, 1.0, 1.0, 0.9, 5.0, 1.0)]  # one place, one value
    >>> schedule = ClipSchedule(frames, frames[0], torch.zeros(1, 1).double(), unit=2**-28)
    >>> gains = schedule.gains(torch.tensor([2.5 * 2**28]))  # a lasting change, then one of a single frame
    >>> (gains > 0)[0, :, 0].tolist()
    [False, True, False, False, False, True, True]
    >>> (schedule.gains(torch.tensor([17.0 * 2**28])) > 0)[0, :, 0].tolist()
    [False, False, False, False, False, False, False]

    ```
    """

    def __init__(self, patches: list[torch.Tensor], previous_patches: torch.Tensor, extra: torch.Tensor, unit: float):
        self.previous_patches, self.extra, self.unit = previous_patches, extra, unit
        self.windows = []
        for first in range(0, len(patches), _WINDOW):
            window = torch.stack(patches[first : first + _WINDOW], dim=2)
            start = torch.arange(window.shape[2], device=window.device)
            self.windows.append(_Window(window, _sum_errors(self._compare(window, window), start)))
        self._first_costs = self._costs(self.windows[0], previous_patches, extra)

    def gains(self, price: torch.Tensor) -> torch.Tensor:
        """
        Schedules the clips.

        Args:
            price (`torch.DoubleTensor` of shape `(batch,)`):
                Minimum gain of a token, in units; 0 to keep everything.

        Returns:
            `torch.DoubleTensor` of shape `(batch, frames, places)`: gains of kept tokens, the decrease of error in the frames
            in which they are visible, in units; `-inf` elsewhere.
        """
        price = torch.where(price > 0, price, -1)  # at a price of 0, tokens without gain are kept as well
        previous_patches, extra, gains = self.previous_patches, self.extra, []
        for number, window in enumerate(self.windows):
            costs = self._costs(window, previous_patches, extra) if number else self._first_costs
            of_window, last = _shortest_path(costs, price[:, None])
            gains.append(of_window.transpose(1, 2))
            if number == len(self.windows) - 1:
                break
            is_kept = last > 0
            index = (last - 1).clamp(min=0)[:, :, None, None].expand(-1, -1, 1, previous_patches.shape[2])
            previous_patches = torch.where(
                is_kept[..., None], window.patches.gather(2, index)[:, :, 0], previous_patches
            )
            extra = extra.masked_fill(is_kept, 0)
        return torch.cat(gains, dim=1)

    def _costs(self, window: _Window, previous_patches: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """Prepends the costs of the previous patches to those of a window: `(batch, places, 1 + frames, frames + 1)`."""
        before = self._compare(previous_patches[:, :, None], window.patches) + extra[:, :, None, None]
        return torch.cat(
            [_sum_errors(before, torch.zeros(1, dtype=torch.long, device=before.device)), window.costs], dim=2
        )

    def _compare(self, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Computes squared errors between patches `(batch, places, frames, values)`, in units: `(.., sources, targets)`."""
        step = max(1, _MAX_VALUES // targets[:, 0].numel())
        parts = []
        for first in range(0, targets.shape[1], step):
            target = targets[:, first : first + step].double()
            source = target if sources is targets else sources[:, first : first + step].double()
            # |a|^2 + |b|^2 - 2ab is precise enough in float64.
            lengths = (
                torch.linalg.vecdot(source, source)[..., None] + torch.linalg.vecdot(target, target)[..., None, :]
            )
            parts.append(torch.baddbmm(lengths.flatten(0, 1), source.flatten(0, 1), target.flatten(0, 1).mT, alpha=-2))
        errors = torch.cat([part.view(len(targets), -1, *part.shape[1:]) for part in parts], dim=1)
        return errors.clamp_(min=0).div_(self.unit).round_()


def _sum_errors(errors: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """
    Sums the errors of sources, `(.., sources, frames)`, from the frame in which a source is kept to before each frame.

    Returns `(.., sources, frames + 1)`; entries before the start are negative and not used.
    """
    cost = F.pad(errors.cumsum(-1), (1, 0))
    return cost - cost.gather(-1, start[:, None].expand(*cost.shape[:-1], 1))


def _shortest_path(cost: torch.Tensor, price: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the schedule of least cost for every place.

    Args:
        cost (`torch.DoubleTensor` of shape `(batch, places, 1 + frames, frames + 1)`):
            Costs of sources: source 0 is the patch before the first frame, source i that of frame i - 1.
        price (`torch.DoubleTensor` of shape `(batch, 1)`): price of a token.

    Returns:
        `tuple`: gains of kept tokens `(batch, places, frames)`, `-inf` for others; and the source that is visible last,
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
        # Without this token, the previous one would be visible in its frames.
        own = cost.flatten(2).gather(2, (current * (num_frames + 1) + end)[..., None])[..., 0]
        start = (current - 1).clamp(min=0)
        instead, until = (
            cost.flatten(2).gather(2, (before * (num_frames + 1) + frame)[..., None])[..., 0] for frame in (end, start)
        )
        gain = (instead - until - own).where(is_kept, gains.gather(2, current[..., None])[..., 0])
        gains.scatter_(2, current[..., None], gain[..., None])
        current, end = before.where(is_kept, current), start.where(is_kept, end)
    return gains[..., 1:], last
