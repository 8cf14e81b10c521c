"""
Measures selectors by what an encoder keeps, clip by clip, over budgets, ways to spend them and attentions.

This module owns the protocol and the file of results, from which a run that was stopped goes on. The measure is `features`'
matter, the selectors `feature_selectors`', tables and curves `feature_report`'s.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..integrations.vision import GazeVisionModel
from ..utils.output_files import replacing
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .feature_clips import FeatureClip
from .feature_selectors import OVER_TIME, UP_TO_LOSS, ClipSelector, EncodedClip
from .features import FeatureMeasure, dense_features, keep_dissimilar, lay_features


BUDGETS = (1 / 32, 1 / 16, 1 / 12, 1 / 8, 1 / 4, 1 / 3, 1 / 2)
"""Tokens of a clip as shares of those of a dense encoder."""
THRESHOLDS = (0.1, 0.2, 0.3)
"""Shares of the variance of features that a frame may lose."""
ATTENTIONS = ("frame", "block_causal", "canvas")
"""Who may see whom in the tower."""
WHOLE_TOWER = "whole tower"
"""Stands for an attention where the tower ran on everything and tokens were dropped afterwards."""
EVS = "evs"
"""Name of dropping tokens afterwards; see [`~features.keep_dissimilar`]."""

T = TypeVar("T")


class FeatureRow(NamedTuple):
    """
    What one selector reached on one clip.

    Args:
        clip, sampling (`str`): the clip; see [`FeatureClip`].
        selector (`str`): name of what chose.
        spending (`str`): how tokens were spent; see [`ClipSelector`].
        budget (`float`): share of a dense encoder's tokens that it was to keep, or the threshold.
        attention (`str`): that of the tower.
        tokens (`int`): tokens that it kept.
        cosine, agreement, loss (`float`): see [`~features.FeatureScore`].
        choosing_seconds, tower_seconds (`float`):
            Time that choosing and encoding took. What looks at the encoder's own features has to run the whole tower
            before it chooses; for EVS, that is its only run.
    """

    clip: str
    sampling: str
    selector: str
    spending: str
    budget: float
    attention: str
    tokens: int
    cosine: float
    agreement: float
    loss: float
    choosing_seconds: float
    tower_seconds: float

    @property
    def key(self) -> tuple[str | float, ...]:
        """What was measured, without what came out."""
        return self[:6]

    @property
    def seconds(self) -> float:
        """Time until a language model could begin."""
        return self.choosing_seconds + self.tower_seconds


class FeatureStatistics(NamedTuple):
    """
    What scores are measured by.

    Args:
        mean (`list[float]`): the mean dense feature.
        variance (`float`): mean squared distance of dense features from it.
    """

    mean: list[float]
    variance: float


class FeatureComparison:
    """
    Measures selectors on clips by what one encoder keeps.

    Args:
        tower (`nn.Module`): an image tower of a known family; see [`GazeVisionModel`].
        processor ([`AutoGazeVideoProcessor`]): how frames are normalised for it.
        selectors (`Mapping` of `str` to [`ClipSelector`]): what to compare, by name.
        size (`int`): height and width in pixels that the tower sees frames at.
        budgets (`Sequence[float]`, *optional*): shares of a dense encoder's tokens, above 0 and up to 1.
        attentions (`Sequence[str]`, *optional*): attentions to run the tower with.
        thresholds (`Sequence[float]`, *optional*): shares of the variance of features that a frame may lose, 0..1, for
            selectors that foresee it.
        evs (`bool`, *optional*, defaults to `True`): whether to measure dropping tokens after the whole tower.

    Raises:
        ValueError: if an argument is out of range, or the tower's tokens cover several frames.
    """

    def __init__(
        self,
        tower: nn.Module,
        processor: AutoGazeVideoProcessor,
        selectors: Mapping[str, ClipSelector],
        size: int,
        budgets: Sequence[float] = BUDGETS,
        attentions: Sequence[str] = ATTENTIONS,
        thresholds: Sequence[float] = THRESHOLDS,
        evs: bool = True,
    ):
        for budget in budgets:
            if not 0 < budget <= 1:
                raise ValueError(
                    f"`budgets` must be above 0 and at most 1, shares of a dense encoder's tokens, got {budget}"
                )
        for threshold in thresholds:
            if not 0 <= threshold <= 1:
                raise ValueError(f"`thresholds` must lie in 0..1, shares of the variance of features, got {threshold}")
        self.finest = finest_grid(tower, size)
        self.processor, self.selectors, self.evs = processor, dict(selectors), evs
        self.budgets, self.attentions, self.thresholds = tuple(budgets), tuple(attentions), tuple(thresholds)
        grids = {self.finest, *(selector.grid for selector in self.selectors.values())}
        # One tower under several grids; its weights are there once.
        self._towers = {
            grid: GazeVisionModel(tower, grid.scales, attention=self.attentions[0] if self.attentions else "frame")
            for grid in grids
        }

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return next(self._towers[self.finest].parameters()).device

    def num_tokens(self, budget: float, num_frames: int) -> int:
        """Tokens of a clip that a budget allows, one at least."""
        return max(1, int(budget * num_frames * self.finest.num_patches + 1e-6))

    def wanted(self, clip: FeatureClip) -> list[tuple[str | float, ...]]:
        """Lists what there is to measure of a clip: the keys of its rows, in order."""
        at = clip.name, clip.sampling
        keys = [
            (*at, name, spending, budget, attention)
            for name, selector in self.selectors.items()
            for spending in selector.spendings
            for budget in self.budgets
            for attention in self.attentions
        ]
        keys += [
            (*at, name, UP_TO_LOSS, threshold, attention)
            for name, selector in self.selectors.items()
            if selector.takes_loss
            for threshold in self.thresholds
            for attention in self.attentions
        ]
        return keys + [(*at, EVS, OVER_TIME, budget, WHOLE_TOWER) for budget in self.budgets if self.evs]

    @torch.no_grad()
    def feature_statistics(self, clips: Iterable[FeatureClip]) -> dict[str, FeatureStatistics]:
        """
        Finds the mean dense feature of all clips and the variance around it, which scores are measured by.

        Args:
            clips (`Iterable` of [`FeatureClip`]): the clips, which can come one by one.

        Returns:
            `dict` of [`FeatureStatistics`] by `sampling` of the clips.
        """
        moments: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for clip in clips:
            values = self.processor.to_pixel_values(clip.levels.to(self.device))
            dense = dense_features(self._towers[self.finest], values).double()
            moments.setdefault(clip.sampling, []).append((dense.mean((0, 1)), dense.square().sum(-1).mean()))
        statistics = {}
        for sampling, of_clips in moments.items():
            mean, square = (torch.stack(moment).mean(0) for moment in zip(*of_clips, strict=True))
            statistics[sampling] = FeatureStatistics(mean.tolist(), float(square - mean.square().sum()))
        return statistics

    @torch.no_grad()
    def measure(
        self,
        clip: FeatureClip,
        statistics: FeatureStatistics | None = None,
        done: Collection[tuple[str | float, ...]] = (),
    ) -> Iterator[FeatureRow]:
        """
        Measures one clip.

        Args:
            clip ([`FeatureClip`]): frames of the tower's size.
            statistics ([`FeatureStatistics`], *optional*): see [`~FeatureComparison.feature_statistics`]; the clip's own by
                default.
            done (`Collection[tuple]`, *optional*): keys of rows that are there already and need no measuring.

        Yields:
            [`FeatureRow`]: the other rows of `wanted`, in order.
        """
        missing: dict[tuple[str, str, float], list[str]] = {}
        for *_, name, spending, budget, attention in (key for key in self.wanted(clip) if key not in done):
            missing.setdefault((name, spending, budget), []).append(attention)
        if not missing:
            return
        levels = clip.levels.to(device := self.device)
        encoded = EncodedClip(levels, self.processor.to_pixel_values(levels))
        dense, dense_seconds = _timed(device, dense_features, self._towers[self.finest], encoded.encoder_values)
        mean, variance = (None, None) if statistics is None else (torch.tensor(statistics.mean), statistics.variance)
        measure = FeatureMeasure(dense, mean, variance)
        prepared: dict[str, tuple[Any, float]] = {}
        for (name, spending, budget), attentions in missing.items():
            count, at = self.num_tokens(budget, len(levels)), (clip.name, clip.sampling, name, spending, budget)
            count = budget if spending == UP_TO_LOSS else count
            if name == EVS:
                gaze, seconds = _timed(device, keep_dissimilar, dense, count, self.finest)
                kept = dense[gaze.gazing_mask[-1][0]]
                score = measure(lay_features(kept, gaze, measure.mean))
                yield FeatureRow(*at, WHOLE_TOWER, len(kept), *score, seconds, dense_seconds)
                continue
            selector = self.selectors[name]
            if name not in prepared:
                prepared = {name: _timed(device, selector.prepare, encoded)}
            gaze, seconds = _timed(device, selector.gaze, prepared[name][0], count, spending)
            choosing = prepared[name][1] + seconds
            for attention in attentions:
                kept, seconds = _timed(device, self._encode, encoded, gaze, attention)
                score = measure(lay_features(kept, gaze, measure.mean))
                yield FeatureRow(*at, attention, len(kept), *score, choosing, seconds)

    def _encode(self, clip: EncodedClip, gaze: GazeOutput, attention: str) -> torch.Tensor:
        tower = self._towers[gaze.grid]
        features = tower(clip.encoder_values[None], gaze, attention=attention).last_hidden_state
        return features.to(torch.promote_types(features.dtype, torch.float32))


def finest_grid(tower: nn.Module, size: int | None = None) -> GazeGrid:
    """
    Gives the patches of frames that a tower sees at one size.

    Args:
        tower (`nn.Module`): an image tower of a known family; see [`GazeVisionModel`].
        size (`int`, *optional*): height and width in pixels; 14 patches by default.

    Returns:
        [`GazeGrid`] of one scale.

    Raises:
        ValueError: if `size` is no multiple of the patch size, or the tower's tokens cover several frames.
    """
    adapter = GazeVisionModel(tower).adapter
    patch = adapter.patch_embedding.kernel_size[-1]
    if adapter.tubelet_size != 1:
        raise ValueError(
            f"`encoder` must be a tower of images, whose tokens cover one frame, got {adapter.model_type}, whose tokens "
            f"cover {adapter.tubelet_size}"
        )
    size = 14 * patch if size is None else size
    if size < patch or size % patch:
        raise ValueError(f"`size` must be a positive multiple of the encoder's patch size {patch}, got {size}")
    return GazeGrid([size], patch)


class FeatureResults:
    """
    Rows of a comparison and the file that they are kept in.

    Args:
        path (`str` or `os.PathLike`): a JSON file. Rows that lie there are read, to go on from them.
        settings (`Mapping[str, Any]`): what rows must have in common to stand in one table, ready for JSON.

    Raises:
        ValueError: if the file holds something else or rows of other settings.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.feature_comparison import FeatureResults, FeatureRow

    >>> results = FeatureResults("results.json", {"encoder": "dinov2"})
    >>> row = FeatureRow("a.mp4", "spread", "random", "evenly", 0.25, "frame", 784, 0.5, 0.4, 0.6, 0.0, 0.3)
    >>> results.add([row])
    >>> FeatureResults("results.json", {"encoder": "dinov2"}).rows == [row]
    True

    ```
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), dict(settings)
        self.rows: list[FeatureRow] = []
        self.statistics: dict[str, FeatureStatistics] = {}
        """Mean and variance of dense features that scores were measured by, by sampling of the clips."""
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before, columns, rows, statistics = (found[key] for key in ("settings", "columns", "rows", "statistics"))
            self.statistics = {sampling: FeatureStatistics(*values) for sampling, values in statistics.items()}
            if tuple(columns) != FeatureRow._fields:
                raise ValueError(f"its columns are {columns}")
            self.rows = [FeatureRow(*row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} must hold results of such a comparison to go on from; choose another folder, or delete it"
            ) from error
        for key in {**before, **self.settings}:
            if before.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.path} holds results with {key}={before.get(key)!r}, but it is {self.settings.get(key)!r} "
                    "now; choose another folder, or delete it"
                )

    @property
    def keys(self) -> set[tuple[str | float, ...]]:
        """What the rows are about."""
        return {row.key for row in self.rows}

    def add(self, rows: Sequence[FeatureRow] = (), statistics: Mapping[str, FeatureStatistics] | None = None) -> None:
        """Adds rows and statistics, and writes the file anew in one step, so that it is whole whenever work is stopped."""
        self.rows += [
            row._replace(**{key: round(getattr(row, key), digits) for key, digits in _DIGITS.items()}) for row in rows
        ]
        for key, (mean, variance) in (statistics or {}).items():
            self.statistics[key] = FeatureStatistics([round(value, 6) for value in mean], variance)
        parts = {"settings": self.settings, "statistics": self.statistics, "columns": FeatureRow._fields}
        head = ",\n".join(f'"{key}": {json.dumps(part)}' for key, part in parts.items())
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
        with replacing(self.path) as unfinished:
            unfinished.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


_DIGITS = {"cosine": 4, "agreement": 4, "loss": 4, "choosing_seconds": 3, "tower_seconds": 3}


def _timed(device: torch.device, call: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Calls and tells how many seconds it took, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
