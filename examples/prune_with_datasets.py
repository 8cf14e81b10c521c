"""
Prunes a small collection of videos with `datasets.map`, on one machine and without Ray, into a Parquet file with one row per video.

    python examples/prune_with_datasets.py videos/ pruned.parquet --num-proc 4
    python examples/prune_with_datasets.py --tiny    # three rendered clips

The rows equal those of `autogaze prune-dataset`, which prunes any number of videos on a cluster. The row of a video that cannot be
read has the error.
"""

import argparse
import tempfile
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset, Features

from transformers_autogaze import write_video
from transformers_autogaze.dataset_pruning import PruneSettings, gaze_of_row, prune_to_row
from transformers_autogaze.dataset_pruning.inputs import plan_videos
from transformers_autogaze.dataset_pruning.shards import ROWS
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", help="a folder, a pattern or a .txt list")
    parser.add_argument("output", nargs="?", default="pruned.parquet")
    parser.add_argument("--selector", default="features")
    parser.add_argument("--fps", type=float, help="frames to take per second (default: all)")
    parser.add_argument("--clip-ratio", type=float, help="share of the tokens to keep (default: the selector's own)")
    parser.add_argument("--num-proc", type=int, help="number of processes")
    parser.add_argument("--tiny", action="store_true", help="prune three rendered clips, one of them broken")
    options = parser.parse_args()
    if options.videos is None and not options.tiny:
        parser.error("give a folder of videos, or --tiny")

    videos = render_clips() if options.tiny else options.videos
    table = Dataset(plan_videos(str(videos))).select_columns(["identity", "address"])
    settings = PruneSettings(selector=options.selector, fps=options.fps, clip_ratio=options.clip_ratio)
    settings.check()
    rows = table.map(
        prune,
        fn_kwargs={"settings": settings},
        features=Features.from_arrow_schema(ROWS),
        remove_columns=["address"],
        num_proc=options.num_proc,
        desc="pruning",
    )
    rows.to_parquet(options.output)

    pruned = rows.filter(lambda error: error is None, input_columns="error")
    for row in pruned.select(range(min(5, len(pruned)))):
        print(f"{row['identity']}: {gaze_of_row(row)}")
    print(f"{len(rows)} videos, {len(rows) - len(pruned)} with an error: {options.output}")


def prune(row: dict, settings: PruneSettings) -> dict:
    selector, processor = load(settings)
    return prune_to_row(row["identity"], row["address"], selector, processor, settings)


@cache  # once in every process
def load(settings: PruneSettings):
    torch.set_num_threads(1)
    return settings.load()


def render_clips() -> Path:
    folder = Path(tempfile.mkdtemp())
    for name, count in (("long.mp4", 12), ("short.mp4", 6)):
        write_video(folder / name, render_demo_clip(count, 64, 64))
    (folder / "text.mp4").write_text("no video")
    return folder


if __name__ == "__main__":
    main()
