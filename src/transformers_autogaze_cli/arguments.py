"""Types of arguments, and arguments that several commands share."""

import argparse
import math
from pathlib import Path
from typing import Any

from . import COMMANDS


def add_command(commands: Any, name: str, more: str = "", **options: Any) -> argparse.ArgumentParser:
    """Adds one of `COMMANDS`; its description is the help text, followed by `more`."""
    text = COMMANDS[name][0]
    return commands.add_parser(name, description=f"{text[0].upper()}{text[1:]}.{more}", **options)


def nonempty_string(text: str) -> str:
    """Checks that a string is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def nonempty_path(text: str) -> Path:
    """Converts a string to a path; an empty one, which would be the current folder, is an error."""
    return Path(nonempty_string(text))


def finite_number(text: str) -> float:
    """Converts a string to a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number such as 0.25, got {text!r}")
    return number


def positive_integer(text: str) -> int:
    """Converts a string to a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def add_output(parser: Any, metavar: str = "OUT", what: str = "folder to write to") -> None:
    """Adds the argument of the output."""
    parser.add_argument("-o", "--output", type=nonempty_path, required=True, metavar=metavar, help=what)


def add_device(parser: Any) -> None:
    """Adds the argument of the device."""
    parser.add_argument(
        "--device",
        type=nonempty_string,
        metavar="DEVICE",
        help="device to compute on; if not given, cuda if it is available, or else cpu",
    )


def task_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of the task of labels and rewards, `transformers_autogaze.training.task`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--task",
        choices=["pixels", "features"],
        default="pixels",
        help="loss that the chosen patches minimise: of reconstructed pixels, (40 - PSNR) / 20, or of an encoder's features, the share of "
        "their variance that a frame loses, 0..1",
    )
    parser.add_argument(
        "--feature-model",
        type=nonempty_string,
        metavar="DIR",
        help="selector distilled from the encoder, for --task features; if not given, the package's selector distilled from "
        "DINOv2",
    )
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to each help text, unless it is `None` or empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)
