"""HLVid for lmms-eval: videos, prompts and scoring. See `README.md` beside this file."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np


_FOLDER = "HLVID_VIDEOS"  # the environment variable that names the folder of videos
_LETTER = re.compile(r"\b([ABCD])\b")
_RESAMPLINGS, _SEED = 10_000, 0


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Returns the video of a question: `video_path`, or its file name alone, in the folder `HLVID_VIDEOS`."""
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
    """Returns a question, which includes its options and the instruction to answer with a letter."""
    return doc["question"].strip()


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Scores a response: its first letter of A to D that stands alone must be the answer."""
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
    """Returns the percentage of correct answers."""
    right, questions = _count_each_video(items)
    return float(100 * right.sum() / questions.sum())


def accuracy_of_videos(items: list[dict[str, Any]]) -> float:
    """Returns the mean over videos of the percentage of correct answers."""
    right, questions = _count_each_video(items)
    return float(100 * (right / questions).mean())


def accuracy_low(items: list[dict[str, Any]]) -> float:
    """Returns the lower end of the 95 % bootstrap interval of the accuracy, over resampled videos."""
    return float(np.percentile(_resampled_accuracies(items), 2.5))


def accuracy_high(items: list[dict[str, Any]]) -> float:
    """Returns the upper end of the 95 % bootstrap interval of the accuracy, over resampled videos."""
    return float(np.percentile(_resampled_accuracies(items), 97.5))


def _count_each_video(items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Counts correct answers and questions of each video."""
    counts: dict[str, list[float]] = {}
    for item in items:
        count = counts.setdefault(item["video_path"], [0.0, 0])
        count[0] += item["score"]
        count[1] += 1
    right, questions = zip(*(counts[path] for path in sorted(counts)), strict=True)
    return np.array(right), np.array(questions)


def _resampled_accuracies(items: list[dict[str, Any]]) -> np.ndarray:
    """Returns accuracies over videos drawn with replacement; questions of one video are not independent."""
    right, questions = _count_each_video(items)
    drawn = np.random.default_rng(_SEED).integers(len(right), size=(_RESAMPLINGS, len(right)))
    return 100 * right[drawn].sum(1) / questions[drawn].sum(1)
