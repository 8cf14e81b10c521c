"""Token budgets of frames, clips and streams, and loss thresholds: checking them, and rate control along a stream."""

import copy
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from .grid_autogaze import GazeGrid


Number = float | int

WINDOW_SECONDS = 10.0
"""Length of the window of a stream that keeps to the budget, wherever it starts."""
_TOLERANCE = 0.08  # share of the budget of a window; the documented tolerance is 0.1
_MEMORY = 3  # windows over which the marginal gain is averaged
_MAX_FRAME_RATE = 1_000_000  # memory grows with the number of frames in a window
_LEAST_GAIN = 2.0**-60  # replaces a gain of 0, which has no logarithm


class ClipBudget(NamedTuple):
    """
    Tokens of a whole clip.

    Args:
        num_tokens (`int`): patches to keep in the clip, all frames together.
    """

    num_tokens: int


class StreamBudget(NamedTuple):
    """
    Tokens of a stream.

    Args:
        tokens_per_frame (`float`): patches to keep per frame of gaze, on average.
        window (`int`): frames of gaze in a window that keeps to the budget.
    """

    tokens_per_frame: float
    window: int


def read_token_budget(
    grid: GazeGrid,
    num_frames: int,
    gazing_ratio: object | None = None,
    clip_ratio: float | None = None,
    tokens_per_clip: int | None = None,
    tokens_per_second: float | None = None,
    frame_rate: float | None = None,
    tubelet_size: int = 1,
) -> ClipBudget | StreamBudget | None:
    """
    Checks the budget arguments of `generate` and converts them to a budget over time.

    Args:
        grid ([`GazeGrid`]): the patches of a frame.
        num_frames (`int`): frames of gaze of the clip.
        gazing_ratio (*optional*): a budget per frame, which excludes budgets over time.
        clip_ratio (`float`, *optional*):
            Share of the tokens that a dense encoder makes of the clip, all patches of the finest scale, above 0 and up
            to 1.
        tokens_per_clip (`int`, *optional*): the same as a number, from 1 to the number of patches of all frames.
        tokens_per_second (`float`, *optional*): tokens per second of a stream, above 0.
        frame_rate (`float`, *optional*): frames per second of the stream; given with `tokens_per_second`.
        tubelet_size (`int`, *optional*, defaults to 1): video frames per frame of gaze.

    Returns:
        [`ClipBudget`], [`StreamBudget`], or `None` if no budget over time was given.

    Raises:
        ValueError: if more than one budget was given, or a number is out of range.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.token_budgets_autogaze import read_token_budget

    >>> read_token_budget(GazeGrid([224]), num_frames=16, clip_ratio=0.125)
    ClipBudget(num_tokens=392)
    >>> read_token_budget(GazeGrid([224]), num_frames=16, tokens_per_second=300, frame_rate=25)
    StreamBudget(tokens_per_frame=12.0, window=250)

    ```
    """
    _check_single(gazing_ratio, clip_ratio, tokens_per_clip, tokens_per_second)
    clip_ratio, tokens_per_clip, tokens_per_second, frame_rate = map(
        _plain, (clip_ratio, tokens_per_clip, tokens_per_second, frame_rate)
    )
    if (frame_rate is None) != (tokens_per_second is None):
        raise ValueError(
            f"`tokens_per_second` and `frame_rate` must be given together, got {tokens_per_second} and {frame_rate}"
        )
    if clip_ratio is not None:
        check_clip_ratio(clip_ratio)
        return ClipBudget(max(1, math.floor(clip_ratio * num_frames * grid.num_patches_each_scale[-1] + 1e-6)))
    if tokens_per_clip is not None:
        most = num_frames * grid.num_patches
        if not _is_whole(tokens_per_clip) or not 1 <= tokens_per_clip <= most:
            raise ValueError(
                f"`tokens_per_clip` must be a whole number in 1..{most}, all patches of {num_frames} frames, got "
                f"{tokens_per_clip!r}"
            )
        return ClipBudget(int(tokens_per_clip))
    if tokens_per_second is not None:
        check_rate("tokens_per_second", tokens_per_second)
        check_rate("frame_rate", frame_rate)
        if frame_rate > _MAX_FRAME_RATE:
            raise ValueError(
                f"`frame_rate` must be at most {_MAX_FRAME_RATE} with `tokens_per_second`, got {frame_rate!r}"
            )
        rate = frame_rate / tubelet_size
        # More than twice all patches of a frame is the same as twice, and integers would overflow.
        tokens_per_frame = min(tokens_per_second / rate, 2.0 * grid.num_patches)
        return StreamBudget(tokens_per_frame, max(1, round(WINDOW_SECONDS * rate)))
    return None


