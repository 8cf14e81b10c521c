"""The arguments of `autogaze prune` and `autogaze demo`, which `transformers_autogaze.cli.prune` implements."""

import argparse
from typing import Any

from .arguments import add_command, add_device, add_output, finite_number, nonempty_string, positive_integer


SELECTORS = ("features", "finest", "greedy", "autogaze")
"""Names of the selectors of the package, the default one first."""


def add_commands(commands: Any) -> None:
    """Adds `prune` and `demo` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    prune = _add_command(commands, "prune", "autogaze prune VIDEO ... -o OUT [options]")
    prune.add_argument(
        "videos",
        nargs="+",
        type=nonempty_string,
        metavar="VIDEO",
        help="path or http(s) URL of a video, or a folder of videos; with several videos, each gets its own folder in OUT",
    )
    add_frames(prune.add_argument_group("frames and tiles"))
    _add_command(commands, "demo", "autogaze demo -o OUT [options]")


def _add_command(commands: Any, name: str, usage: str) -> argparse.ArgumentParser:
    """Adds one of the two commands, with the arguments that both have."""
    command = add_command(commands, name, usage=usage)
    add_output(command)
    command.add_argument("--no-overlay", action="store_true", help="write no overlay.mp4, the slowest part")
    command.add_argument(
        "--timeline",
        action="store_true",
        help="draw a timeline of the patches of every frame and of scene cuts below the overlay and the contact sheet",
    )
    add_device(command)
    add_selector(command.add_argument_group("selector"))
    add_budgets(command.add_argument_group("budget and threshold"))
    command.set_defaults(run=_run, command=name)
    return command


def add_selector(group: Any) -> None:
    """Adds the choice of the selector."""
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--selector",
        choices=SELECTORS,
        help="features (default): distilled from DINOv2; finest: greedy search on pixels of the finest scale; greedy: the same "
        "on the four published scales; autogaze: the published weights, from the Hub (no commercial use)",
    )
    group.add_argument(
        "--model", type=nonempty_string, metavar="DIR", help="checkpoint of a gaze model, a folder or a Hub repository"
    )


def add_budgets(group: Any) -> None:
    """Adds the budgets and the threshold."""
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--clip-ratio",
        type=finite_number,
        metavar="R",
        help="tokens of the whole video to keep, as a share of a dense encoder's, 0..1, allocated where they gain most "
        "(default: 0.25 for the default selector)",
    )
    budget.add_argument(
        "--tokens-per-second",
        type=finite_number,
        metavar="N",
        help="tokens to keep per second of video, on average over any ten seconds",
    )
    budget.add_argument(
        "--gazing-ratio",
        type=finite_number,
        metavar="R",
        help="maximum share of patches to keep of every frame, 0..1 (default: 0.75 for --selector greedy and autogaze)",
    )
    group.add_argument(
        "--task-loss-requirement",
        type=finite_number,
        metavar="L",
        help="threshold of the loss at which a frame ends: for the default selector the share of the encoder's feature variance "
        "that a frame may lose, 0..1; for selectors on pixels (40 - PSNR) / 20, so that 0.7 is 26 dB (default: 0.7 for "
        "--selector greedy and autogaze, none with any of the options above)",
    )


def add_frames(group: Any) -> None:
    """Adds the choice of frames and tiles."""
    frames = group.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames", type=positive_integer, metavar="N", help="frames to sample evenly (default: all)"
    )
    frames.add_argument("--fps", type=finite_number, metavar="F", help="frames to sample per second")
    group.add_argument(
        "--tiles",
        choices=["whole", "grid", "native"],
        default="whole",
        help="process whole resized frames (default), tiles of frames that are resized to a grid of tiles of about their "
        "aspect ratio, or tiles of frames at their native size",
    )
    group.add_argument(
        "--max-tiles",
        type=positive_integer,
        metavar="N",
        help="maximum number of tiles of a frame, for --tiles grid (default: 48)",
    )


def check_frames(options: argparse.Namespace) -> None:
    """
    Checks the options of [`add_frames`] against each other.

    Raises:
        ValueError: if `--max-tiles` is given without `--tiles grid`.
    """
    if options.max_tiles is not None and options.tiles != "grid":
        raise ValueError(f"`--max-tiles` needs `--tiles grid`, got {options.max_tiles} with `--tiles {options.tiles}`")


def _run(options: argparse.Namespace) -> int:
    from transformers_autogaze.cli import prune

    return prune.demo(options) if options.command == "demo" else prune.prune(options)
