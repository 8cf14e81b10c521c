"""A benchmark in HLVid's format from videos on disk, with questions whose answers a script can tell from the pixels."""

import json
import os
from pathlib import Path

import numpy as np

from transformers_autogaze import read_video, write_video
from transformers_autogaze.lmms_harness import TASKS
from transformers_autogaze.video.demo import render_demo_clip


FOLDER = "AUTOGAZE_TEST_VIDEOS"  # the environment variable that names a folder of videos to ask about
FIELDS = ("question_id", "category", "video_path", "question", "answer")
INSTRUCTION = "Please answer directly with the letter of the correct answer."


def find_videos(folder: Path, count: int) -> list[Path]:
    """Gives the first videos of the folder that the environment names, or draws some into `folder`."""
    if FOLDER in os.environ:
        return sorted(Path(os.environ[FOLDER]).glob("*.mp4"))[:count]
    sizes = [(96, 128), (128, 96), (112, 112)]
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        frames = render_demo_clip(24, height, width)
        write_video(folder / f"clip_{number}.mp4", np.roll(frames, number, axis=-1), fps=8)
    return sorted(folder.glob("clip_*.mp4"))


def ask_about(path: Path) -> list[tuple[str, list[str], str]]:
    """Gives questions about a video, their options and the right letter."""
    frames, _ = read_video(path, num_frames=8)
    _, height, width, _ = frames.shape
    shape = "ABC"[int(np.argmax([width > height, width < height, width == height]))]
    means = frames.reshape(-1, 3).mean(0)
    return [
        ("What is the shape of the picture?", ["wide", "tall", "square", "round"], shape),
        ("Which primary colour is strongest?", ["red", "green", "blue", "none"], "ABC"[int(means.argmax())]),
    ]


def write_benchmark(folder: Path, videos: list[Path]) -> Path:
    """Writes the parquet file of a data set about videos, and a task about it with HLVid's YAML; gives the task's folder."""
    import datasets

    rows = []
    for path in videos:
        for question, options, answer in ask_about(path):
            lines = [question, *(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))]
            row = (len(rows), "household", path.name, "\n".join([*lines, INSTRUCTION]), answer)
            rows.append(dict(zip(FIELDS, row, strict=True)))
    (folder / "dataset" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "dataset" / "data" / "test-00000-of-00001.parquet")
    (folder / "tasks").mkdir()
    # An answer of one token: the models' own end is never likely.
    (folder / "tasks" / "hlvid_local.yaml").write_text(
        f"include: {json.dumps(str(TASKS / 'hlvid' / 'hlvid.yaml'))}\n"
        f"task: hlvid_local\ndataset_path: {json.dumps(str(folder / 'dataset'))}\n"
        "generation_kwargs:\n  max_new_tokens: 1\n  temperature: 0\n  do_sample: false\n"
    )
    return folder / "tasks"
