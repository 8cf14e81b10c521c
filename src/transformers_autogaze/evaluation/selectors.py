"""Baseline selectors, which rank the patches of a frame once by a simple rule and keep the first."""

import torch
from torch import nn
from torch.nn import functional as F

from ..composite_autogaze import mse_to_task_loss, task_loss_to_mse
from ..gazing_autogaze import GazeOutput
from ..greedy_autogaze import GreedyGazeConfig, GreedyGazeSelector
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector
from ..video_processing_autogaze import AutoGazeVideoProcessor


class RankingCache:
    """State of a [`RankingSelector`] in a stream."""

    def __init__(self):
        self.num_frames: int = 0
        """Number of frames seen so far."""
        self.reconstruction: torch.Tensor | None = None
        """Reconstruction of the last frame, `(batch, 3, height, width)`; `None` before the first."""


class RankingSelector(GazeSelector, nn.Module):
    """
    Base class of selectors that rank all patches of a frame once and keep the first; subclasses define the ranking.

    It has the interface of the model. With a threshold, a frame ends with the first patch after which the measured loss
    of the closed-form reconstruction meets it, as for the greedy selector.

    Args:
        config (`GreedyGazeConfig`, *optional*): scales, patch size and normalisation of the frames.
    """

    def __init__(self, config: GreedyGazeConfig | None = None):
        super().__init__()
        self._greedy = GreedyGazeSelector(config)
        self.config = self._greedy.config

    @property
    def device(self) -> torch.device:
        """Device of the selector."""
        return self._greedy.device

    def _rank(self, frame: torch.Tensor, previous_reconstruction: torch.Tensor, frame_index: int) -> torch.Tensor:
        """
        Ranks the patches of the next frame of every clip.

        Args:
            frame (`torch.FloatTensor` of shape `(batch, 3, height, width)`): pixels in 0..1.
            previous_reconstruction (`torch.FloatTensor` of the same shape):
                Reconstruction of the frame before; mid-grey for the first frame.
            frame_index (`int`): index of the frame in the stream.

        Returns:
            `torch.LongTensor` of shape `(batch, patches)`: all ids, best first.
        """
        raise NotImplementedError

    def _gaze(
        self,
        frames: torch.Tensor,
        budget: torch.Tensor,
        threshold: torch.Tensor | None,
        past_key_values: RankingCache | None,
        use_cache: bool,
    ) -> GazeOutput:
        cache = RankingCache() if past_key_values is None else past_key_values
        if not isinstance(cache, RankingCache):
            raise ValueError(f"`past_key_values` must be a RankingCache, got {type(cache).__name__}")
        if cache.reconstruction is not None and len(cache.reconstruction) != len(frames):
            raise ValueError(
                f"`past_key_values` holds {len(cache.reconstruction)} clips, but {len(frames)} are given now (tiles count); pass "
                "the frames of the same clips, or a new RankingCache"
            )
        pixels, composite, gazes = self._greedy.to_pixels(frames), self._greedy.composite, []
        if cache.reconstruction is None:
            cache.reconstruction = torch.full_like(pixels[:, 0], 0.5)
        for t, frame in enumerate(pixels.split(1, dim=1)):
            ids = self._rank(frame[:, 0], cache.reconstruction, cache.num_frames)[:, : budget[t]]
            gaze = self._stop(ids, frame, None if threshold is None else threshold[:, t], cache.reconstruction)
            cache.reconstruction = composite.reconstruct(frame, gaze, cache.reconstruction)[:, 0]
            cache.num_frames += 1
            gazes.append(gaze)
        return GazeOutput.concatenate(gazes).replace(cache=cache if use_cache else None)

    def _stop(
        self,
        ids: torch.Tensor,
        frame: torch.Tensor,
        threshold: torch.Tensor | None,
        previous_reconstruction: torch.Tensor,
    ) -> GazeOutput:
        """Keeps patches `(batch, K)` of a frame `(batch, 1, 3, height, width)` in order until the threshold is met."""
        grid, longest = self.config.grid, torch.tensor([ids.shape[1]], device=ids.device)
        gaze = GazeOutput.from_ids(ids, torch.zeros_like(ids, dtype=torch.bool), longest, grid)
        mse = self._greedy.composite.measure(frame, gaze, previous_reconstruction)
        counts = longest.repeat(len(ids), 1)
        if threshold is not None:
            is_met = mse <= task_loss_to_mse(threshold).to(mse)[:, None]
            counts = torch.where(is_met.any(1), is_met.int().argmax(1) + 1, longest)[:, None]
        num_slots = counts.amax(0)
        slots = torch.arange(int(num_slots), device=ids.device)
        is_padding = slots >= counts
        return GazeOutput.from_ids(
            ids[:, :num_slots].masked_fill(is_padding, grid.num_patches),
            is_padding,
            num_slots,
            grid,
            task_loss_prediction=mse_to_task_loss(mse.gather(1, slots.minimum(counts - 1))),
            clip_num_gazing_each_frame=counts,
        )

    def _draw_settings(self, num_frames: int, generator: torch.Generator | None) -> tuple[float, float]:
        return self.config.gazing_ratio, self.config.task_loss_requirement


