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

Cell = tuple[str, Selector, str, float]
"""A figure: the field, the selector, the kind of clips and the budget or threshold."""


def _both(selector: Selector, budget: float, fields: Sequence[str]) -> list[Cell]:
    """Lists the fields of spread clips, then those of consecutive frames."""
    return [(field, selector, sampling, budget) for sampling in (SPREAD, CONSECUTIVE) for field in fields]


_UP_TO_A_LOSS = (DEFAULT[0], "up to a loss", DEFAULT[2])
_COLUMNS = [(SPREAD, ratio) for ratio in (1 / 8, 1 / 4, 1 / 3)] + [
    (CONSECUTIVE, ratio) for ratio in (1 / 12, 1 / 8, 1 / 4)
]
TABLES: dict[str, dict[str, list[list[Cell]]]] = {
    "README.md": {
        "features": [
            _both(selector, budget, ("tokens", "cosine", "agreement"))
            for selector, budget in [
                *[(DEFAULT, ratio) for ratio in (1 / 4, 1 / 8, 1 / 12)],
                *[(_UP_TO_A_LOSS, threshold) for threshold in (0.1, 0.2, 0.3)],
                *[(FINEST, ratio) for ratio in (1 / 4, 1 / 8, 1 / 12)],
                (RANDOM, 1 / 4),
                *[(EVS, ratio) for ratio in (1 / 4, 1 / 8, 1 / 12)],
            ]
        ]
    },
    "docs/results/README.md": {
        "features": [
            [("cosine", selector, *column) for column in _COLUMNS]
            for selector in (EVS, DEFAULT, FINEST, RANDOM, *EVENLY, *AUTOGAZE)
        ],
        "thresholds": [
            _both(_UP_TO_A_LOSS, threshold, ("loss", "cosine", "agreement", "tokens")) for threshold in (0.1, 0.2, 0.3)
        ],
    },
}
"""The figures of each row of each table of the documents."""


def mean(rows: Sequence[dict], field: str, selector: Selector, sampling: str, budget: float) -> float:
    """Gives the mean of a field over the clips of a kind; tokens as a share of those of a dense encoder."""
    wanted = (*selector, sampling, round(budget, 4))
    keys = ("selector", "spending", "attention", "sampling")
    found = [row[field] for row in rows if (*(row[key] for key in keys), round(row["budget"], 4)) == wanted]
    if not found:
        raise ValueError(f"{RESULTS.name} must have rows of {wanted}, got none")
    return sum(found) / len(found) / (TOKENS if field == "tokens" else 1)


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
    for table, cells in TABLES[name].items():
        text = _fill(text, table, [[mean(rows, *cell) for cell in row] for row in cells])
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
    for name in TABLES:
        text = (ROOT / name).read_text("utf-8")
        (ROOT / name).write_text(update_tables(name, text, rows), "utf-8")


if __name__ == "__main__":
    main()
