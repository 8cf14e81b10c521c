"""
The command line of distillation: `autogaze distill`.

A thin layer over `training.distill`: every field of [`DistillationArguments`] is an argument of the same name.
"""

import argparse
from pathlib import Path
from typing import Any

from .cli_training import dataclass_arguments, from_arguments
from .training.distill import distill
from .training.distillation import DistillationArguments


def add_commands(commands: Any) -> None:
    """Adds `distill` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    command = commands.add_parser(
        "distill",
        parents=[dataclass_arguments(DistillationArguments)],
        help="make a selector of any vision encoder",
        usage="autogaze distill ENCODER VIDEOS_OR_PICTURES ... -o DIR [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "encoder",
        metavar="ENCODER",
        help="an image tower, a Qwen2.5-VL or a Qwen3-VL: a folder or a Hub repository",
    )
    command.add_argument(
        "inputs", nargs="+", metavar="VIDEOS_OR_PICTURES", help="files, folders or patterns of videos and pictures"
    )
    command.add_argument(
        "--credits", type=Path, metavar="FILE", help="text for the card on data and licences, in Markdown"
    )
    command.set_defaults(run=_distill)


def _distill(options: argparse.Namespace) -> None:
    args = from_arguments(DistillationArguments, options)
    credits = None if options.credits is None else options.credits.read_text(encoding="utf-8")
    model = distill(options.encoder, options.inputs, args, credits)
    if args.process_index == 0:
        print(f"written: {args.output_dir}, {model.num_parameters():,} parameters; README.md tells what it is worth")
