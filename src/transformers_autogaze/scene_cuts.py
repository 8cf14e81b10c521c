"""Where the scenes of a video begin, by how much neighbouring frames differ."""

import torch
from torch.nn import functional as F


_SMALL = 16  # rows and columns that frames are averaged to
_SEEN = 64  # rows and columns at least that these averages are taken of
_LEAST = 0.1  # of all brightness: how much a cut changes on average at least
_TIMES = 2  # how many times more than the frames next to it


class SceneCuts:
    """
    Finds the cuts of a video whose frames come a few at a time.

    A cut is where the brightness of a frame, averaged over 16x16 places, differs from that of the frame before by a tenth of
    the whole range or more, and twice as much as frames next to it differ from each other; so neither motion nor a flash is one.

    Example:

    ```python
    >>> from transformers_autogaze.scene_cuts import SceneCuts

    >>> found = SceneCuts()
    >>> found.add(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    >>> found.add(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8))
    >>> found.cuts
    [5]

    ```
    """

    def __init__(self):
        self._last: torch.Tensor | None = None
        self._changes: list[float] = []

    def add(self, levels: torch.Tensor) -> None:
        """
        Takes the next frames.

        Args:
            levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): levels 0..255.
        """
        down, right = (max(1, side // _SEEN) for side in levels.shape[-2:])
        seen = levels[..., ::down, ::right].float().mean(1, keepdim=True) / 255
        small = F.adaptive_avg_pool2d(seen, _SMALL)
        before = small[:1] if self._last is None else self._last
        self._changes += (small - torch.cat([before, small[:-1]])).abs().mean((1, 2, 3)).tolist()
        self._last = small[-1:]

    @property
    def cuts(self) -> list[int]:
        """The frames that begin a new scene, counted from the first frame taken."""
        padded = [0.0, *self._changes, 0.0]
        return [
            frame
            for frame, (before, own, after) in enumerate(zip(padded, padded[1:], padded[2:], strict=False))
            if own >= max(_LEAST, _TIMES * before, _TIMES * after)
        ]
