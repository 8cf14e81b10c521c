"""
Tables and curves of what an encoder keeps.

This module owns the form of results; it measures nothing.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..utils.output_files import replacing_files
from .feature_comparison import EVS, WHOLE_TOWER, FeatureRow
from .feature_selectors import OVER_TIME, UP_TO_LOSS
from .plots import Panel, check_matplotlib, draw_charts
from .report import markdown_table


LABELS = {
    "model": "the model",
    "model-scales": "the model, four scales",
    "features": "features foreseen, finest scale",
    "features-scales": "features foreseen, four scales",
    "greedy": "greedy, four scales",
    "greedy-finest": "pixel difference, finest scale",
    "gain-ranking": "gain ranking, four scales",
    "random": "random, finest scale",
    "encoder": "the encoder's own features, four scales",
    "encoder-finest": "the encoder's own features, finest scale",
    EVS: "EVS",
}
"""What selectors are called in tables, by name; any other is called by its name."""
CLIP_BUDGETS = (1 / 8, 1 / 4)
"""Budgets that clips are shown at one by one, and attentions against each other."""
_HEADINGS = {"spread": "Frames spread over the video", "consecutive": "Consecutive frames"}
_MARKS = "os^vD"

Way = tuple[str, str]
"""A selector and how it spends."""


class FeatureTables:
    """
    Sums up rows of a comparison and puts them into tables in Markdown.

    Args:
        rows (`Sequence[FeatureRow]`): what [`FeatureComparison`] measured.
        sampling (`str`): the clips that count: `"consecutive"` or `"spread"`.
        dense_tokens (`int`): tokens that a dense encoder makes of a clip.
    """

    def __init__(self, rows: Sequence[FeatureRow], sampling: str, dense_tokens: int):
        self.dense_tokens = dense_tokens
        here = [row for row in rows if row.sampling == sampling]
        self.rows = [row for row in here if row.spending != UP_TO_LOSS]
        self.of_thresholds = [row for row in here if row.spending == UP_TO_LOSS]
        order = {name: place for place, name in enumerate(LABELS)}
        self.ways: list[Way] = sorted(
            {(row.selector, row.spending) for row in self.rows},
            key=lambda way: (order.get(way[0], -1), way),
        )
        self.budgets = sorted({row.budget for row in self.rows})
        self.clips = list(dict.fromkeys(row.clip for row in self.rows))
        self._groups: dict[tuple[str, str, float, str], list[FeatureRow]] = {}
        for row in self.rows:
            self._groups.setdefault((row.selector, row.spending, row.budget, row.attention), []).append(row)
        self.best = {way: self._best_attention(way) for way in self.ways}
        """The attention at which each way has the highest cosine, over all budgets."""

    def mean(self, way: Way, budget: float, measure: str, attention: str | None = None) -> float | None:
        """Gives the mean over clips of one measure, at the best attention unless one is named; `None` without rows."""
        rows = self._groups.get((*way, budget, self.best[way] if attention is None else attention))
        return fmean(getattr(row, measure) for row in rows) if rows else None

    def seconds(self, way: Way, budget: float) -> float | None:
        """Gives the median over clips of the seconds of choosing and encoding, at the best attention."""
        rows = self._groups.get((*way, budget, self.best[way]))
        return median(row.seconds for row in rows) if rows else None

    def dense_seconds(self) -> float | None:
        """Gives the median seconds of the whole tower on all frames, where EVS was measured."""
        seconds = [row.tower_seconds for row in self.rows if row.attention == WHOLE_TOWER]
        return median(seconds) if seconds else None

    def over_budgets(self, measure: str) -> str:
        """Shows a measure over budgets, every way at its best attention."""
        return self._table(lambda way, budget: _shown(self.mean(way, budget, measure), self._is_exceeded(way, budget)))

    def seconds_over_budgets(self) -> str:
        """Shows seconds of choosing and encoding over budgets."""
        return self._table(lambda way, budget: _shown(self.seconds(way, budget), digits=2))

    def attentions(self) -> str:
        """Shows attentions against each other: cosines at the budgets of `CLIP_BUDGETS`."""
        attentions = [a for a in dict.fromkeys(row.attention for row in self.rows) if a != WHOLE_TOWER]
        ways = [way for way in self.ways if self.best[way] != WHOLE_TOWER]
        columns = {"selector": [label(way) for way in ways]}
        for budget in self._clip_budgets:
            for attention in attentions:
                cells = [_shown(self.mean(way, budget, "cosine", attention)) for way in ways]
                columns[f"{fraction(budget)}, `{attention}`"] = cells
        return markdown_table(columns)

    def clip_by_clip(self, budget: float) -> str:
        """Shows the cosine of every clip at one budget, every way at its best attention."""
        columns = {"clip": self.clips}
        for way in self.ways:
            found = {row.clip: row.cosine for row in self._groups.get((*way, budget, self.best[way]), [])}
            columns[label(way)] = [_shown(found.get(clip)) for clip in self.clips]
        return markdown_table(columns)

    def thresholds(self) -> str:
        """Shows what came of every threshold, at the attention with the highest cosine."""
        groups: dict[tuple[str, float], dict[str, list[FeatureRow]]] = {}
        for row in self.of_thresholds:
            groups.setdefault((row.selector, row.budget), {}).setdefault(row.attention, []).append(row)
        lines = []
        for (selector, threshold), by_attention in groups.items():
            attention, rows = max(by_attention.items(), key=lambda item: fmean(row.cosine for row in item[1]))
            loss, cosine, agreement, tokens = (
                fmean(getattr(row, name) for row in rows) for name in ("loss", "cosine", "agreement", "tokens")
            )
            shares = [*map(_shown, (loss, cosine, agreement)), f"{tokens / self.dense_tokens:.3f}"]
            lines.append([LABELS.get(selector, selector), attention.replace("_", "\\_"), f"{threshold:g}", *shares])
        names = ("selector", "attention", "threshold", "measured loss", "cosine", "agreement", "tokens of all")
        return markdown_table(dict(zip(names, map(list, zip(*lines, strict=True)), strict=True)))

    def markdown(self) -> str:
        """Puts all tables under headings."""
        dense = self.dense_seconds()
        beside = "" if dense is None else f" The whole tower on all frames takes {dense:.2f} s."
        parts = [
            f"### Cosine\n\n{self.over_budgets('cosine')}",
            f"### Agreement\n\n{self.over_budgets('agreement')}",
            f"### Attention against attention, cosine\n\n{self.attentions()}",
            f"### Seconds before the language model\n\nMedians over clips, choosing and encoding.{beside}\n\n"
            f"{self.seconds_over_budgets()}",
        ]
        if self.of_thresholds:
            parts.insert(2, f"### Thresholds of the loss\n\n{self.thresholds()}")
        parts += [
            f"### Clip by clip, cosine at {fraction(budget)}\n\n{self.clip_by_clip(budget)}"
            for budget in self._clip_budgets
        ]
        return "\n\n".join(parts)

    def panels(self) -> list[Panel]:
        """Makes charts of cosine and agreement over budgets, and of cosine over seconds."""
        names = list(dict.fromkeys(name for name, _ in self.ways))
        styles = {
            label(way): {
                "color": f"C{names.index(way[0])}",
                "marker": _MARKS[names.index(way[0]) % len(_MARKS)],
                "linestyle": "-" if way[1] == OVER_TIME else "--",
            }
            for way in self.ways
        }

        def lines(x: Any, measure: str) -> dict[str, list[tuple[float, float]]]:
            return {
                label(way): [
                    (x(way, budget), value)
                    for budget in self.budgets
                    if (value := self.mean(way, budget, measure)) is not None
                ]
                for way in self.ways
            }

        share, ticks = "share of a dense encoder's tokens", {budget: fraction(budget) for budget in self.budgets}
        seconds = "seconds, choosing and encoding"
        cosines, agreements = (lines(lambda _, budget: budget, measure) for measure in ("cosine", "agreement"))
        return [
            Panel(cosines, "What is kept of features", share, "cosine", styles, True, ticks),
            Panel(agreements, "What is kept of clusters", share, "agreement", styles, True, ticks),
            Panel(lines(self.seconds, "cosine"), "What it costs", seconds, "cosine", styles, True),
        ]

    @property
    def _clip_budgets(self) -> list[float]:
        return [budget for budget in CLIP_BUDGETS if budget in self.budgets] or self.budgets[-1:]

    def _best_attention(self, way: Way) -> str:
        cosines: dict[str, list[float]] = {}
        for row in self.rows:
            if (row.selector, row.spending) == way:
                cosines.setdefault(row.attention, []).append(row.cosine)
        return max(cosines, key=lambda attention: fmean(cosines[attention]))

    def _is_exceeded(self, way: Way, budget: float) -> bool:
        """Tells whether more was kept than the budget says, such as by EVS, whose first frame is always whole."""
        rows = self._groups.get((*way, budget, self.best[way]), [])
        return any(row.tokens > budget * self.dense_tokens + 1e-6 for row in rows)

    def _table(self, cell: Any) -> str:
        columns = {
            "selector": [label(way) for way in self.ways],
            "attention": [self.best[way].replace("_", "\\_") for way in self.ways],
        }
        for budget in self.budgets:
            columns[fraction(budget)] = [cell(way, budget) for way in self.ways]
        return markdown_table(columns)


def write_feature_report(
    rows: Sequence[FeatureRow], folder: str | Path, about: Mapping[str, Any], dense_tokens: int
) -> list[Path]:
    """
    Writes `results.md` and, for each kind of clips, curves: `spread.png`, `consecutive.png`.

    Args:
        rows (`Sequence[FeatureRow]`): what [`FeatureComparison`] measured.
        folder (`str` or `Path`):
            Where to write; made if it is missing. All files are written together: those of an earlier run stay as they
            were until these are whole, and none stays beside them.
        about (`Mapping[str, Any]`): what was measured and how, such as the encoder; written at the head of the tables.
        dense_tokens (`int`): tokens that a dense encoder makes of a clip.

    Returns:
        `list[Path]`: the files written.

    Raises:
        ValueError: if there are no rows.
        ImportError: if matplotlib, which draws the curves, is not installed.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none")
    check_matplotlib()
    text, names = [_head(about, dense_tokens)], ["results.md"]
    with replacing_files(folder, [f"{sampling}.png" for sampling in _HEADINGS]) as unfinished:
        for sampling, heading in _HEADINGS.items():
            tables = FeatureTables(rows, sampling, dense_tokens)
            if not tables.rows:
                continue
            names.append(f"{sampling}.png")
            draw_charts(unfinished / names[-1], tables.panels())
            parts = (f"## {heading}: {len(tables.clips)} clips", f"![{heading}]({names[-1]})", tables.markdown())
            text.append("\n\n".join(parts))
        (unfinished / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return [Path(folder) / name for name in names]


def label(way: Way) -> str:
    """Names a selector and its way to spend, as tables and curves do."""
    selector, spending = way
    return f"{LABELS.get(selector, selector)}, {spending}"


def fraction(budget: float) -> str:
    """Writes a budget as a fraction where it is a simple one."""
    simple = Fraction(budget).limit_denominator(100)
    return str(simple) if abs(simple - budget) < 1e-9 else f"{budget:g}"


def _head(about: Mapping[str, Any], dense_tokens: int) -> str:
    lines = ["# What an encoder keeps", ""]
    for key, value in about.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"- {key.replace('_', ' ')}: {shown}")
    lines += [
        "",
        "A map of places starts as the mean feature of all clips; frame by frame the features of the kept patches are laid on "
        "it, coarse to fine, each over the places it covers; what is not kept keeps what stood there. Cosine is that of "
        "laid and dense feature, both minus the mean; agreement is the share of places whose laid feature falls to the "
        "same of 6 clusters of the clip's dense features as the dense one. Dense features are those of every frame alone, "
        "with all patches of the finest scale. Means over all places, frames and clips.",
        "",
        f'Budgets are shares of the {dense_tokens} tokens that a dense encoder makes of a clip. "Evenly" spends as many in '
        'every frame. "Over time" spends them where and when they gain most; for AutoGaze as published, 198 in the first '
        "frame for every 10 in each later one; for random patches, the first frame whole and then any. Each row shows the "
        "attention at which its mean cosine over all budgets is highest. EVS runs the whole tower and drops tokens "
        "afterwards; it keeps the first frame whole at least. What chooses by the encoder's own features has to run the "
        "whole tower before it can choose: it shows what a selector could do that foresees features. Cells marked * keep "
        "more than the budget.",
        "",
        "A threshold is the share of the variance of features that a frame may lose, as a selector foresees it; measured is the "
        "squared distance of laid and dense features over the variance of all dense ones.",
    ]
    return "\n".join(lines)


def _shown(value: float | None, is_marked: bool = False, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}{'*' if is_marked else ''}"
