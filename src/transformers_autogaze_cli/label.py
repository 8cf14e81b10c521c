"""The arguments of `autogaze label`, which `transformers_autogaze.cli.label` implements."""

import argparse
from typing import Any

from .arguments import (
    HelpFormatter,
    add_command,
    add_device,
    add_output,
    finite_number,
    nonempty_path,
    positive_integer,
    task_arguments,
)


def add_commands(commands: Any) -> None:
    """Adds `label` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    label = add_command(
        commands,
        "label",
        parents=[task_arguments()],
        formatter_class=HelpFormatter,
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
    label.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from transformers_autogaze.cli.label import label

    label(options)
