"""The command `autogaze label`, which runs `training.labels`."""

import argparse
from typing import Any

from transformers_autogaze_cli.arguments import (
    add_command,
    add_device,
    add_output,
    finite_number,
    nonempty_path,
    positive_integer,
)

from ..configuration_autogaze import AutoGazeConfig
from ..hub.checkpoints import check_device
from ..training.label_files import read_labels
from ..training.labels import GreedyLabeller, label_videos
from ..training.videos import VideoCollection
from .training_inputs import load_task, task_arguments


def add_commands(commands: Any) -> None:
    """Adds `label` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    label = add_command(
        commands,
        "label",
        parents=[task_arguments()],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    label.add_argument("videos", type=nonempty_path, metavar="VIDEOS", help="folder of videos")
    add_output(label, "FILE", "JSON file to write")
    label.add_argument(
        "--num-frames", type=positive_integer, default=16, metavar="N", help="frames to sample of each video"
    )
    label.add_argument(
        "--gazing-ratio",
        type=finite_number,
        default=0.1,
        metavar="R",
        help="maximum share of patches to choose of every frame, 0..1",
    )
    label.add_argument("--task-loss-requirement", type=finite_number, metavar="L", help="loss at which a frame ends")
    label.add_argument("--shard", default="1/1", metavar="I/N", help="label only shard I of N shards of the videos")
    label.add_argument("--batch-size", type=positive_integer, default=8, metavar="N", help="clips in a batch")
    label.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that decode")
    add_device(label)
    label.set_defaults(run=_label)


def _label(options: argparse.Namespace) -> None:
    try:
        shard, num_shards = (int(part) for part in options.shard.split("/"))
    except ValueError:
        raise ValueError(f"`--shard` must be two numbers such as 3/16, got {options.shard!r}") from None
    grid = AutoGazeConfig().grid
    device = check_device(options.device)
    videos = VideoCollection(options.videos)
    labeller = GreedyLabeller(
        grid,
        load_task(options, grid),
        gazing_ratio=options.gazing_ratio,
        task_loss_requirement=options.task_loss_requirement,
    )
    written = label_videos(
        videos,
        labeller,
        options.output,
        options.num_frames,
        options.batch_size,
        options.num_workers,
        device,
        (shard, num_shards),
    )
    print(f"{written}: {len(read_labels(written))} videos labelled, {videos.num_skipped} skipped")
