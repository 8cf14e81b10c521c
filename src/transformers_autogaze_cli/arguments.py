"""Commands and the arguments that several of them have, spelled and checked alike."""

import argparse
import math
from pathlib import Path
from typing import Any

from . import COMMANDS


def add_command(commands: Any, name: str, more: str = "", **options: Any) -> argparse.ArgumentParser:
    """Adds one of `COMMANDS`; its description is the text there, followed by `more`."""
    text = COMMANDS[name][0]
    return commands.add_parser(name, description=f"{text[0].upper()}{text[1:]}.{more}", **options)


def a_name(text: str) -> str:
    """Takes a name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def a_path(text: str) -> Path:
    """Takes a path that is not empty, which would stand for the folder that the command runs in."""
    return Path(a_name(text))


def a_number(text: str) -> float:
    """Takes a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number such as 0.25, got {text!r}")
    return number


def a_count(text: str) -> int:
    """Takes a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def add_output(parser: Any, metavar: str = "OUT", what: str = "folder to write to") -> None:
    """Adds where to write."""
    parser.add_argument("-o", "--output", type=a_path, required=True, metavar=metavar, help=what)


def add_device(parser: Any) -> None:
    """Adds where to compute."""
    parser.add_argument(
        "--device",
        type=a_name,
        metavar="DEVICE",
        help="where to compute; if not given, on cuda where there is one, or else on the cpu",
    )
