"""The implementation of `autogaze prune` and `autogaze demo`: runs [`prune_video`] on each video and prints a table."""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub.utils import tqdm

from transformers_autogaze_cli import print_error
from transformers_autogaze_cli.prune import SELECTORS, check_frames

from ..hub.checkpoints import check_device, load_selector
from ..processing_autogaze import AutoGazeProcessor
from ..pruning.opened_video import OpenedVideo
from ..pruning.video_pruning import FILES, GAZE_FILE, OVERLAY, VideoPruning, prune_video
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import check_budgets
from ..utils.output_files import check_folder, check_not_inputs
from ..utils.video_files import find_videos, is_url
from ..video.demo import render_demo_clip
from ..video.writing import write_video


_MAX_NAME = 200  # characters of a video's name that are printed
_SETTINGS = ("clip_ratio", "tokens_per_second", "gazing_ratio", "task_loss_requirement")


def demo(options: argparse.Namespace) -> int:
    """Runs `autogaze demo`."""
    _check_budgets(options)
    check_folder(options.output)
    with tempfile.TemporaryDirectory() as folder:
        # The clip is not kept, since it is part of the overlay and could replace a file of the user.
        options.videos = [str(write_video(Path(folder) / "demo.mp4", render_demo_clip(), fps=15))]
        options.num_frames = options.fps = options.max_tiles = None
        options.tiles = "whole"
        return prune(options, ["demo"])


def prune(options: argparse.Namespace, titles: Sequence[str] | None = None) -> int:
    """
    Runs `autogaze prune`.

    Args:
        options (`argparse.Namespace`): the arguments.
        titles (`Sequence[str]`, *optional*): names of the videos; their paths or URLs by default.

    Returns:
        `int`: exit status; 2 where one of several videos failed.
    """
    check_frames(options)
    _check_budgets(options)
    videos = _name_videos(options.videos)
    is_single = len(videos) == 1
    folders = [options.output if is_single else options.output / name for name in videos.values()]
    for folder in folders:
        check_folder(folder)
        check_not_inputs([folder / name for name in FILES], videos)
    device = check_device(options.device)
    # Errors of a single video are reported before the selector is loaded.
    opened = _open(next(iter(videos)), options) if is_single else None
    name = options.model or options.selector or SELECTORS[0]
    loaded = load_selector(name, argument="--model" if options.model else "--selector", device=device)
    status = 0
    for video, title, folder in zip(videos, titles or videos, folders, strict=True):
        try:
            _prune_video(_open(video, options) if opened is None else opened, loaded, options, name, title, folder)
        except (OSError, ValueError) as error:
            if is_single:
                raise
            print_error(f"{_shorten(title)}: {error}")
            status = 2
    return status


def _check_budgets(options: argparse.Namespace) -> None:
    check_budgets(**{setting: getattr(options, setting) for setting in _SETTINGS})


def _prune_video(
    video: OpenedVideo,
    loaded: tuple[GazeSelector, AutoGazeProcessor],
    options: argparse.Namespace,
    selector_name: str,
    title: str,
    folder: Path,
) -> None:
    pruning = prune_video(
        video,
        *loaded,
        tiles=options.tiles,
        max_tiles=options.max_tiles,
        **{setting: getattr(options, setting) for setting in _SETTINGS},
        title=title,
        selector_name=selector_name,
        progress=lambda done, _: bar.update(done - bar.n),
    )
    # The bar is opened once every argument is checked.
    with tqdm(total=len(video), unit="frame", desc="pruning") as bar:
        start = time.perf_counter()
        pruning.save(folder, overlay=not options.no_overlay, timeline=options.timeline)
        seconds = time.perf_counter() - start
    _print_table(pruning, seconds, [folder / name for name in FILES if (folder / name).exists()])


def _name_videos(inputs: Sequence[str]) -> dict[str, str]:
    """Finds the videos and returns a unique name for each path or URL."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for item in inputs:
        if not is_url(item) and not os.path.exists(item):
            raise FileNotFoundError(
                f"VIDEO must be a video file, a folder of videos or an http(s) URL, but there is no {item!r}"
            )
        if os.path.isdir(item):
            paths = [path for path in map(Path, find_videos(Path(item), "VIDEO folder")) if not _is_overlay(path)]
            if not paths:
                raise ValueError(
                    f"VIDEO folder {item!r} must hold videos other than those that an earlier run wrote, found none"
                )
            found = {str(path): str(path.relative_to(item).with_suffix("")) for path in paths}
        else:
            path = urlsplit(item).path if is_url(item) and not os.path.exists(item) else item
            found = {item: Path(path[-_MAX_NAME:]).stem or "video"}
        for video, name in found.items():
            if video in names:
                continue
            candidates = chain([name], (f"{name}-{number}" for number in count(2)))
            names[video] = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(names[video])
    return names


def _is_overlay(path: Path) -> bool:
    """Whether an earlier run wrote this video."""
    return path.name == OVERLAY and path.with_name(GAZE_FILE).exists()


def _open(video: str, options: argparse.Namespace) -> OpenedVideo:
    return OpenedVideo(video, num_frames=options.num_frames, fps=options.fps)


def _shorten(title: str) -> str:
    return title if len(title) <= _MAX_NAME else f"{title[:_MAX_NAME]}.."


def _print_table(pruning: VideoPruning, seconds: float, written: Sequence[Path]) -> None:
    statistics, metadata = pruning.statistics, pruning.video.metadata
    count, kept = statistics["num_frames"], statistics["num_patches"]
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in pruning.settings.items())
    scales = ", ".join(f"{number} at {scale}" for scale, number in statistics["patches_each_scale"].items())
    factor = statistics["reduction_factor"]
    tokens = f"{factor:.1f}x fewer than the {round(factor * kept)} of a dense encoder" if factor else "none"
    device = pruning.selector.device
    rows = {
        "video": f"{Path(_shorten(pruning.title)).name}, {count} frame{'s' if count != 1 else ''} of {metadata.width}x{metadata.height}",
        "selector": f"{pruning.selector_name}, {settings}",
        "patches kept": f"{kept}, {kept / count:.1f} a frame ({scales})",
        "tokens": tokens,
        "reconstruction": f"{statistics['psnr']:.1f} dB PSNR from the kept patches",
        "time": f"{seconds:.2f} s, {count / seconds:.0f} frames/s on {device}, from decoding to drawing",
        "written": ", ".join(map(str, written)),
    }
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))
