"""
Comparison of selectors by the encoder features that are preserved, over clips, budgets, allocations and attentions.

This module has the protocol and the file of results, from which an interrupted run is resumed. `features` defines the measure,
`feature_selectors` the selectors, and `feature_report` writes tables and curves.
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
from ..utils.json_files import describe_json, read_json_object
from ..utils.output_files import replacing
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .feature_clips import FeatureClip
from .feature_selectors import OVER_TIME, UP_TO_LOSS, ClipSelector, EncodedClip
from .features import FeatureMeasure, canvas_features, dense_features, keep_dissimilar


BUDGETS = (1 / 32, 1 / 16, 1 / 12, 1 / 8, 1 / 4, 1 / 3, 1 / 2)
"""Tokens of a clip as shares of those of a dense encoder."""
THRESHOLDS = (0.1, 0.2, 0.3)
"""Shares of the variance of features that a frame may lose."""
ATTENTIONS = ("frame", "block_causal", "canvas")
"""Attentions of the tower; see [`GazeVisionModel`]."""
WHOLE_TOWER = "whole tower"
"""The attention of rows where the tower encodes all patches and tokens are dropped afterwards."""
EVS = "evs"
"""Name of the method that drops tokens after the tower; see [`~features.keep_dissimilar`]."""

T = TypeVar("T")


class FeatureRow(NamedTuple):
    """
    Result of one selector on one clip.

    Args:
        clip, sampling (`str`): the clip; see [`FeatureClip`].
        selector (`str`): name of the selector.
        allocation (`str`): allocation of tokens to frames; see [`ClipSelector`].
        budget (`float`): share of a dense encoder's tokens to keep, or the threshold.
        attention (`str`): attention of the tower.
        tokens (`int`): number of kept tokens.
        cosine, agreement, loss (`float`): see [`~features.FeatureScore`].
        choosing_seconds, tower_seconds (`float`):
            Times of choosing and of encoding. The first includes a run of the whole tower for selectors that use the encoder's
            own features; EVS runs the tower only once.
    """

    clip: str
    sampling: str
    selector: str
    allocation: str
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
        """The fields that identify a row."""
        return self[:6]

    @property
    def seconds(self) -> float:
        """Total time before the language model."""
        return self.choosing_seconds + self.tower_seconds


class FeatureStatistics(NamedTuple):
    """
    Statistics of dense features that scores are relative to.

    Args:
        mean (`list[float]`): the mean dense feature.
        variance (`float`): mean squared distance of dense features from the mean.
    """

    mean: list[float]
    variance: float


class FeatureComparison:
    """
    Measures selectors on clips by the features of one encoder that are preserved.

    Args:
        tower (`nn.Module`): an image tower that [`GazeVisionModel`] supports.
        processor ([`AutoGazeVideoProcessor`]): normalisation of its frames.
        selectors (`Mapping` of `str` to [`ClipSelector`]): selectors to compare, by name.
        size (`int`): height and width of the tower's frames in pixels.
        budgets (`Sequence[float]`, *optional*): shares of a dense encoder's tokens, above 0 and up to 1.
        attentions (`Sequence[str]`, *optional*): attentions to run the tower with.
        thresholds (`Sequence[float]`, *optional*): shares of the variance of features that a frame may lose, 0..1, for
            selectors that predict this loss.
        evs (`bool`, *optional*, defaults to `True`): whether to measure EVS, which drops tokens after the tower.

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
        # The models of several grids share the weights of the tower.
        self._towers = {
            grid: GazeVisionModel(tower, grid.scales, attention=self.attentions[0] if self.attentions else "frame")
            for grid in grids
        }

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        return next(self._towers[self.finest].parameters()).device

    def num_tokens(self, budget: float, num_frames: int) -> int:
        """Returns the number of tokens of a clip for a budget, at least one."""
        return max(1, int(budget * num_frames * self.finest.num_patches + 1e-6))

    def row_keys(self, clip: FeatureClip) -> list[tuple[str, str, str, str, float, str]]:
        """Returns the keys of all rows of a clip, in order."""
        clip_key = clip.name, clip.sampling
        keys = [
            (*clip_key, name, allocation, budget, attention)
            for name, selector in self.selectors.items()
            for allocation in selector.allocations
            for budget in self.budgets
            for attention in self.attentions
        ]
        keys += [
            (*clip_key, name, UP_TO_LOSS, threshold, attention)
            for name, selector in self.selectors.items()
            if selector.takes_threshold
            for threshold in self.thresholds
            for attention in self.attentions
        ]
        return keys + [(*clip_key, EVS, OVER_TIME, budget, WHOLE_TOWER) for budget in self.budgets if self.evs]

    @torch.no_grad()
    def feature_statistics(self, clips: Iterable[FeatureClip]) -> dict[str, FeatureStatistics]:
        """
        Computes the mean and variance of the dense features of all clips, which scores are relative to.

        Args:
            clips (`Iterable` of [`FeatureClip`]): the clips, which are processed one by one.

        Returns:
            `dict` of [`FeatureStatistics`] by the `sampling` of the clips.
        """
        moments: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for clip in clips:
            values = self.processor.to_pixel_values(clip.levels.to(self.device))
            dense = dense_features(self._towers[self.finest], values).double()
            moments.setdefault(clip.sampling, []).append((dense.mean((0, 1)), dense.square().sum(-1).mean()))
        statistics = {}
        for sampling, clip_moments in moments.items():
            mean, square = (torch.stack(moment).mean(0) for moment in zip(*clip_moments, strict=True))
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
            done (`Collection[tuple]`, *optional*): keys of rows that were measured before.

        Yields:
            [`FeatureRow`]: the remaining rows of `row_keys`, in order.
        """
        missing: dict[tuple[str, str, float], list[str]] = {}
        for *_, name, allocation, budget, attention in (key for key in self.row_keys(clip) if key not in done):
            missing.setdefault((name, allocation, budget), []).append(attention)
        if not missing:
            return
        levels = clip.levels.to(device := self.device)
        encoded = EncodedClip(levels, self.processor.to_pixel_values(levels))
        dense, dense_seconds = _timed(device, dense_features, self._towers[self.finest], encoded.encoder_values)
        mean, variance = (None, None) if statistics is None else (torch.tensor(statistics.mean), statistics.variance)
        measure = FeatureMeasure(dense, mean, variance)
        prepared: dict[str, tuple[Any, float]] = {}
        for (name, allocation, budget), attentions in missing.items():
            key = clip.name, clip.sampling, name, allocation, budget
            limit = budget if allocation == UP_TO_LOSS else self.num_tokens(budget, len(levels))
            if name == EVS:
                gaze, seconds = _timed(device, keep_dissimilar, dense, limit, self.finest)
                kept = dense[gaze.gazing_mask[-1][0]]
                score = measure(canvas_features(kept, gaze, measure.mean))
                yield FeatureRow(*key, WHOLE_TOWER, len(kept), *score, seconds, dense_seconds)
                continue
            selector = self.selectors[name]
            if name not in prepared:
                prepared = {name: _timed(device, selector.prepare, encoded)}
            gaze, seconds = _timed(device, selector.gaze, prepared[name][0], limit, allocation)
            choosing_seconds = prepared[name][1] + seconds
            for attention in attentions:
                kept, seconds = _timed(device, self._encode, encoded, gaze, attention)
                score = measure(canvas_features(kept, gaze, measure.mean))
                yield FeatureRow(*key, attention, len(kept), *score, choosing_seconds, seconds)

    def _encode(self, clip: EncodedClip, gaze: GazeOutput, attention: str) -> torch.Tensor:
        tower = self._towers[gaze.grid]
        features = tower(clip.encoder_values[None], gaze, attention=attention).last_hidden_state
        return features.to(torch.promote_types(features.dtype, torch.float32))


def finest_grid(tower: nn.Module, size: int | None = None) -> GazeGrid:
    """
    Returns the grid of a tower's patches at one size.

    Args:
        tower (`nn.Module`): an image tower that [`GazeVisionModel`] supports.
        size (`int`, *optional*): height and width in pixels; 14 patches by default.

    Returns:
        [`GazeGrid`] of one scale.

    Raises:
        ValueError: if `size` is not a multiple of the patch size, or the tower's tokens cover several frames.
    """
    adapter = GazeVisionModel(tower).adapter
    embedding: Any = adapter.patch_embedding
    patch = embedding.kernel_size[-1]
    if adapter.tubelet_size != 1:
        raise ValueError(
            f"`encoder` must be an image tower, whose tokens cover one frame, got {adapter.model_type}, whose tokens "
            f"cover {adapter.tubelet_size}"
        )
    size = 14 * patch if size is None else size
    if size < patch or size % patch:
        raise ValueError(f"`size` must be a positive multiple of the encoder's patch size {patch}, got {size}")
    return GazeGrid([size], patch)


class FeatureResults:
    """
    Rows of a comparison, kept in a file.

    Args:
        path (`str` or `os.PathLike`): a JSON file. The rows of an existing file are read.
        settings (`Mapping[str, Any]`): settings that all rows of a file must share, as JSON values.

    Raises:
        ValueError: if the file has another format or rows of other settings.

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
        """Mean and variance of dense features that scores are relative to, by sampling of the clips."""
        if not self.path.exists():
            return
        expected = "results of such a comparison, to be resumed (choose another folder, or delete it)"
        kinds = {"settings": dict, "statistics": dict, "columns": list, "rows": list}
        content = read_json_object(self.path, str(self.path), expected, kinds)
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{self.path} must hold {expected}, got {describe_json(content[key])} as {key!r}")
        before = content["settings"]
        if tuple(content["columns"]) != _COLUMNS:
            raise ValueError(
                f"{self.path} must hold {expected}, with the columns {_COLUMNS}, got {content['columns']}"
            )
        try:
            self.statistics = {key: FeatureStatistics(*values) for key, values in content["statistics"].items()}
            self.rows = [FeatureRow(*row) for row in content["rows"]]
        except TypeError as error:
            raise ValueError(
                f"{self.path} must hold {expected}, with {len(_COLUMNS)} values in each row and a mean and a variance for each "
                "sampling, got others"
            ) from error
        for key in {**before, **self.settings}:
            if before.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.path} holds results with {key}={before.get(key)!r}, but it is {self.settings.get(key)!r} "
                    "now; choose another folder, or delete it"
                )

    @property
    def keys(self) -> set[tuple[str | float, ...]]:
        """The keys of all rows."""
        return {row.key for row in self.rows}

    def add(self, rows: Sequence[FeatureRow] = (), statistics: Mapping[str, FeatureStatistics] | None = None) -> None:
        """Adds rows and statistics, and replaces the file in one step, so that it is complete after an interruption."""
        self.rows += [
            row._replace(**{key: round(getattr(row, key), digits) for key, digits in _DIGITS.items()}) for row in rows
        ]
        for key, (mean, variance) in (statistics or {}).items():
            self.statistics[key] = FeatureStatistics([round(value, 6) for value in mean], variance)
        parts = {"settings": self.settings, "statistics": self.statistics, "columns": _COLUMNS}
        head = ",\n".join(f'"{key}": {json.dumps(part)}' for key, part in parts.items())
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
        with replacing(self.path) as unfinished:
            unfinished.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


_COLUMNS = tuple("spending" if name == "allocation" else name for name in FeatureRow._fields)
"""Names of the fields in files."""
_DIGITS = {"cosine": 4, "agreement": 4, "loss": 4, "choosing_seconds": 3, "tower_seconds": 3}


def _timed(device: torch.device, call: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Returns the result of a call and its seconds, measured after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
