"""
Prints accuracy, tokens and seconds from lmms-eval's result files as one table:

    python -m transformers_autogaze.lmms_harness.results_table RESULTS..

The files must have been written with `--output_path` and `--log_samples`. The models of this package log tokens and seconds;
those of lmms-eval itself log only some of them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any


_COLUMNS = {
    "model": "model",
    "arguments": "arguments",
    "task": "task",
    "accuracy": "accuracy",
    "input_tokens": "tokens read",
    "whole_input_tokens": "unpruned",
    "choosing_seconds": "choosing, s",
    "encoding_seconds": "encoding, s",
    "answering_seconds": "answering, s",
}


def read_rows(folders: Iterable[Path]) -> list[dict[str, str]]:
    """
    Reads results that lmms-eval wrote.

    Args:
        folders (`Iterable[Path]`): folders to search for results, at any depth.

    Returns:
        `list[dict[str, str]]`, one per file and task, with a text for every column that was logged. The accuracy of a group
        of tasks is the mean over its tasks.

    Raises:
        ValueError: if a folder contains no results, or a file cannot be read.
    """
    rows = []
    for folder in folders:
        files = sorted(Path(folder).rglob("*_results.json"))
        if not files:
            raise ValueError(
                f"`RESULTS` must be folders that lmms-eval wrote to, but {str(folder)!r} holds no *_results.json"
            )
        for file in files:
            try:
                rows += _rows_of(file)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{str(file)!r} is no file of lmms-eval's results: {error!r}") from error
    return rows


def write_table(rows: Sequence[dict[str, str]]) -> str:
    """
    Formats rows as a table in Markdown, with `-` for what was not logged.

    Example:

    ```python
    >>> from transformers_autogaze.lmms_harness.results_table import write_table

    >>> row = {"model": "gaze_qwen3_vl", "task": "hlvid", "accuracy": "50.0", "input_tokens": "900"}
    >>> print(write_table([row]).splitlines()[-1])
    | gaze_qwen3_vl | - | hlvid | 50.0 | 900 | - | - | - | - |

    ```
    """
    lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "| " + " | ".join("---" for _ in _COLUMNS) + " |"]
    lines += ["| " + " | ".join(row.get(name, "-") for name in _COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def _rows_of(file: Path) -> list[dict[str, str]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    config = found["config"]
    model = {"model": config["model"], "arguments": (config["model_args"] or "-").replace(",", ", ")}
    groups = {name: tasks for name, tasks in found["group_subtasks"].items() if tasks}
    in_groups = {task for tasks in groups.values() for task in tasks}
    rows = []
    for name in dict.fromkeys([*groups, *found["results"]]):
        if name in in_groups:
            continue
        tasks = groups.get(name, [name])
        results = [found["results"][task] for task in tasks if task in found["results"]]
        costs = [cost for task in tasks for cost in _costs_of(file, task)]
        if results:
            rows.append({**model, "task": name, "accuracy": _accuracy(results), **_means(costs)})
    return rows


def _accuracy(results: list[dict[str, Any]]) -> str:
    """Returns the first metric of a task with its interval, if there is one, or its mean over several tasks."""
    firsts = []
    for result in results:
        names = [name for name, value in result.items() if isinstance(value, (int, float)) and "_stderr" not in name]
        firsts.append((names[0], float(result[names[0]])) if names else (None, None))
    values = [value for _, value in firsts if value is not None]
    if len(values) < len(firsts):
        return "-"
    if len(results) > 1:
        return f"{mean(values):.4g}"
    name, _, kind = firsts[0][0].partition(",")
    ends = [results[0].get(f"{name}_{end},{kind}") for end in ("low", "high")]
    interval = "" if None in ends else f" ({ends[0]:.4g} to {ends[1]:.4g})"
    return f"{values[0]:.4g}{interval}"


def _costs_of(file: Path, task: str) -> list[dict[str, float]]:
    """Reads the costs of the answers to a task's questions, from the file of samples beside that of results."""
    samples = file.with_name(file.name.replace("_results.json", f"_samples_{task}.jsonl"))
    if not samples.is_file():
        return []
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return [cost for line in lines for cost in line.get("token_counts") or [] if cost]


def _means(costs: list[dict[str, float]]) -> dict[str, str]:
    means = {}
    for name in _COLUMNS:
        values = [cost[name] for cost in costs if name in cost]
        if values:
            means[name] = f"{mean(values):.3f}" if name.endswith("seconds") else f"{mean(values):.0f}"
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="output folder of lmms-eval")
    try:
        print(write_table(read_rows(parser.parse_args().results)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
