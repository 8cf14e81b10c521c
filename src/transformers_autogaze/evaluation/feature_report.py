"""Tables and curves of the comparison by encoder features."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..utils.output_files import replacing_files
from .feature_comparison import EVS, WHOLE_TOWER, FeatureRow
from .feature_selectors import OVER_TIME, UP_TO_LOSS
from .plots import Panel, check_matplotlib, draw_charts
from .report import about_lines, markdown_table


LABELS = {
    "model": "the model",
    "model-scales": "the model, four scales",
    "features": "predicted features, finest scale",
    "features-scales": "predicted features, four scales",
    "greedy": "greedy, four scales",
    "greedy-finest": "pixel difference, finest scale",
    "gain-ranking": "gain ranking, four scales",
    "random": "random, finest scale",
    "encoder": "the encoder's own features, four scales",
    "encoder-finest": "the encoder's own features, finest scale",
    EVS: "EVS",
}
"""Labels of selectors in tables, by name; other selectors appear under their names."""
CLIP_BUDGETS = (1 / 8, 1 / 4)
"""Budgets of the tables of single clips and of attentions."""
_HEADINGS = {"spread": "Frames spread over the video", "consecutive": "Consecutive frames"}
_MARKS = "os^vD"

Method = tuple[str, str]
"""Names of a selector and of an allocation."""


class FeatureTables:
    """
    Summarises rows of a comparison in Markdown tables.

    Args:
        rows (`Sequence[FeatureRow]`): rows of [`FeatureComparison`].
        sampling (`str`): sampling of the clips to use: `"consecutive"` or `"spread"`.
        dense_tokens (`int`): tokens of a clip for a dense encoder.
    """

    def __init__(self, rows: Sequence[FeatureRow], sampling: str, dense_tokens: int):
        self.dense_tokens = dense_tokens
        sampled = [row for row in rows if row.sampling == sampling]
        self.rows = [row for row in sampled if row.allocation != UP_TO_LOSS]
        self.threshold_rows = [row for row in sampled if row.allocation == UP_TO_LOSS]
        order = {name: index for index, name in enumerate(LABELS)}
        self.methods: list[Method] = sorted(
            {(row.selector, row.allocation) for row in self.rows},
            key=lambda method: (order.get(method[0], -1), method),
        )
        self.budgets = sorted({row.budget for row in self.rows})
        self.clips = list(dict.fromkeys(row.clip for row in self.rows))
        self._groups: dict[tuple[str, str, float, str], list[FeatureRow]] = {}
        for row in self.rows:
            self._groups.setdefault((row.selector, row.allocation, row.budget, row.attention), []).append(row)
        self.best_attentions = {method: self._best_attention(method) for method in self.methods}
        """`dict[Method, str]`: the attention with the highest mean cosine over all budgets."""

    def mean(self, method: Method, budget: float, measure: str, attention: str | None = None) -> float | None:
        """Returns the mean of a measure over clips, at the best attention by default; `None` without rows."""
        rows = self._groups.get((*method, budget, self.best_attentions[method] if attention is None else attention))
        return fmean(getattr(row, measure) for row in rows) if rows else None

    def seconds(self, method: Method, budget: float) -> float | None:
        """Returns the median seconds of choosing and encoding over clips, at the best attention."""
        rows = self._groups.get((*method, budget, self.best_attentions[method]))
        return median(row.seconds for row in rows) if rows else None

    def dense_seconds(self) -> float | None:
        """Returns the median seconds of the tower on all patches, if EVS was measured."""
        seconds = [row.tower_seconds for row in self.rows if row.attention == WHOLE_TOWER]
        return median(seconds) if seconds else None

    def over_budgets(self, measure: str) -> str:
        """Returns a table of a measure over budgets, with every method at its best attention."""
        return self._table(
            lambda method, budget: _cell(self.mean(method, budget, measure), self._is_exceeded(method, budget))
        )

    def seconds_over_budgets(self) -> str:
        """Returns a table of seconds of choosing and encoding over budgets."""
        return self._table(lambda method, budget: _cell(self.seconds(method, budget), digits=2))

    def attentions(self) -> str:
        """Returns a table of the cosines of all attentions at the budgets of `CLIP_BUDGETS`."""
        attentions = [a for a in dict.fromkeys(row.attention for row in self.rows) if a != WHOLE_TOWER]
        methods = [method for method in self.methods if self.best_attentions[method] != WHOLE_TOWER]
        columns = {"selector": [label(method) for method in methods]}
        for budget in self._clip_budgets:
            for attention in attentions:
                cells = [_cell(self.mean(method, budget, "cosine", attention)) for method in methods]
                columns[f"{fraction(budget)}, `{attention}`"] = cells
        return markdown_table(columns)

    def clip_by_clip(self, budget: float) -> str:
        """Returns a table of the cosine of every clip at one budget, with every method at its best attention."""
        columns = {"clip": self.clips}
        for method in self.methods:
            cosines = {
                row.clip: row.cosine for row in self._groups.get((*method, budget, self.best_attentions[method]), [])
            }
            columns[label(method)] = [_cell(cosines.get(clip)) for clip in self.clips]
        return markdown_table(columns)

    def thresholds(self) -> str:
        """Returns a table of the results of every threshold, at the attention with the highest cosine."""
        groups: dict[tuple[str, float], dict[str, list[FeatureRow]]] = {}
        for row in self.threshold_rows:
            groups.setdefault((row.selector, row.budget), {}).setdefault(row.attention, []).append(row)
        lines = []
        for (selector, threshold), by_attention in groups.items():
            attention, rows = max(by_attention.items(), key=lambda item: fmean(row.cosine for row in item[1]))
            loss, cosine, agreement, tokens = (
                fmean(getattr(row, name) for row in rows) for name in ("loss", "cosine", "agreement", "tokens")
            )
            shares = [*map(_cell, (loss, cosine, agreement)), f"{tokens / self.dense_tokens:.3f}"]
            lines.append([LABELS.get(selector, selector), attention.replace("_", "\\_"), f"{threshold:g}", *shares])
        names = ("selector", "attention", "threshold", "measured loss", "cosine", "agreement", "tokens of all")
        return markdown_table(dict(zip(names, map(list, zip(*lines, strict=True)), strict=True)))

    def markdown(self) -> str:
        """Returns all tables under headings."""
        dense = self.dense_seconds()
        dense_note = "" if dense is None else f" The tower on all patches takes {dense:.2f} s."
        parts = [
            f"### Cosine\n\n{self.over_budgets('cosine')}",
            f"### Agreement\n\n{self.over_budgets('agreement')}",
            f"### Cosine by attention\n\n{self.attentions()}",
            f"### Seconds before the language model\n\nMedians over clips, choosing and encoding.{dense_note}\n\n"
            f"{self.seconds_over_budgets()}",
        ]
        if self.threshold_rows:
            parts.insert(2, f"### Thresholds of the loss\n\n{self.thresholds()}")
        parts += [
            f"### Cosine of each clip at {fraction(budget)}\n\n{self.clip_by_clip(budget)}"
            for budget in self._clip_budgets
        ]
        return "\n\n".join(parts)

    def panels(self) -> list[Panel]:
        """Returns charts of cosine and agreement over budgets, and of cosine over seconds."""
        names = list(dict.fromkeys(name for name, _ in self.methods))
        styles = {
            label(method): {
                "color": f"C{names.index(method[0])}",
                "marker": _MARKS[names.index(method[0]) % len(_MARKS)],
                "linestyle": "-" if method[1] == OVER_TIME else "--",
            }
            for method in self.methods
        }

        def lines(x: Any, measure: str) -> dict[str, list[tuple[float, float]]]:
            return {
                label(method): [
                    (x(method, budget), value)
                    for budget in self.budgets
                    if (value := self.mean(method, budget, measure)) is not None
                ]
                for method in self.methods
            }

        share, ticks = "share of a dense encoder's tokens", {budget: fraction(budget) for budget in self.budgets}
        seconds = "seconds, choosing and encoding"
        cosines, agreements = (lines(lambda _, budget: budget, measure) for measure in ("cosine", "agreement"))
        return [
            Panel(cosines, "Similarity of features", share, "cosine", styles, True, ticks),
            Panel(agreements, "Agreement of clusters", share, "agreement", styles, True, ticks),
            Panel(lines(self.seconds, "cosine"), "Similarity over time", seconds, "cosine", styles, True),
        ]

    @property
    def _clip_budgets(self) -> list[float]:
        return [budget for budget in CLIP_BUDGETS if budget in self.budgets] or self.budgets[-1:]

    def _best_attention(self, method: Method) -> str:
        cosines: dict[str, list[float]] = {}
        for row in self.rows:
            if (row.selector, row.allocation) == method:
                cosines.setdefault(row.attention, []).append(row.cosine)
        return max(cosines, key=lambda attention: fmean(cosines[attention]))

    def _is_exceeded(self, method: Method, budget: float) -> bool:
        """Returns whether a clip has more tokens than the budget, such as with EVS, which keeps the whole first frame."""
        rows = self._groups.get((*method, budget, self.best_attentions[method]), [])
        return any(row.tokens > budget * self.dense_tokens + 1e-6 for row in rows)

    def _table(self, cell: Any) -> str:
        columns = {
            "selector": [label(method) for method in self.methods],
            "attention": [self.best_attentions[method].replace("_", "\\_") for method in self.methods],
        }
        for budget in self.budgets:
            columns[fraction(budget)] = [cell(method, budget) for method in self.methods]
        return markdown_table(columns)


def write_feature_report(
    rows: Sequence[FeatureRow], folder: str | Path, about: Mapping[str, Any], dense_tokens: int
) -> list[Path]:
    """
    Writes `results.md` and, for each sampling of the clips, curves: `spread.png`, `consecutive.png`.

    Args:
        rows (`Sequence[FeatureRow]`): rows of [`FeatureComparison`].
        folder (`str` or `Path`):
            Folder to write to, created if it is missing. The files of an earlier run are replaced together, once all new ones
            are complete.
        about (`Mapping[str, Any]`): settings of the comparison, such as the encoder, for the head of the tables.
        dense_tokens (`int`): tokens of a clip for a dense encoder.

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


