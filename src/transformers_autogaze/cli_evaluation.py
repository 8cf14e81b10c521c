"""
The command line of evaluation: `autogaze evaluate`.

A thin layer over `evaluation`: a checkpoint and videos in, results and curves out.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from .evaluation.comparison import GazeSetting, evaluate_selectors, load_clips
from .evaluation.report import markdown_tables, write_report
from .evaluation.selectors import baseline_selectors
from .processing_autogaze import AutoGazeProcessor
from .video_processing_autogaze import AutoGazeVideoProcessor


def add_commands(commands: Any) -> None:
    """Adds `evaluate` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a checkpoint against greedy search, simple rules and random patches",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("model", metavar="MODEL", help="checkpoint of a selector, a folder or a Hub repository")
    evaluate.add_argument("videos", nargs="+", metavar="VIDEO", help="videos to measure on")
    evaluate.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write to")
    evaluate.add_argument(
        "--ratio", type=float, nargs="+", default=[0.1, 0.25], metavar="R", help="shares of patches to keep, 0..1"
    )
    evaluate.add_argument(
        "--threshold", type=float, nargs="*", default=[0.7], metavar="L", help="losses at which a frame is good enough"
    )
    evaluate.add_argument(
        "--threshold-ratio", type=float, default=0.75, metavar="R", help="share of patches to keep at most with these"
    )
    evaluate.add_argument("--num-frames", type=int, default=16, metavar="N", help="frames of a clip")
    evaluate.add_argument("--max-clips", type=int, default=4, metavar="N", help="clips of one video at most")
    evaluate.add_argument("--batch-size", type=int, default=4, metavar="N", help="clips to gaze at together")
    evaluate.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    settings = [GazeSetting(ratio) for ratio in options.ratio]
    settings += [GazeSetting(options.threshold_ratio, threshold) for threshold in options.threshold]
    try:
        model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    except OSError as error:
        raise ValueError(
            f"`model` must be a checkpoint's folder or Hub repository, got {options.model!r}: {error}"
        ) from error
    try:
        processor = AutoGazeProcessor.from_pretrained(options.model).video_processor
    except OSError:
        processor = AutoGazeVideoProcessor()  # A checkpoint without one was trained on the published preprocessing.
    grid = model.config.grid
    clips = load_clips(options.videos, processor, grid.sizes[-1], options.num_frames, options.max_clips)
    selectors = {"model": model, **baseline_selectors(grid, processor)}
    selectors = {name: selector.to(options.device) for name, selector in selectors.items()}
    scores = evaluate_selectors(selectors, clips, settings, processor, options.batch_size, progress=True)
    about = {
        "model": options.model,
        "videos": [Path(video).name for video in options.videos],
        "clips": len(clips.names),
        "frames_of_a_clip": options.num_frames,
    }
    written = write_report(scores, options.output, about)
    print(markdown_tables(scores))
    print("\nwritten: " + ", ".join(map(str, written)))