class GainRankingSelector(RankingSelector):
    """
    Ranks patches by how much each alone would lower the error of the previous reconstruction: one-shot greedy search.

    Unlike greedy search, it ignores that patches of several scales overlap.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.selectors import GainRankingSelector

    >>> video = torch.linspace(-2, 2, 224).expand(1, 4, 3, 224, 224)  # four times the same smooth frame
    >>> gaze = GainRankingSelector().generate(video, gazing_ratio=0.5, task_loss_requirement=0.7)
    >>> gaze.num_real_each_frame.tolist()
    [[12, 1, 1, 1]]

    ```
    """

    def _rank(self, frame: torch.Tensor, previous_reconstruction: torch.Tensor, frame_index: int) -> torch.Tensor:
        composite = self._greedy.composite
        gains = composite.gains(composite.cell_errors(frame, previous_reconstruction))
        return gains.argsort(dim=1, descending=True, stable=True)


class FrameDifferenceSelector(RankingSelector):
    """
    Ranks the patches of the finest scale by the distance of their pixels from the reconstruction of the frame before.

    With the reconstruction instead of the frame itself, a change that was not kept still counts in later frames. The
    reconstruction before the first frame is mid-grey. Coarser patches follow after all of the finest scale.
    """

    def _rank(self, frame: torch.Tensor, previous_reconstruction: torch.Tensor, frame_index: int) -> torch.Tensor:
        rows, cols = self.config.grid.grids[-1]
        change = (frame - previous_reconstruction).square().mean(1, keepdim=True)
        change = F.adaptive_avg_pool2d(change, (rows, cols)).flatten(1)
        coarser = self.config.grid.num_patches - rows * cols
        finest = change.argsort(dim=1, descending=True, stable=True) + coarser
        return torch.cat([finest, torch.arange(coarser, device=frame.device).expand(len(frame), -1)], dim=1)


class CoarseFirstSelector(RankingSelector):
    """Ranks patches from coarse to fine, in row-major order within a scale, independently of the frame."""

    def _rank(self, frame: torch.Tensor, previous_reconstruction: torch.Tensor, frame_index: int) -> torch.Tensor:
        return torch.arange(self.config.grid.num_patches, device=frame.device).repeat(len(frame), 1)


class RandomSelector(RankingSelector):
    """
    Ranks the patches of all scales at random, differently in every frame but equally in all clips, so that a gaze does not depend
    on its batch.

    Args:
        config (`GreedyGazeConfig`, *optional*): as for every [`RankingSelector`].
        seed (`int`, *optional*, defaults to 0): seed of the random numbers.
    """

    def __init__(self, config: GreedyGazeConfig | None = None, seed: int = 0):
        super().__init__(config)
        self.seed = seed

    def _rank(self, frame: torch.Tensor, previous_reconstruction: torch.Tensor, frame_index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + frame_index)
        order = torch.randperm(self.config.grid.num_patches, generator=generator)
        return order.to(frame.device).repeat(len(frame), 1)


def baseline_selectors(grid: GazeGrid, processor: AutoGazeVideoProcessor | None = None) -> dict[str, GazeSelector]:
    """
    Makes all baseline selectors.

    Args:
        grid (`GazeGrid`): the model's scales and patches.
        processor (`AutoGazeVideoProcessor`, *optional*): preprocessing of the model, the published one by default.

    Returns:
        `dict` of [`GazeSelector`] by name: `"greedy"`, `"gain ranking"`, `"frame difference"`, `"coarse first"`, `"random"`.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.evaluation.selectors import baseline_selectors

    >>> list(baseline_selectors(GazeGrid([32, 64], patch_size=16)))
    ['greedy', 'gain ranking', 'frame difference', 'coarse first', 'random']

    ```
    """
    processor = AutoGazeVideoProcessor() if processor is None else processor
    config = GreedyGazeConfig(
        grid.scales,
        grid.patch_size,
        rescale_factor=processor.rescale_factor,
        offset=processor.offset,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    return {
        "greedy": GreedyGazeSelector(config),
        "gain ranking": GainRankingSelector(config),
        "frame difference": FrameDifferenceSelector(config),
        "coarse first": CoarseFirstSelector(config),
        "random": RandomSelector(config),
    }
