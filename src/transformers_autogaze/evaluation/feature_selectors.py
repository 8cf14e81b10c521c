"""
The selectors of the comparison by encoder features, which all take a number of tokens for a whole clip.

This module allocates the tokens to frames, evenly or over time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..feature_gaze_autogaze import FeatureGazeModel
from ..gazing_autogaze import GazeOutput
from ..greedy_autogaze import GreedyGazeConfig, GreedyGazeSelector
from ..grid_autogaze import PUBLISHED_GRID, GazeGrid
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .selectors import GainRankingSelector


EVENLY, OVER_TIME = "evenly", "over time"
"""Allocation of tokens: equally many in every frame, or where they gain most."""
UP_TO_LOSS = "up to a loss"
"""A threshold in place of a number of tokens: every frame keeps as many as its loss of features requires."""
_PUBLISHED = 198, 10
"""Patches of the first frame and of each later one in the example of the published model."""


class EncodedClip(NamedTuple):
    """
    A clip to encode.

    Args:
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): frames in levels 0..255.
        encoder_values (`torch.FloatTensor` of the same shape): frames normalised for the encoder.
    """

    levels: torch.Tensor
    encoder_values: torch.Tensor


class ClipSelector:
    """
    Base class of the compared selectors, which choose patches of whole clips.

    Args:
        grid ([`GazeGrid`]): the patches to choose from, with the encoder's scales and patch size.
        allocations (`Sequence[str]`): supported allocations, `EVENLY`, `OVER_TIME` or both.
    """

    takes_threshold = False
    """Whether `gaze` also supports [`UP_TO_LOSS`], which needs a predicted loss of features."""

    def __init__(self, grid: GazeGrid, allocations: Sequence[str] = (EVENLY, OVER_TIME)):
        self.grid, self.allocations = grid, tuple(allocations)

    def prepare(self, clip: EncodedClip) -> Any:
        """
        Prepares a clip once for all its gazes.

        Args:
            clip ([`EncodedClip`]): the frames.

        Returns:
            the first argument of `gaze`; here the clip itself.
        """
        return clip

    def gaze(self, prepared: Any, num_tokens: Any, allocation: str) -> GazeOutput:
        """
        Chooses the patches of one clip.

        Args:
            prepared: output of `prepare`.
            num_tokens (`int` or `float`): patches of all frames to keep; with [`UP_TO_LOSS`] the threshold instead.
            allocation (`str`): one of `allocations`, or [`UP_TO_LOSS`] if `takes_threshold` is true.

        Returns:
            [`GazeOutput`] of one clip, on `grid`.
        """
        raise NotImplementedError


class PixelClipSelector(ClipSelector):
    """
    Wraps a [`GazeSelector`].

    Selectors that know gains allocate tokens over time by themselves. Others support this allocation only with `published_way`,
    with most tokens in the first frame.

    Args:
        selector ([`GazeSelector`]): the selector.
        grid ([`GazeGrid`]): the encoder's scales and patch size, with as many scales as the selector's grid.
        processor ([`AutoGazeVideoProcessor`], *optional*): preprocessing of the selector, the published one by default.
        published_way (`bool`, *optional*, defaults to `False`): whether to allocate tokens over time as published.
    """

    def __init__(
        self,
        selector: GazeSelector,
        grid: GazeGrid,
        processor: AutoGazeVideoProcessor | None = None,
        published_way: bool = False,
    ):
        self.selector = selector
        self.processor = AutoGazeVideoProcessor() if processor is None else processor
        self.knows_gains = getattr(selector, "knows_gains", False)
        self.takes_threshold = isinstance(selector, FeatureGazeModel)
        super().__init__(grid, (EVENLY, OVER_TIME) if self.knows_gains or published_way else (EVENLY,))
        self._target: dict[str, Any] = {}
        if selector.config.grid != grid:
            self._target = {"target_scales": grid.scales, "target_patch_size": grid.patch_size}

    def prepare(self, clip: EncodedClip) -> torch.Tensor:
        return self.processor.to_pixel_values(clip.levels)[None]

    def gaze(self, prepared: torch.Tensor, num_tokens: Any, allocation: str) -> GazeOutput:
        if allocation == UP_TO_LOSS:
            return self.selector.generate(prepared, task_loss_requirement=num_tokens, gazing_ratio=1.0, **self._target)
        if allocation == OVER_TIME and self.knows_gains:
            return self.selector.generate(prepared, tokens_per_clip=num_tokens, **self._target)
        spread = spread_evenly if allocation == EVENLY else spread_as_published
        counts = spread(num_tokens, prepared.shape[1], self.grid.num_patches)
        ratios = [count / self.grid.num_patches for count in counts]
        return self.selector.generate(prepared, gazing_ratio=ratios, **self._target)


class RandomClipSelector(ClipSelector):
    """
    Chooses random patches of the finest scale; over time, all of the first frame and random ones of the later frames.

    Args:
        grid ([`GazeGrid`]): the encoder's finest scale only.
        seed (`int`, *optional*, defaults to 0): seed of the random numbers.
    """

    def __init__(self, grid: GazeGrid, seed: int = 0):
        super().__init__(grid)
        self.seed = seed

    def gaze(self, prepared: EncodedClip, num_tokens: int, allocation: str) -> GazeOutput:
        num_frames, places = len(prepared.levels), self.grid.num_patches
        generator = torch.Generator().manual_seed(self.seed)
        mask = torch.zeros(num_frames, places, dtype=torch.bool)
        if allocation == EVENLY:
            for frame_mask, count in zip(mask, spread_evenly(num_tokens, num_frames, places), strict=True):
                frame_mask[torch.randperm(places, generator=generator)[:count]] = True
        else:
            first = min(num_tokens, places)
            mask[0, torch.randperm(places, generator=generator)[:first]] = True
            later = torch.randperm((num_frames - 1) * places, generator=generator)[: num_tokens - first]
            mask.view(-1)[places + later] = True
        return GazeOutput.from_masks([mask[None].to(prepared.levels.device)], self.grid)


def spread_evenly(num_tokens: int, num_frames: int, num_patches: int) -> list[int]:
    """
    Spreads tokens evenly over frames.

    Args:
        num_tokens (`int`): tokens of the clip.
        num_frames (`int`): frames of the clip.
        num_patches (`int`): patches of a frame.

    Returns:
        `list[int]`: tokens of each frame.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_selectors import spread_evenly

    >>> spread_evenly(10, num_frames=4, num_patches=16)
    [2, 3, 2, 3]

    ```
    """
    ends = [min(num_tokens, num_frames * num_patches) * (t + 1) // num_frames for t in range(num_frames)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def spread_as_published(num_tokens: int, num_frames: int, num_patches: int) -> list[int]:
    """
    Spreads tokens over frames like the published model: 198 in the first frame for every 10 in each later one.

    Args:
        num_tokens, num_frames, num_patches (`int`): as for [`spread_evenly`].

    Returns:
        `list[int]`: tokens of each frame; those that exceed the patches of the first frame are spread over the others.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_selectors import spread_as_published

    >>> spread_as_published(348, num_frames=16, num_patches=265)[:3]
    [198, 10, 10]

    ```
    """
    first, later = _PUBLISHED
    count = min(round(num_tokens * first / (first + later * (num_frames - 1))), num_patches)
    return [count, *(spread_evenly(num_tokens - count, num_frames - 1, num_patches) if num_frames > 1 else [])]


def scales_of_encoder(size: int, patch_size: int, grid: GazeGrid = PUBLISHED_GRID) -> GazeGrid | None:
    """
    Matches the scales of a selector to the frames of an encoder.

    Args:
        size (`int`): height and width of the encoder's frames in pixels.
        patch_size (`int`): patch size of the encoder.
        grid ([`GazeGrid`], *optional*): grid of the selector, the published one by default.

    Returns:
        [`GazeGrid`] with as many scales, of which the finest is `size`; `None` if whole tiles do not fill such a frame.
    """
    matched = grid.for_encoder(size, patch_size)
    return matched if matched.sizes[-1] == (size, size) else None


def pixel_clip_selectors(size: int, patch_size: int, device: torch.device | str = "cpu") -> dict[str, ClipSelector]:
    """
    Makes the selectors that choose by pixels, and the random one.

    Args:
        size (`int`): height and width of the encoder's frames in pixels, a multiple of `patch_size`.
        patch_size (`int`): patch size of the encoder.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): device of the selectors.

    Returns:
        `dict` of [`ClipSelector`] by name: `"greedy"` and `"gain-ranking"` on the four published scales, if these fit the size,
        and `"greedy-finest"` and `"random"` on the finest scale. On one scale, greedy search ranks patches by the distance of
        their pixels from the canvas, so with an even allocation it equals [`FrameDifferenceSelector`].

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_selectors import pixel_clip_selectors

    >>> list(pixel_clip_selectors(size=196, patch_size=14))
    ['greedy', 'greedy-finest', 'gain-ranking', 'random']
    >>> list(pixel_clip_selectors(size=112, patch_size=14))
    ['greedy-finest', 'random']

    ```
    """

    def make(
        selector: type[GreedyGazeSelector] | type[GainRankingSelector], grid: GazeGrid | None
    ) -> ClipSelector | None:
        if grid is None:
            return None
        module: Any = selector(GreedyGazeConfig(grid.scales, grid.patch_size))
        return PixelClipSelector(module.to(device), grid)

    finest, scales = GazeGrid([size], patch_size), scales_of_encoder(size, patch_size)
    selectors = {
        "greedy": make(GreedyGazeSelector, scales),
        "greedy-finest": make(GreedyGazeSelector, finest),
        "gain-ranking": make(GainRankingSelector, scales),
        "random": RandomClipSelector(finest),
    }
    return {name: selector for name, selector in selectors.items() if selector is not None}
