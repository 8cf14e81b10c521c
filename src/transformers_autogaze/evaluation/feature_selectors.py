"""
The selectors that are compared by what an encoder keeps, all made to take one number of tokens for a whole clip.

This module owns how each spends it, evenly or over time; how they choose is theirs.
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
"""How tokens are spent: as many in every frame, or where and when they are worth most."""
UP_TO_LOSS = "up to a loss"
"""No number of tokens is given: every frame keeps what it needs to lose no more of its features than a threshold."""
_PUBLISHED = 198, 10
"""Patches of the first frame and of each later one that the published model was shown with."""


class EncodedClip(NamedTuple):
    """
    A clip that is to be encoded.

    Args:
        levels (`torch.ByteTensor` of shape `(frames, 3, height, width)`): frames in levels 0..255.
        encoder_values (`torch.FloatTensor` of the same shape): the same normalised for the encoder.
    """

    levels: torch.Tensor
    encoder_values: torch.Tensor


class ClipSelector:
    """
    Chooses patches of whole clips; what is compared.

    Args:
        grid ([`GazeGrid`]): the patches to choose from: scales and patch size of the encoder.
        spendings (`Sequence[str]`): how it can spend tokens, `EVENLY`, `OVER_TIME` or both.
    """

    takes_loss = False
    """Whether `gaze` takes [`UP_TO_LOSS`] as well: whether it foresees what an encoder loses."""

    def __init__(self, grid: GazeGrid, spendings: Sequence[str] = (EVENLY, OVER_TIME)):
        self.grid, self.spendings = grid, tuple(spendings)

    def prepare(self, clip: EncodedClip) -> Any:
        """
        Does once for a clip what all its gazes need.

        Args:
            clip ([`EncodedClip`]): the frames.

        Returns:
            what `gaze` takes; here the clip itself.
        """
        return clip

    def gaze(self, prepared: Any, num_tokens: int | float, spending: str) -> GazeOutput:
        """
        Gazes at one clip.

        Args:
            prepared: what `prepare` made of the clip.
            num_tokens (`int` or `float`): patches to keep, all frames together; with [`UP_TO_LOSS`] the threshold instead.
            spending (`str`): one of `spendings`, or [`UP_TO_LOSS`] where `takes_loss`.

        Returns:
            [`GazeOutput`] of one clip, on `grid`.
        """
        raise NotImplementedError


class PixelClipSelector(ClipSelector):
    """
    Lets a [`GazeSelector`] choose.

    One that knows gains spends over time by itself. Of others, only those with `published_way` spend over time at all: as
    the published model does it, most in the first frame and few in each later one.

    Args:
        selector ([`GazeSelector`]): what chooses.
        grid ([`GazeGrid`]): the encoder's scales and patch size, as many scales as the selector's.
        processor ([`AutoGazeVideoProcessor`], *optional*): what makes its pixel values; the published one by default.
        published_way (`bool`, *optional*, defaults to `False`): whether to spend over time as published.
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
        self.takes_loss = isinstance(selector, FeatureGazeModel)
        super().__init__(grid, (EVENLY, OVER_TIME) if self.knows_gains or published_way else (EVENLY,))
        self._target = {}
        if selector.config.grid != grid:
            self._target = {"target_scales": grid.scales, "target_patch_size": grid.patch_size}

    def prepare(self, clip: EncodedClip) -> torch.Tensor:
        return self.processor.to_pixel_values(clip.levels)[None]

    def gaze(self, prepared: torch.Tensor, num_tokens: int | float, spending: str) -> GazeOutput:
        if spending == UP_TO_LOSS:
            return self.selector.generate(prepared, task_loss_requirement=num_tokens, gazing_ratio=1.0, **self._target)
        if spending == OVER_TIME and self.knows_gains:
            return self.selector.generate(prepared, tokens_per_clip=num_tokens, **self._target)
        share = spread_evenly if spending == EVENLY else spread_as_published
        counts = share(num_tokens, prepared.shape[1], self.grid.num_patches)
        ratios = [count / self.grid.num_patches for count in counts]
        return self.selector.generate(prepared, gazing_ratio=ratios, **self._target)