def check_budgets(
    gazing_ratio: Any = None,
    task_loss_requirement: Any = None,
    clip_ratio: Any = None,
    tokens_per_clip: Any = None,
    tokens_per_second: Any = None,
) -> None:
    """
    Checks budgets and a threshold as far as no selector and no clip is needed: their types and ranges.

    Args:
        gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_clip, tokens_per_second (*optional*):
            As in [`~GazeSelector.generate`] and [`stream_gaze`].

    Raises:
        ValueError: if one of them is out of range for every selector and every clip, or more than one budget is given.

    Example:

    ```python
    >>> from transformers_autogaze.token_budgets_autogaze import check_budgets

    >>> check_budgets(clip_ratio=2)
    Traceback (most recent call last):
    ValueError: `clip_ratio` must be above 0 and at most 1, the share of a dense encoder's tokens, got 2

    ```
    """
    if gazing_ratio is not None:
        _read_shares(gazing_ratio)
    if task_loss_requirement is not None:
        _read_thresholds(task_loss_requirement)
    check_clip_ratio(_plain(clip_ratio))
    if tokens_per_clip is not None and (not _is_whole(_plain(tokens_per_clip)) or _plain(tokens_per_clip) < 1):
        raise ValueError(f"`tokens_per_clip` must be a whole number of at least 1, got {tokens_per_clip!r}")
    if tokens_per_second is not None:
        check_rate("tokens_per_second", _plain(tokens_per_second))
    _check_single(gazing_ratio, clip_ratio, tokens_per_clip, tokens_per_second)


def _check_single(gazing_ratio: Any, clip_ratio: Any, tokens_per_clip: Any, tokens_per_second: Any) -> None:
    """Raises a ValueError if more than one budget is given."""
    budgets = {
        "gazing_ratio": gazing_ratio,
        "clip_ratio": clip_ratio,
        "tokens_per_clip": tokens_per_clip,
        "tokens_per_second": tokens_per_second,
    }
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"only one of {', '.join(f'`{name}`' for name in budgets)} can be given, got {given}")


def check_clip_ratio(clip_ratio: Any) -> None:
    """
    Checks a share of a clip's tokens.

    Raises:
        ValueError: if it is neither `None` nor a number above 0 and at most 1.
    """
    if clip_ratio is not None and (not _is_number(clip_ratio) or not 0 < clip_ratio <= 1):
        raise ValueError(
            f"`clip_ratio` must be above 0 and at most 1, the share of a dense encoder's tokens, got {clip_ratio!r}"
        )


