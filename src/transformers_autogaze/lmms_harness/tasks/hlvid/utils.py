"""HLVid for lmms-eval: what to show and to ask, and how answers count. `README.md` beside this file says more."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np


_FOLDER = "HLVID_VIDEOS"  # the environment variable that names the folder of videos
_LETTER = re.compile(r"\b([ABCD])\b")
_RESAMPLINGS, _SEED = 10_000, 0


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Finds the video of a question: `video_path` in the folder that the environment names, or its file name alone."""
    folder = os.environ.get(_FOLDER)
    if not folder:
        raise ValueError(
            f"the environment variable {_FOLDER} must name the folder of HLVid's videos, but it is not set"
        )
    path = Path(doc["video_path"])
    for place in (Path(folder) / path, Path(folder) / path.name):
        if place.is_file():
            return [str(place)]
    raise ValueError(f"{_FOLDER} must name the folder of HLVid's videos, but {folder!r} has no {str(path)!r}")


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Gives a question, which has its options and the instruction to answer by a letter in it."""
    return doc["question"].strip()


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Compares the first letter of A to D that stands alone in a response with the answer."""
    match = _LETTER.search(results[0])
    letter = match.group(1) if match else None
    item = {
        "question_id": doc["question_id"],
        "category": doc["category"],
        "video_path": doc["video_path"],
        "letter": letter,
        "score": float(letter == doc["answer"].strip()),
    }
    return dict.fromkeys(("accuracy", "accuracy_of_videos", "accuracy_low", "accuracy_high"), item)


def accuracy(items: list[dict[str, Any]]) -> float:
    """Gives the percentage of questions that were answered right."""
    right, questions = _count_each_video(items)
    return float(100 * right.sum() / questions.sum())


def accuracy_of_videos(items: list[dict[str, Any]]) -> float:
    """Gives the mean over videos of the percentage of their questions that were answered right."""
    right, questions = _count_each_video(items)
    return float(100 * (right / questions).mean())


def accuracy_low(items: list[dict[str, Any]]) -> float:
    """Gives the lower end of the interval that holds 95 % of the accuracies over resampled videos."""
    return float(np.percentile(_resampled_accuracies(items), 2.5))


def accuracy_high(items: list[dict[str, Any]]) -> float:
    """Gives the upper end of the interval that holds 95 % of the accuracies over resampled videos."""
    return float(np.percentile(_resampled_accuracies(items), 97.5))


def _count_each_video(items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Counts right answers and questions of each video."""
    counts: dict[str, list[float]] = {}
    for item in items:
        count = counts.setdefault(item["video_path"], [0.0, 0])
        count[0] += item["score"]
        count[1] += 1
    right, questions = zip(*(counts[path] for path in sorted(counts)), strict=True)
    return np.array(right), np.array(questions)


def _resampled_accuracies(items: list[dict[str, Any]]) -> np.ndarray:
    """Draws as many videos as there are, with replacement: questions of one video are not independent."""
    right, questions = _count_each_video(items)
    drawn = np.random.default_rng(_SEED).integers(len(right), size=(_RESAMPLINGS, len(right)))
    return 100 * right[drawn].sum(1) / questions[drawn].sum(1)
