"""Reports of a comparison of selectors: a JSON file, Markdown tables and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.output_files import replacing_files, to_json
from .comparison import SelectorScores
from .plots import Panel, check_matplotlib, draw_charts


_BIN_WIDTH = 0.1  # of predicted loss
_MIN_BIN_COUNT = 20
CURVES = ("quality_over_patches", "measured_over_predicted_loss")
"""Names of the charts."""


def write_report(
    scores: Sequence[SelectorScores], folder: str | Path, about: Mapping[str, Any], model: str = "model"
) -> list[Path]:
    """
    Writes `results.json`, `results.md`, `quality_over_patches.png` and, where the model predicts losses,
    `measured_over_predicted_loss.png`.

    Args:
        scores (`Sequence[SelectorScores]`): output of [`evaluate_selectors`].
        folder (`str` or `Path`):
            Folder to write to, created if it is missing. The files of an earlier run are replaced together, once all new ones
            are complete.
        about (`Mapping[str, Any]`): settings of the comparison, such as the videos, as JSON values.
        model (`str`, *optional*, defaults to `"model"`): the selector whose predictions and single clips are reported.

    Returns:
        `list[Path]`: the files written.

    Raises:
        ValueError: if there are no scores.
        ImportError: if matplotlib, which draws the curves, is not installed.
    """
    if not scores:
        raise ValueError("`scores` must hold at least one entry, got none")
    check_matplotlib()
    predictions = [pair for score in scores if score.selector == model for pair in score.predictions]
    bins = calibration(predictions)
    rows = [{key: value for key, value in asdict(score).items() if key != "predictions"} for score in scores]
    results = to_json({**about, "scores": rows, "calibration": bins}, indent=1) + "\n"

    charts = {}
    if curves := _quality_curves(scores):
        charts[CURVES[0]] = Panel(
            curves, "Reconstruction from the kept patches", "patches kept of a frame", "PSNR (dB)"
        )
    if bins:
        lines = {
            "mean": [(part["predicted"], part["measured"]) for part in bins],
            "10 % below": [(part["predicted"], part["low"]) for part in bins],
            "10 % above": [(part["predicted"], part["high"]) for part in bins],
            "equal": [(part["predicted"], part["predicted"]) for part in bins],
        }
        charts[CURVES[1]] = Panel(lines, "Measured over predicted loss", "predicted loss", "measured loss")

    text = [
        *about_lines("Quality of the reconstructions from kept patches", about),
        "",
        "Values are means over all frames. Frames are reconstructed from their kept patches and the frame before by the closed "
        "form. The task loss is (40 - PSNR) / 20. Efficiency is 1 for greedy search and 0 for random patches. Predicted losses "
        "are compared with the measured ones after every kept patch.",
        markdown_tables(scores, model),
    ]
    text += [f"\n![{name.replace('_', ' ')}]({name}.png)" for name in charts]
    names = ["results.json", *(f"{name}.png" for name in charts), "results.md"]
    with replacing_files(folder, [f"{name}.png" for name in CURVES]) as unfinished:
        (unfinished / "results.json").write_text(results, encoding="utf-8")
        for name, panel in charts.items():
            draw_charts(unfinished / f"{name}.png", [panel])
        (unfinished / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return [Path(folder) / name for name in names]


def markdown_tables(scores: Sequence[SelectorScores], model: str = "model") -> str:
    """
    Formats scores as one table for every setting, and for settings with a threshold another one of single clips.

    Args:
        scores (`Sequence[SelectorScores]`): output of [`evaluate_selectors`].
        model (`str`, *optional*, defaults to `"model"`): the selector in the tables of single clips, beside `"greedy"`.

    Returns:
        `str`: the tables in Markdown, each under a heading.
    """
    groups: dict[tuple[float, float | None], list[SelectorScores]] = {}
    for score in scores:
        groups.setdefault((score.gazing_ratio, score.task_loss_requirement), []).append(score)
    parts = []
    for (ratio, threshold), group in groups.items():
        columns = {
            "selector": [score.selector for score in group],
            "task loss": [f"{score.task_loss:.3f}" for score in group],
            "PSNR (dB)": [f"{score.psnr:.2f}" for score in group],
            "SSIM": [f"{score.ssim:.3f}" for score in group],
            "L1": [f"{score.l1:.4f}" for score in group],
            "patches a frame": [f"{score.patches_per_frame:.1f}" for score in group],
            "reduction": [f"{score.reduction_factor:.1f}x" for score in group],
            "efficiency": [_or_dash(score.efficiency, ".2f") for score in group],
            "frames that meet the threshold": [_or_dash(score.threshold_share, ".1%") for score in group],
            "patches over greedy's": [_or_dash(score.patches_over_greedy, ".2f") for score in group],
            "predicted loss off by": [_or_dash(score.predicted_loss_error, ".3f") for score in group],
        }
        # Columns that are not defined at this setting are left out.
        columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
        limit = "" if threshold is None else f", threshold {threshold:g}"
        parts.append(f"\n## Ratio {ratio:g}{limit}\n\n{markdown_table(columns)}")
        if threshold is not None:
            parts.append(_clip_table([score for score in group if score.selector in (model, "greedy")]))
    return "\n".join(part for part in parts if part)


def calibration(predictions: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """
    Summarises the measured losses in bins of the predicted loss.

    Args:
        predictions (`Sequence[tuple[float, float]]`): predicted and measured losses.

    Returns:
        `list[dict]`: one entry for every bin of width 0.1 with at least 20 predictions, in ascending order: means `predicted` and
        `measured`, the 10th and 90th percentile `low` and `high` of the measured losses, and the `count`.

    Example:

    ```python
    >>> from transformers_autogaze.evaluation.report import calibration

    >>> calibration([(0.25, 0.2 + 0.01 * i) for i in range(21)])[0]["high"]
    0.38

    ```
    """
    pairs = np.asarray(predictions, dtype=float).reshape(-1, 2)
    bins = np.floor(pairs[:, 0] / _BIN_WIDTH + 1e-9)
    parts = []
    for number in np.unique(bins):
        predicted, measured = pairs[bins == number].T
        if len(predicted) >= _MIN_BIN_COUNT:
            low, high = np.percentile(measured, [10, 90])
            numbers = {"predicted": predicted.mean(), "measured": measured.mean(), "low": low, "high": high}
            parts.append({key: round(float(value), 4) for key, value in numbers.items()} | {"count": len(predicted)})
    return parts


def _quality_curves(scores: Sequence[SelectorScores]) -> dict[str, list[tuple[float, float]]]:
    """Returns the points of PSNR over patches for settings without a threshold, by selector."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for score in scores:
        if score.task_loss_requirement is None:
            curves.setdefault(score.selector, []).append((score.patches_per_frame, score.psnr))
    return {name: sorted(points) for name, points in curves.items()}


def about_lines(title: str, about: Mapping[str, Any]) -> list[str]:
    """Returns the Markdown lines of a report's title and settings."""
    lines = [f"# {title}", ""]
    for key, value in about.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"- {key.replace('_', ' ')}: {text}")
    return lines


def _clip_table(group: Sequence[SelectorScores]) -> str:
    if not group:
        return ""
    columns = {"clip": [clip["name"] for clip in group[0].each_clip]}
    for score in group:
        columns[f"patches, {score.selector}"] = [str(clip["num_patches"]) for clip in score.each_clip]
        columns[f"PSNR (dB), {score.selector}"] = [f"{clip['psnr']:.1f}" for clip in score.each_clip]
    return f"\nSingle clips:\n\n{markdown_table(columns)}"


def markdown_table(columns: Mapping[str, Sequence[str]]) -> str:
    """Formats columns, by their headings, as a Markdown table; all but the first are right-aligned."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
