"""The command `autogaze distill`, which runs `training.distill`; every field of [`DistillationArguments`] is an argument."""

import argparse
from pathlib import Path
from typing import Any

from transformers_autogaze_cli.arguments import HelpFormatter, add_command, nonempty_path, nonempty_string

from ..hub.checkpoints import check_weights_files
from ..training.distill import distill
from ..training.distillation_trainer import DistillationArguments
from ..training.teachers import check_encoder
from ..utils.output_files import check_not_inputs
from .dataclass_arguments import check_output, dataclass_arguments, from_arguments


def add_commands(commands: Any) -> None:
    """Adds `distill` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    command = add_command(
        commands,
        "distill",
        parents=[dataclass_arguments(DistillationArguments)],
        usage="autogaze distill ENCODER VIDEOS_OR_PICTURES ... -o DIR [options]",
        formatter_class=HelpFormatter,
    )
    command.add_argument(
        "encoder",
        type=nonempty_string,
        metavar="ENCODER",
        help="an image tower, a Qwen2.5-VL or a Qwen3-VL: a folder or a Hub repository",
    )
    command.add_argument(
        "inputs",
        nargs="+",
        type=nonempty_string,
        metavar="VIDEOS_OR_PICTURES",
        help="files, folders or patterns of videos and pictures",
    )
    command.add_argument(
        "--credits", type=nonempty_path, metavar="FILE", help="section of the card on data and licences, in Markdown"
    )
    command.set_defaults(run=_distill)


def _distill(options: argparse.Namespace) -> None:
    check_output(options.output_dir, options.encoder)  # first, as a missing folder gets a default name below
    args = from_arguments(DistillationArguments, options)
    check_encoder(options.encoder, "ENCODER")
    if options.credits is not None:
        check_not_inputs([Path(args.output_dir) / "README.md"], [options.credits])
    if args.resume_from_checkpoint is not None:
        check_weights_files(args.resume_from_checkpoint, "--resume-from-checkpoint")
    credits = None if options.credits is None else options.credits.read_text(encoding="utf-8")
    model = distill(options.encoder, options.inputs, args, credits)
    if args.process_index == 0:
        print(f"written: {args.output_dir}, {model.num_parameters():,} parameters; see the results in its README.md")
