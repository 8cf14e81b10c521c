"""Detection of scene cuts, by the difference between neighbouring frames."""

import torch
from torch.nn import functional as F


_GRID_SIZE = 16  # rows and columns that frames are averaged to
_MIN_SAMPLES = 64  # rows and columns of pixels that enter these averages, at least
_MIN_CHANGE = 0.1  # mean change of brightness at a cut, as a share of the whole range
_MIN_RATIO = 2  # of the change at a cut to the changes right before and after


class SceneCuts:
    """
    Finds the scene cuts of a video, which is added a few frames at a time.

    The brightness of every frame is averaged over 16x16 blocks. A cut is a frame whose averages differ from those of the frame
    before by a tenth of the whole range or more, and at least twice as much as do the pairs of frames right before and after.
    So neither motion nor a flash is a cut.

    Example:

    ```python
    >>> from transformers_autogaze.pruning.scene_cuts import SceneCuts

    >>> found = SceneCuts()
    >>> found.add(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    >>> found.add(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8))
    >>> found.cuts
    [5]

    ```
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._changes: list[float] = []

    def add(self, levels: torch.Tensor) -> None:
        """
        Adds the next frames.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
        """
        down, right = (max(1, side // _MIN_SAMPLES) for side in levels.shape[-2:])
        sampled = levels[..., ::down, ::right].float().mean(1, keepdim=True) / 255
        small = F.adaptive_avg_pool2d(sampled, _GRID_SIZE)
        before = small[:1] if self._last is None else self._last
        self._changes += (small - torch.cat([before, small[:-1]])).abs().mean((1, 2, 3)).tolist()
        self._last = small[-1:]

    @property
    def cuts(self) -> list[int]:
        """Indices of the frames that begin a new scene, counted over the frames added."""
        padded = [0.0, *self._changes, 0.0]
        return [
            frame
            for frame, (before, own, after) in enumerate(zip(padded, padded[1:], padded[2:], strict=False))
            if own >= max(_MIN_CHANGE, _MIN_RATIO * before, _MIN_RATIO * after)
        ]