def check_rate(name: str, value: Any) -> None:
    """
    Checks a number of frames or tokens per second.

    Raises:
        ValueError: if it is not a finite number above 0.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a number above 0, got {value!r}")


def read_number(name: str, value: object) -> float:
    """
    Reads a finite number, also from a tensor or array without dimensions.

    Args:
        name (`str`): name of the argument, for the message.
        value: the number.

    Returns:
        `float`

    Raises:
        ValueError: if it is not a finite number.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.token_budgets_autogaze import read_number

    >>> read_number("clip_ratio", torch.tensor(0.25))
    0.25

    ```
    """
    number = _plain(value)
    if not _is_number(number) or not math.isfinite(number):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")
    return float(number)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Returns the number in a tensor or array without dimensions; other values as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


class RateControl:
    """
    Distributes the budget of a stream over its frames.

    A frame keeps the patches that gain at least the marginal gain: that of the last patch within the budget of each earlier
    frame, averaged over half a minute. So frames in which much changes keep more patches and static ones fewer, while every
    window of ten seconds stays within a tenth of its budget. Patches where nothing was ever kept come first.

    Args:
        budget ([`StreamBudget`]): tokens per frame, and the length of a window.
        batch_size (`int`): number of streams; each has its own state.
        device (`torch.device`): device of the gains.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.token_budgets_autogaze import RateControl, StreamBudget

    >>> control = RateControl(StreamBudget(tokens_per_frame=2.0, window=10), batch_size=1, device="cpu")
    >>> gains = torch.tensor([[8.0, 4.0, 2.0, 1.0]])
    >>> for _ in range(3):
    ...     count = control.count(gains, torch.tensor([0]))
    ...     control.update(count)
    ...     print(int(count))
    2
    2
    2

    ```
    """

    def __init__(self, budget: StreamBudget, batch_size: int, device: torch.device | str):
        self.budget = budget
        self.recent = torch.zeros(batch_size, budget.window, dtype=torch.float64, device=device)
        """Tokens of the latest frames, `(batch, window)`, a ring buffer."""
        self.total = torch.zeros_like(self.recent[:, 0])
        """Tokens of all frames, `(batch,)`."""
        self.num_frames = 0
        """Number of frames so far."""
        self.log_gain = torch.full_like(self.total, math.nan)
        """Binary logarithm of the marginal gain, `(batch,)`; NaN before the first estimate."""

    def copy(self) -> "RateControl":
        """Returns an independent copy."""
        other = copy.copy(self)
        other.recent = self.recent.clone()
        return other

    def limits(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Computes the limits for the next frame.

        Returns:
            `tuple` of three `torch.LongTensor` of shape `(batch,)`: the minimum and the maximum number of tokens, and the
            target within the budget.
        """
        rate, window = self.budget
        spent, seen = self._spent(), min(self.num_frames + 1, window)
        most = ((1 + _TOLERANCE) * rate * window - spent).floor().clamp(min=0)
        least = ((1 - _TOLERANCE) * rate * seen - spent).ceil().clamp(min=0)
        # A deviation from the budget is corrected over half a window.
        target = rate - (spent - rate * (seen - 1)) / (0.5 * window)
        target = target.clamp(0.5 * rate, 2 * rate).ceil().clamp(min=1)
        return torch.minimum(least, most).long(), most.long(), target.long()

    def _spent(self) -> torch.Tensor:
        """Sums the tokens of the window that ends with the next frame, `(batch,)`, without that frame."""
        return self.recent.sum(1) - self.recent[:, self.num_frames % self.budget.window]

    def count(self, gains: torch.Tensor, num_needed: torch.Tensor) -> torch.Tensor:
        """
        Computes the number of patches that the next frame keeps; call `update` with the number that it did keep.

        Args:
            gains (`torch.DoubleTensor` of shape `(batch, K)`): gains of the frame's best patches, in decreasing order.
            num_needed (`torch.LongTensor` of shape `(batch,)`): number of these where nothing was ever kept.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: number of patches to keep.
        """
        rate, window = self.budget
        least, most, target = self.limits()
        logs = gains.double().clamp(min=_LEAST_GAIN).log2()
        # Gains where nothing was kept yet do not measure change, so they are left out. The index is limited by the stream's
        # own budget, so that the result does not depend on the batch.
        last = torch.minimum(num_needed + target, most).clamp(1, gains.shape[1]) - 1
        marginal = logs.gather(1, last[:, None])[:, 0]
        is_new, needs = self.log_gain.isnan(), num_needed > 0
        counts = torch.where(is_new, target.where(~needs, num_needed), (logs >= self.log_gain[:, None]).sum(1))
        learned = torch.where(is_new, marginal, self.log_gain.lerp(marginal, 1 / (_MEMORY * window)))
        self.log_gain = self.log_gain.where(needs, learned)
        # Tokens that were not spent can be spent later, and some more once the stream is longer than a window. The first frame
        # is kept whole nevertheless.
        number = self.num_frames + 1
        ahead = _TOLERANCE * rate * window * (1 - min(1, window / number))
        earned = (rate * number + ahead - self.total).floor().clamp(min=0).long()
        counts = torch.maximum(torch.minimum(counts, earned), num_needed)
        return torch.minimum(torch.maximum(counts, least), most).clamp(max=gains.shape[1])

    def update(self, counts: torch.Tensor) -> None:
        """Adds a frame that kept `counts` patches, a `torch.LongTensor` of shape `(batch,)`."""
        self.recent[:, self.num_frames % self.budget.window] = counts.double()
        self.total = self.total + counts
        self.num_frames += 1


