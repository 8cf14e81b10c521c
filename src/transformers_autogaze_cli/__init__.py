"""
The command line, `autogaze`: its commands and their errors.

It is a package of its own, since importing `transformers_autogaze` loads torch and transformers. Help is therefore fast: only the
module of the given command is imported.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn


COMMANDS = {
    "prune": ("prune videos and show the kept patches", "transformers_autogaze_cli.prune"),
    "demo": ("prune a synthetic demo clip", "transformers_autogaze_cli.prune"),
    "app": ("serve a web page that prunes videos and shows the kept patches", "transformers_autogaze_cli.app"),
    "prune-dataset": (
        "prune any number of videos with Ray, into Parquet shards with one row for each video",
        "transformers_autogaze_cli.prune_dataset",
    ),
    "evaluate": (
        "compare selectors, by rebuilt pixels or by the features that an encoder preserves",
        "transformers_autogaze.cli.evaluate",
    ),
    "label": ("label videos by greedy search, for later training", "transformers_autogaze_cli.label"),
    "train": ("train a model on labels (stage 1)", "transformers_autogaze.cli.train"),
    "train-grpo": (
        "train a model further on gazes that it samples itself (stage 2)",
        "transformers_autogaze.cli.train",
    ),
    "distill": ("distill a selector from any vision encoder", "transformers_autogaze.cli.distill"),
}
"""Help text of each command, and the module whose `add_commands` adds it to the parser."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        arguments (`Sequence[str]`, *optional*): the arguments, those of the process by default.

    Returns:
        `int`: exit status, 0 for success and 2 for invalid input.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Training loads peft, and peft bitsandbytes, which reports a missing kernel for 4-bit weights. No command uses these.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    format_before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"autogaze: warning: {message}\n"
    try:
        options = _parser(arguments[0] if arguments else None).parse_args(arguments)
        return options.run(options) or 0
    except (ImportError, OSError, ValueError) as error:
        print_error(error)
        return 2
    finally:
        warnings.formatwarning = format_before


def print_error(error: object) -> None:
    """Prints an error in the format of all commands."""
    print(f"autogaze: error: {error}", file=sys.stderr)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Makes the parser, with the arguments of the given command only."""
    parser = _Parser(prog="autogaze", description="Keep the patches of a video that matter.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _, chosen = COMMANDS.get(command, (None, None))
    for name, (text, module) in COMMANDS.items():
        if module != chosen:
            commands.add_parser(name, help=text)
    if chosen is not None:
        import_module(chosen).add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import torch
        import transformers

        import transformers_autogaze

        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        print(f"autogaze {transformers_autogaze.__version__} ({versions})")
        parser.exit()
