"""
Comparison of selectors on clips of video, by their reconstructions.

This module has the protocol: clips, settings, measures and averages. `quality` defines the measures and `report` writes them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm

from ..composite_autogaze import CompositeReconstruction, mse_to_task_loss
from ..frame_decoding_autogaze import read_video
from ..gazing_autogaze import GazeOutput
from ..modeling_autogaze import AutoGazeModel
from ..selection_autogaze import GazeSelector, resize_frames
from ..token_budgets_autogaze import budget_each_frame
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .quality import efficiency, l1, psnr, ssim


class EvaluationClips(NamedTuple):
    """
    Clips to measure selectors on.

    Args:
        names (`list[str]`): name of the video and index of the first frame, for each clip.
        pixel_values_videos (`torch.FloatTensor` of shape `(clips, frames, 3, height, width)`): normalised frames.
    """

    names: list[str]
    pixel_values_videos: torch.Tensor


class GazeSetting(NamedTuple):
    """
    Budget and threshold of a selector.

    Args:
        gazing_ratio (`float`): share of the patches of a frame to keep, the maximum if there is a threshold.
        task_loss_requirement (`float`, *optional*): loss at which a frame ends.
    """

    gazing_ratio: float
    task_loss_requirement: float | None = None


PROTOCOL = (GazeSetting(0.10), GazeSetting(0.25), GazeSetting(0.75, 0.7))
"""The default settings of a comparison."""


@dataclass
class SelectorScores:
    """
    Scores of one selector at one setting, as means over all frames of all clips.

    Args:
        selector (`str`): its name.
        gazing_ratio, task_loss_requirement (`float`, the second *optional*): the setting.
        task_loss (`float`): `(40 - PSNR) / 20` of the closed-form reconstruction.
        psnr, ssim, l1 (`float`): quality of the closed-form reconstruction; PSNR in dB, of pixels in 0..1.
        patches_per_frame (`float`): kept patches.
        reduction_factor (`float`): patches of the finest scale, which a dense encoder sees, over kept patches.
        predicted_loss_error (`float`, *optional*):
            Mean absolute difference between the predicted and the measured loss after each kept patch; `None` for selectors
            that do not predict losses.
        threshold_share (`float`, *optional*): share of frames whose measured loss meets the threshold, if there is one.
        efficiency (`float`, *optional*):
            See [`~quality.efficiency`]; for settings without a threshold, if `"greedy"` and `"random"` are compared as well.
        patches_over_greedy (`float`, *optional*):
            Kept patches over those of `"greedy"`; for settings with a threshold, if it is compared as well.
        each_clip (`list[dict]`): for every clip its `name`, `task_loss`, `psnr` and total `num_patches`.
        predictions (`list[tuple[float, float]]`): predicted and measured loss after each kept patch.
    """

    selector: str
    gazing_ratio: float
    task_loss_requirement: float | None
    task_loss: float
    psnr: float
    ssim: float
    l1: float
    patches_per_frame: float
    reduction_factor: float
    predicted_loss_error: float | None
    threshold_share: float | None
    efficiency: float | None = None
    patches_over_greedy: float | None = None
    each_clip: list[dict[str, Any]] = field(default_factory=list, repr=False)
    predictions: list[tuple[float, float]] = field(default_factory=list, repr=False)


def load_clips(
    videos: Sequence[str | os.PathLike],
    processor: AutoGazeVideoProcessor | None = None,
    size: int | tuple[int, int] = 224,
    num_frames: int = 16,
    max_clips: int = 4,
) -> EvaluationClips:
    """
    Cuts videos into clips of consecutive frames, from their beginning, and preprocesses them.

    Args:
        videos (`Sequence` of `str` or `os.PathLike`): the videos; see [`read_video`].
        processor (`AutoGazeVideoProcessor`, *optional*): preprocessing, the published one by default.
        size (`int` or `tuple[int, int]`, *optional*, defaults to 224): height and width of the clips in pixels.
        num_frames (`int`, *optional*, defaults to 16): frames of a clip.
        max_clips (`int`, *optional*, defaults to 4): maximum number of clips of a video; remaining frames are not used.

    Returns:
        [`EvaluationClips`]

    Raises:
        ValueError: if a video cannot be read or is too short, or a number is below 1.
    """
    for name, value in {"num_frames": num_frames, "max_clips": max_clips}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if not videos:
        raise ValueError("`videos` must name at least one video, got none")
    processor = AutoGazeVideoProcessor() if processor is None else processor
    names, clips = [], []
    for video in videos:
        frames, _ = read_video(video)
        count = min(max_clips, len(frames) // num_frames)
        if not count:
            raise ValueError(f"`videos`: {video} has {len(frames)} frames, a clip needs {num_frames}")
        frames = frames[: count * num_frames]
        values = processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        clips.append(resize_frames(values, size).view(count, num_frames, 3, *_pair(size)))
        names += [f"{os.path.basename(video)}:{index * num_frames}" for index in range(count)]
    return EvaluationClips(names, torch.cat(clips))


@torch.no_grad()
def evaluate_selectors(
    selectors: Mapping[str, GazeSelector],
    clips: EvaluationClips,
    settings: Sequence[GazeSetting | tuple[float, float | None]] = PROTOCOL,
    processor: AutoGazeVideoProcessor | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> list[SelectorScores]:
    """
    Runs selectors on the same clips and measures the reconstructions from their patches.

    All selectors must have the same device and grid. Efficiency needs `"greedy"` and `"random"` among them; see
    [`~selectors.baseline_selectors`].

    Args:
        selectors (`Mapping` of `str` to [`GazeSelector`]): selectors to compare, by name.
        clips ([`EvaluationClips`]): clips in the selectors' size; see [`load_clips`].
        settings (`Sequence[GazeSetting]`, *optional*): by default ratios 0.10 and 0.25, and 0.75 with the threshold 0.7.
        processor (`AutoGazeVideoProcessor`, *optional*): preprocessing of the clips, the published one by default.
        batch_size (`int`, *optional*, defaults to 4): clips in a batch, which does not change the results.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        `list[SelectorScores]`: one for each setting and selector, in the order given, settings first.

    Raises:
        ValueError: if there is no selector or setting, the selectors differ in their grids, a setting is out of range, or
            the clips have another size.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.evaluation import EvaluationClips, baseline_selectors, evaluate_selectors

    >>> clips = EvaluationClips(["noise:0"], torch.randn(1, 2, 3, 64, 64))
    >>> scores = evaluate_selectors(baseline_selectors(GazeGrid([32, 64], 16)), clips, settings=[(0.5, None)])
    >>> [(s.selector, s.efficiency) for s in scores if s.selector in ("greedy", "random")]
    [('greedy', 1.0), ('random', 0.0)]

    ```
    """
    composite = CompositeReconstruction(_common_grid(selectors, clips))
    named_settings = [GazeSetting(*setting) for setting in settings]
    if not named_settings:
        raise ValueError("`settings` must hold at least one setting, got none")
    for setting in named_settings:
        budget_each_frame(setting.gazing_ratio, 1, composite.grid.num_patches)
    processor = AutoGazeVideoProcessor() if processor is None else processor

    scores = []
    steps = len(named_settings) * len(selectors) * len(clips.names)
    with tqdm(total=steps, unit="clip", desc="evaluating", disable=not progress) as bar:
        for setting in named_settings:
            for name, selector in selectors.items():
                accumulator = _ScoreAccumulator(composite)
                for values in clips.pixel_values_videos.split(batch_size):
                    values = values.to(getattr(selector, "device", "cpu"))
                    accumulator.add(*_gaze(selector, values, setting), processor.to_pixels(values.float()).clamp(0, 1))
                    bar.update(len(values))
                scores.append(accumulator.scores(name, setting, clips.names))
    compare_scores(scores)
    return scores


def compare_scores(scores: Sequence[SelectorScores]) -> None:
    """
    Sets the scores relative to `"greedy"` and `"random"` at the same setting: `efficiency` and `patches_over_greedy`.

    [`evaluate_selectors`] calls it. It also joins scores of several calls, so that the baselines are measured only once while a
    model trains.

    Args:
        scores (`Sequence[SelectorScores]`): scores on the same clips, at any settings; they are modified.
    """
    by_name = {(score.selector, score.gazing_ratio, score.task_loss_requirement): score for score in scores}
    for score in scores:
        setting = score.gazing_ratio, score.task_loss_requirement
        greedy, random = by_name.get(("greedy", *setting)), by_name.get(("random", *setting))
        if score.task_loss_requirement is None:
            # Efficiency is not defined if random patches are as good as greedy search, such as when all are kept.
            if greedy is not None and random is not None and greedy.task_loss != random.task_loss:
                score.efficiency = efficiency(score.task_loss, random.task_loss, greedy.task_loss)
        elif greedy is not None:
            score.patches_over_greedy = score.patches_per_frame / greedy.patches_per_frame


def _gaze(selector: GazeSelector, values: torch.Tensor, setting: GazeSetting) -> tuple[GazeOutput, bool]:
    """Returns a gaze, and whether its losses are predictions."""
    if isinstance(selector, AutoGazeModel):
        return selector.generate(values.to(selector.dtype), **setting._asdict(), output_scores=True), True
    # Other selectors measure their losses.
    return selector.generate(values, **setting._asdict()), False


class _ScoreAccumulator:
    """Accumulates the measures of one selector at one setting over batches."""

    def __init__(self, composite: CompositeReconstruction):
        self.composite = composite
        self.frames: dict[str, list[torch.Tensor]] = {}  # each `(clips, frames)`
        self.predicted: list[torch.Tensor] = []
        self.measured: list[torch.Tensor] = []

    def add(self, gaze: GazeOutput, predicts: bool, pixels: torch.Tensor) -> None:
        rebuilt, loss = self.composite(pixels, gaze)
        measures = {
            "task_loss": loss,
            "psnr": psnr(rebuilt, pixels),
            "ssim": ssim(rebuilt, pixels),
            "l1": l1(rebuilt, pixels),
            "num_patches": gaze.num_real_each_frame,
        }
        for key, value in measures.items():
            self.frames.setdefault(key, []).append(value.double().cpu())
        if predicts:
            is_real = ~gaze.if_padded_gazing
            self.predicted.append(gaze.task_loss_prediction[is_real].float().cpu())
            self.measured.append(mse_to_task_loss(self.composite.measure(pixels, gaze))[is_real].cpu())

    def scores(self, name: str, setting: GazeSetting, names: Sequence[str]) -> SelectorScores:
        frames = {key: torch.cat(values) for key, values in self.frames.items()}
        means = {key: float(values.mean()) for key, values in frames.items()}
        patches = means.pop("num_patches")
        threshold, share, error, predictions = setting.task_loss_requirement, None, None, []
        if threshold is not None:
            # Selectors that measure their losses stop exactly at the threshold, up to rounding in float32.
            share = float((frames["task_loss"] <= threshold + 1e-4).double().mean())
        if self.predicted:
            predicted, measured = torch.cat(self.predicted), torch.cat(self.measured)
            error = float((predicted - measured).abs().mean())
            predictions = list(zip(predicted.tolist(), measured.tolist(), strict=True))
        each_clip = [
            {
                "name": clip,
                "task_loss": float(frames["task_loss"][index].mean()),
                "psnr": float(frames["psnr"][index].mean()),
                "num_patches": int(frames["num_patches"][index].sum()),
            }
            for index, clip in enumerate(names)
        ]
        return SelectorScores(
            name,
            *setting,
            **means,
            patches_per_frame=patches,
            reduction_factor=self.composite.grid.num_patches_each_scale[-1] / patches,
            predicted_loss_error=error,
            threshold_share=share,
            each_clip=each_clip,
            predictions=predictions,
        )


def _common_grid(selectors: Mapping[str, GazeSelector], clips: EvaluationClips):
    if not selectors:
        raise ValueError("`selectors` must hold at least one selector, got none")
    grids = {name: selector.config.grid for name, selector in selectors.items()}
    grid = next(iter(grids.values()))
    if any(other != grid for other in grids.values()):
        raise ValueError(f"`selectors` must share one grid, got {grids}")
    given = tuple(clips.pixel_values_videos.shape)
    if len(given) != 5 or given[0] != len(clips.names) or given[2:] != (3, *grid.sizes[-1]):
        raise ValueError(
            f"`clips` must hold {len(clips.names)} clips of shape (frames, 3, {grid.sizes[-1][0]}, "
            f"{grid.sizes[-1][1]}), the selectors' size, got the shape {given}"
        )
    return grid


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