class RandomClipSelector(ClipSelector):
    """
    Chooses patches of the finest scale at random; over time, the first frame whole, then any of all later frames.

    Args:
        grid ([`GazeGrid`]): the encoder's finest scale alone.
        seed (`int`, *optional*, defaults to 0): where the random numbers start.
    """

    def __init__(self, grid: GazeGrid, seed: int = 0):
        super().__init__(grid)
        self.seed = seed

    def gaze(self, prepared: EncodedClip, num_tokens: int, spending: str) -> GazeOutput:
        num_frames, places = len(prepared.levels), self.grid.num_patches
        generator = torch.Generator().manual_seed(self.seed)
        mask = torch.zeros(num_frames, places, dtype=torch.bool)
        if spending == EVENLY:
            for row, count in zip(mask, spread_evenly(num_tokens, num_frames, places), strict=True):
                row[torch.randperm(places, generator=generator)[:count]] = True
        else:
            first = min(num_tokens, places)
            mask[0, torch.randperm(places, generator=generator)[:first]] = True
            later = torch.randperm((num_frames - 1) * places, generator=generator)[: num_tokens - first]
            mask.view(-1)[places + later] = True
        return GazeOutput.from_masks([mask[None].to(prepared.levels.device)], self.grid)


def spread_evenly(num_tokens: int, num_frames: int, num_patches: int) -> list[int]:
    """
    Shares tokens out evenly.

    Args:
        num_tokens (`int`): tokens of the clip.
        num_frames (`int`): its frames.
        num_patches (`int`): patches that a frame has.

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
    Shares tokens out as the published model does: 198 in the first frame for every 10 in each later one.

    Args: as for [`spread_evenly`].

    Returns:
        `list[int]`: tokens of each frame; what the first has no patches for goes to the others.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_selectors import spread_as_published

    >>> spread_as_published(348, num_frames=16, num_patches=265)[:3]
    [198, 10, 10]

    ```
    """
    first, later = _PUBLISHED
    share = num_tokens * first / (first + later * (num_frames - 1))
    count = min(round(share), num_patches)
    return [count, *(spread_evenly(num_tokens - count, num_frames - 1, num_patches) if num_frames > 1 else [])]


def scales_of_encoder(size: int, patch_size: int, grid: GazeGrid = PUBLISHED_GRID) -> GazeGrid | None:
    """
    Matches the scales of a selector to frames of an encoder.

    Args:
        size (`int`): height and width in pixels of the encoder's frames.
        patch_size (`int`): its patch size.
        grid ([`GazeGrid`], *optional*): the selector's, the published one by default.

    Returns:
        [`GazeGrid`] with as many scales whose finest is `size`; `None` where whole tiles do not fill such a frame.
    """
    matched = grid.for_encoder(size, patch_size)
    return matched if matched.sizes[-1] == (size, size) else None


def pixel_clip_selectors(size: int, patch_size: int, device: torch.device | str = "cpu") -> dict[str, ClipSelector]:
    """
    Makes the rules that look at pixels, and the random one.

    Args:
        size (`int`): height and width in pixels of the encoder's frames, a multiple of `patch_size`.
        patch_size (`int`): its patch size.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where they work.

    Returns:
        `dict` of [`ClipSelector`] by name: `"greedy"` and `"gain-ranking"` on the four published scales, where these fit
        the size, `"greedy-finest"` and `"random"` on the finest alone. There, greedy search is the distance of pixels from
        what stands at their place, so with as many patches in every frame it is [`FrameDifferenceSelector`]'s choice.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_selectors import pixel_clip_selectors

    >>> list(pixel_clip_selectors(size=196, patch_size=14))
    ['greedy', 'greedy-finest', 'gain-ranking', 'random']
    >>> list(pixel_clip_selectors(size=112, patch_size=14))
    ['greedy-finest', 'random']

    ```
    """

    def made(rule: type[GazeSelector], grid: GazeGrid | None) -> ClipSelector | None:
        if grid is None:
            return None
        return PixelClipSelector(rule(GreedyGazeConfig(grid.scales, grid.patch_size)).to(device), grid)

    finest, scales = GazeGrid([size], patch_size), scales_of_encoder(size, patch_size)
    selectors = {
        "greedy": made(GreedyGazeSelector, scales),
        "greedy-finest": made(GreedyGazeSelector, finest),
        "gain-ranking": made(GainRankingSelector, scales),
        "random": RandomClipSelector(finest),
    }
    return {name: selector for name, selector in selectors.items() if selector is not None}