def label(method: Method) -> str:
    """Returns the label of a method in tables and curves."""
    selector, allocation = method
    return f"{LABELS.get(selector, selector)}, {allocation}"


def fraction(budget: float) -> str:
    """Formats a budget, as a fraction if it is a simple one."""
    simple = Fraction(budget).limit_denominator(100)
    return str(simple) if abs(simple - budget) < 1e-9 else f"{budget:g}"


def _head(about: Mapping[str, Any], dense_tokens: int) -> str:
    return "\n".join(
        [
            *about_lines("Preserved encoder features", about),
            "",
            "Dense features are those of single frames with all patches of the finest scale. The canvas starts as the mean dense "
            "feature of all clips. In every frame the features of the kept patches are written to the places that they cover, "
            "coarse to fine; other places keep their feature. The cosine compares canvas and dense features, both minus the "
            "mean. The agreement is the share of places where both belong to the same of 6 clusters of the clip's dense "
            "features. Values are means over all places, frames and clips.",
            "",
            f'Budgets are shares of the {dense_tokens} tokens of a clip for a dense encoder. "Evenly" allocates equally many to '
            'every frame. "Over time" allocates them where they gain most; for AutoGaze as published, 198 to the first frame '
            "for every 10 to each later one; for random patches, all of the first frame and then random ones. Each row has the "
            "attention with the highest mean cosine over all budgets. EVS drops tokens after the tower has encoded all "
            "patches, and keeps at least those of the first frame. Selectors on the encoder's own features also run the whole "
            "tower first; they show how well a selector could choose if it predicted the features perfectly. Cells marked * "
            "have more tokens than the budget.",
            "",
            "A threshold is the share of the variance of features that a frame may lose according to the selector. The measured "
            "loss is the squared distance of canvas and dense features over the variance of all dense features.",
        ]
    )


def _cell(value: float | None, is_marked: bool = False, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}{'*' if is_marked else ''}"
