"""The implementation of `autogaze evaluate` without `--encoder`: compares selectors by their reconstructions."""

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.comparison import GazeSetting, evaluate_selectors, load_clips
from ..evaluation.report import markdown_tables, write_report
from ..evaluation.selectors import baseline_selectors
from ..frame_decoding_autogaze import stream_video
from ..hub.checkpoints import load_selector
from ..utils.video_files import check_videos


def evaluate_on_pixels(options: argparse.Namespace) -> None:
    """Measures a checkpoint and the baselines, and writes tables and curves."""
    name, *videos = options.inputs
    if not videos:
        raise ValueError(f"a MODEL and at least one VIDEO must be given, got only {name}")
    settings = [GazeSetting(ratio) for ratio in options.gazing_ratio]
    settings += [GazeSetting(options.max_gazing_ratio, loss) for loss in options.task_loss_requirement]
    check_videos(videos)
    for video in videos:
        stream_video(video)  # A video that cannot be read is reported before the model is loaded.
    model, processor = load_selector(name, argument="MODEL")
    processor = processor.video_processor
    grid = model.config.grid
    clips = load_clips(videos, processor, grid.sizes[-1], options.num_frames, options.max_clips)
    selectors: dict[str, Any] = {"model": model, **baseline_selectors(grid, processor)}
    selectors = {name: selector.to(options.device) for name, selector in selectors.items()}
    scores = evaluate_selectors(selectors, clips, settings, processor, options.batch_size, progress=True)
    about = {
        "model": name,
        "videos": [Path(video).name for video in videos],
        "clips": len(clips.names),
        "frames_of_a_clip": options.num_frames,
    }
    written = write_report(scores, options.output, about)
    print(markdown_tables(scores))
    print("\nwritten: " + ", ".join(map(str, written)))
