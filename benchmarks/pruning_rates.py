"""
Measures the cost of pruning an hour of video: decoding, choosing patches, measuring the quality, extracting patches, and storage.

It prunes the videos of a folder with one thread and measures the CPU time of the process, which depends less than wall time on
other processes. It prints a table and writes JSON.

    python benchmarks/pruning_rates.py videos/ -o pruning_rates.json
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from measurement import machine

from transformers_autogaze import OpenedVideo
from transformers_autogaze.dataset_pruning import PruneSettings, prune_to_row
from transformers_autogaze.dataset_pruning.samples import write_sample
from transformers_autogaze.dataset_pruning.shards import key_of, tar_of, write_row, write_shard
from transformers_autogaze.utils.video_files import find_videos


COSTS = ("decode", "choose", "quality", "patches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--selectors", nargs="+", default=["features", "finest"])
    parser.add_argument(
        "--fps", nargs="+", type=float, default=[0, 2, 1], help="frames per second to sample; 0 for all"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("pruning_rates.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'selector':<10} {'fps':>4} {'frames':>7} | core seconds per hour of video: {' '.join(f'{c:>8}' for c in COSTS)} | "
          "MB per hour: rows, patches")  # fmt: skip
    for selector in options.selectors:
        for fps in options.fps:
            row = measure(find_videos(options.videos), PruneSettings(selector=selector, fps=fps or None))
            rows.append(row)
            costs = " ".join(f"{row[cost]:>8.0f}" for cost in COSTS)
            print(
                f"{selector:<10} {fps:>4g} {row['frames']:>7} | {costs} | {row['row_MB']:.2f}, {row['patch_MB']:.0f}",
                flush=True,
            )
    options.output.write_text(json.dumps({"machine": machine(1), "per_hour_of_video": rows}, indent=1) + "\n")


def measure(videos: list[str], settings: PruneSettings) -> dict[str, float | int | str | None]:
    """Returns seconds of CPU time and megabytes per hour of video."""
    selector, processor = settings.load()
    spent, duration, frames = Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "unfinished").mkdir()
        prune_to_row("warm-up", videos[0], selector, processor, settings)
        for video in videos:
            start = time.process_time()
            opened = OpenedVideo(video, fps=settings.fps)
            frames += sum(1 for _ in opened)
            decoded = time.process_time()
            row = prune_to_row(video, video, selector, processor, settings)
            chosen = time.process_time()
            prune_to_row(video, video, selector, processor, replace(settings, measures_quality=True))
            measured = time.process_time()
            pruning = settings.open(video, selector, processor)
            tar = tar_of(folder / "unfinished", video)
            write_sample(tar, key_of(video), pruning.kept_patches(), lambda row=row: sample_metadata(row))
            cut = time.process_time()
            write_row(folder / "unfinished", row)
            duration += opened.metadata.duration
            spent["decode"] += decoded - start
            spent["choose"] += chosen - decoded - (decoded - start)
            spent["quality"] += (measured - chosen) - (chosen - decoded)
            spent["patches"] += (cut - measured) - (chosen - decoded)
        write_shard(folder, 0, videos)
        sizes = {kind: (folder / f"shard-00000.{kind}").stat().st_size for kind in ("parquet", "tar")}
    hours = duration / 3600
    return {
        "selector": settings.selector,
        "fps": settings.fps,
        "videos": len(videos),
        "seconds_of_video": round(duration, 1),
        "frames": frames,
        **{cost: round(spent[cost] / hours, 1) for cost in COSTS},
        "row_MB": round(sizes["parquet"] / hours / 1e6, 3),
        "patch_MB": round(sizes["tar"] / hours / 1e6, 1),
    }


def sample_metadata(row: dict) -> dict:
    return {name: row[name] for name in ("identity", "patch_size", "frame_indices")}


if __name__ == "__main__":
    main()
