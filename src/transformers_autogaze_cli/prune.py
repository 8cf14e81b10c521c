"""The arguments of `autogaze prune` and `autogaze demo`, which `transformers_autogaze.cli.prune` implements."""

import argparse
from typing import Any

from .arguments import a_count, a_name, a_number, add_command, add_device, add_output


SELECTORS = ("features", "finest", "greedy", "autogaze")
"""Names of the selectors of the package, the default one first."""


def add_commands(commands: Any) -> None:
    """Adds `prune` and `demo` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    prune = _add_command(commands, "prune", "autogaze prune VIDEO ... -o OUT [options]")
    prune.add_argument(
        "videos",
        nargs="+",
        type=a_name,
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
        help="draw a timeline below the overlay and the contact sheet: number of patches of every frame, and scene cuts",
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
        help="the selector distilled from DINOv2's features (features, the default), greedy search on pixels of the finest "
        "scale or of the four published ones, or the published AutoGaze weights, fetched from the Hub (no commercial use)",
    )
    group.add_argument(
        "--model", type=a_name, metavar="DIR", help="checkpoint of a gaze model, a folder or a Hub repository"
    )


def add_budgets(group: Any) -> None:
    """Adds the budgets and the threshold."""
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--clip-ratio",
        type=a_number,
        metavar="R",
        help="share of a dense encoder's tokens to keep of the whole video, 0..1, spent where they gain most (default: "
        "0.25 for the default selector)",
    )
    budget.add_argument(
        "--tokens-per-second",
        type=a_number,
        metavar="N",
        help="tokens to keep per second of video, on average over any ten seconds",
    )
    budget.add_argument(
        "--gazing-ratio",
        type=a_number,
        metavar="R",
        help="share of patches to keep of every frame at most, 0..1 (default: 0.75 for --selector greedy and autogaze)",
    )
    group.add_argument(
        "--task-loss-requirement",
        type=a_number,
        metavar="L",
        help="loss at which a frame is good enough: for the default selector the share of the encoder's feature variance that it "
        "may lose, 0..1; for those on pixels 0.7 is 26 dB (default: 0.7 for --selector greedy and autogaze, none with any of the "
        "options above)",
    )


def add_frames(group: Any) -> None:
    """Adds the choice of frames and tiles."""
    frames = group.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames", type=a_count, metavar="N", help="how many frames to take, evenly (default: all)"
    )
    frames.add_argument("--fps", type=a_number, metavar="F", help="how many frames to take per second")
    group.add_argument(
        "--tiles",
        choices=["whole", "grid", "native"],
        default="whole",
        help="gaze at whole frames, resized (default); at tiles of frames resized to a grid of them that fits their "
        "aspect ratio; or at tiles of frames as large as they are",
    )
    group.add_argument(
        "--max-tiles",
        type=a_count,
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
