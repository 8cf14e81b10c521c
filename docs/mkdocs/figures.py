"""
Writes the figures of docs/results/encoder/results.json into the tables of README.md and docs/results/README.md.

    python docs/mkdocs/figures.py

Run it after `autogaze evaluate --encoder` has written new results. Labels, and cells that are not measured there, stay as they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "encoder" / "results.json"
SPREAD, CONSECUTIVE = "spread", "consecutive"
TOKENS = 3136
"""What a dense encoder makes of a clip of these results."""

Selector = tuple[str, str, str]
EVS, DEFAULT, FINEST, RANDOM = (
    ("evs", "over time", "whole tower"),
    ("features", "over time", "canvas"),
    ("greedy-finest", "over time", "canvas"),
    ("random", "over time", "canvas"),
)
EVENLY: list[Selector] = [(name, "evenly", "canvas") for name in ("features-scales", "greedy-finest", "greedy")]
AUTOGAZE: list[Selector] = [("model", "over time", "block_causal"), ("model", "evenly", "canvas")]

COSINES: dict[str, tuple[list[Selector], list[tuple[str, float]]]] = {
    "README.md": (
        [DEFAULT, FINEST, RANDOM, EVS],
        [(SPREAD, 1 / 4), (SPREAD, 1 / 8), (CONSECUTIVE, 1 / 12)],
    ),
    "docs/results/README.md": (
        [EVS, DEFAULT, FINEST, RANDOM, *EVENLY, *AUTOGAZE],
        [
            *[(SPREAD, ratio) for ratio in (1 / 8, 1 / 4, 1 / 3)],
            *[(CONSECUTIVE, ratio) for ratio in (1 / 12, 1 / 8, 1 / 4)],
        ],
    ),
}
"""The tables named "features": for each document the selectors of the rows, and clips and budgets of the columns."""
THRESHOLDS = "docs/results/README.md", (0.1, 0.2, 0.3)
"""The document with the table named "thresholds", and the thresholds of its rows."""


def mean(rows: Sequence[dict], field: str, selector: Selector, sampling: str, budget: float) -> float:
    """Gives the mean of a field over the clips of a kind."""
    wanted = (*selector, sampling, round(budget, 4))
    keys = ("selector", "spending", "attention", "sampling")
    found = [row[field] for row in rows if (*(row[key] for key in keys), round(row["budget"], 4)) == wanted]
    if not found:
        raise ValueError(f"{RESULTS.name} must have rows of {wanted}, got none")
    return sum(found) / len(found)


def update_tables(name: str, text: str, rows: Sequence[dict]) -> str:
    """
    Gives the text of a document with the figures of the results.

    Args:
        name (`str`): the document, by its path in the repository.
        text (`str`): what it has now.
        rows (`Sequence[dict]`): the rows of the results.

    Returns:
        `str`: the text, of which only figures differ.
    """
    selectors, columns = COSINES[name]
    cosines = [[mean(rows, "cosine", selector, *column) for column in columns] for selector in selectors]
    text = _fill(text, "features", cosines)
    if name == THRESHOLDS[0]:
        selector = (DEFAULT[0], "up to a loss", "canvas")
        measured = [
            [
                mean(rows, field, selector, sampling, threshold) / (TOKENS if field == "tokens" else 1)
                for sampling in (SPREAD, CONSECUTIVE)
                for field in ("loss", "cosine", "agreement", "tokens")
            ]
            for threshold in THRESHOLDS[1]
        ]
        text = _fill(text, "thresholds", measured)
    return text


def _fill(text: str, table: str, figures: list[list[float]]) -> str:
    """Writes figures into the rows of a table, from its second column on."""
    before, found, after = text.partition(f"<!-- begin {table} -->\n")
    inside, end, after = after.partition(f"<!-- end {table} -->")
    head, rule, *lines = inside.splitlines()
    if not found or not end or len(lines) != len(figures):
        raise ValueError(f"the table {table!r} must have {len(figures)} rows, got {len(lines)}")
    filled = []
    for line, numbers in zip(lines, figures, strict=True):
        cells = line.split("|")
        for place, number in enumerate(numbers, 2):
            mark = "**" if "**" in cells[place] else ""
            cells[place] = f" {mark}{number:.3f}{mark} "
        filled.append("|".join(cells))
    return "\n".join([before + found + head, rule, *filled, end + after])


def read_rows() -> list[dict]:
    """Gives the rows of the results, by the names of their columns."""
    results = json.loads(RESULTS.read_text("utf-8"))
    return [dict(zip(results["columns"], row, strict=True)) for row in results["rows"]]


def main() -> None:
    rows = read_rows()
    for name in COSINES:
        text = (ROOT / name).read_text("utf-8")
        (ROOT / name).write_text(update_tables(name, text, rows), "utf-8")


if __name__ == "__main__":
    main()