def budget_each_frame(
    gazing_ratio: Number | Sequence[Number] | torch.Tensor, num_frames: int, num_patches: int
) -> torch.Tensor:
    """
    Converts a share of patches to a number of patches for every frame (docs/specification.md, section 4.1).

    Args:
        gazing_ratio (`float`, sequence of `float` or `torch.Tensor` of shape `(frames,)`):
            Share of all patches of a frame, 0..1; every frame keeps at least one patch.
        num_frames (`int`): frames of the clip.
        num_patches (`int`): patches of one frame over all scales.

    Returns:
        `torch.LongTensor` of shape `(frames,)`, on the CPU: `max(1, floor(gazing_ratio * num_patches))`, where a
        product within 1e-6 of the next whole number counts as that number, so that `26 / 265` means 26 patches.

    Raises:
        ValueError: if a ratio is not in 0..1, or there are not one or `frames` of them.
    """
    ratio = _read_shares(gazing_ratio)
    if ratio.ndim > 1 or (ratio.ndim == 1 and len(ratio) != num_frames):
        raise ValueError(
            f"`gazing_ratio` must be one number or one for each of the {num_frames} frames, got the shape "
            f"{tuple(ratio.shape)}"
        )
    return (ratio * num_patches + 1e-6).floor().clamp(min=1).long().expand(num_frames)


def threshold_each_frame(
    task_loss_requirement: Number | Sequence[Number] | torch.Tensor, batch_size: int, num_frames: int
) -> torch.Tensor:
    """
    Expands a threshold to every frame of every clip.

    Args:
        task_loss_requirement (`float`, sequence of `float` or `torch.Tensor`):
            One number; one per frame, shape `(frames,)`; one per clip, shape `(batch,)` or `(batch, 1)`; or one for
            each, shape `(batch, frames)`. If batch and frames are equal, one dimension means frames.
        batch_size (`int`): number of clips.
        num_frames (`int`): number of frames of a clip.

    Returns:
        `torch.DoubleTensor` of shape `(batch, frames)`.

    Raises:
        ValueError: if the shape is none of these or a number is NaN.
    """
    threshold = _read_thresholds(task_loss_requirement)
    if threshold.shape == (batch_size,) and batch_size != num_frames:
        threshold = threshold[:, None]
    allowed = [(), (1,), (num_frames,), (1, num_frames), (batch_size, 1), (batch_size, num_frames)]
    if tuple(threshold.shape) not in allowed:
        raise ValueError(
            f"`task_loss_requirement` must be one number, one for each of the {num_frames} frames, one for each of "
            f"the {batch_size} clips, or both, got the shape {tuple(threshold.shape)}"
        )
    return threshold.expand(batch_size, num_frames)


def _read_shares(gazing_ratio: Any) -> torch.Tensor:
    """Reads shares of patches, on the CPU; raises a ValueError if one is not in 0..1."""
    ratio = _read_numbers("gazing_ratio", gazing_ratio).cpu()
    if not ((ratio >= 0) & (ratio <= 1)).all():
        raise ValueError(f"`gazing_ratio` must lie in 0..1, the share of patches to keep, got {gazing_ratio}")
    return ratio


def _read_thresholds(task_loss_requirement: Any) -> torch.Tensor:
    """Reads thresholds; raises a ValueError if one is NaN."""
    threshold = _read_numbers("task_loss_requirement", task_loss_requirement)
    if threshold.isnan().any():
        raise ValueError(f"`task_loss_requirement` must be numbers, got NaN in {task_loss_requirement}")
    return threshold


def _read_numbers(name: str, value: Any) -> torch.Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
        if torch.as_tensor(value).dtype == torch.bool:
            raise ValueError("a truth value is no number")
        return numbers
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` must be a number such as 0.25, or a sequence or tensor of them, got {value!r}"
        ) from error
