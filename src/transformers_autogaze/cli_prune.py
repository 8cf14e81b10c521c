"""
The work of `autogaze prune` and `autogaze demo`: arguments in, files and a short table out.

Frames pass through in chunks, so a long video takes no more memory than a short one.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub.utils import tqdm
from transformers.video_utils import VideoMetadata

from transformers_autogaze_cli import print_error
from transformers_autogaze_cli.prune import SELECTORS

from .checkpoints import check_device, load_selector
from .demo import render_demo_clip
from .gaze_files_autogaze import GazeFileWriter
from .gaze_summary import GazeSummary
from .output_files import check_folder, check_not_inputs, replacing_files
from .processing_autogaze import AutoGazeProcessor
from .selection_autogaze import GazeSelector
from .training.videos import find_videos
from .video import write_video
from .video_decoding_autogaze import stream_video
from .video_gazing import GazeChunk, stream_gaze
from .visualization import contact_sheet, side_by_side


_SHEET = 8  # frames on the contact sheet
_FILES = ("overlay.mp4", "gaze.json", "contact_sheet.png")
_PANELS = ("original", "kept patches", "reconstruction from the kept patches")
_LONGEST = 200  # characters of a video's name that are shown


class Pruning(NamedTuple):
    """
    What all videos of a run have in common.

    Args:
        options (`argparse.Namespace`): the arguments.
        selector ([`GazeSelector`]): what chooses.
        processor ([`AutoGazeProcessor`]): what makes its pixel values.
        settings (`dict[str, float]`): budgets and thresholds.
    """

    options: argparse.Namespace
    selector: GazeSelector
    processor: AutoGazeProcessor
    settings: dict[str, float]


def demo(options: argparse.Namespace) -> int:
    """Runs `autogaze demo`."""
    check_folder(options.output)
    with tempfile.TemporaryDirectory() as folder:
        # The clip itself is the left third of the overlay; a file of its own could replace one of the user's.
        options.videos = [str(write_video(Path(folder) / "demo.mp4", render_demo_clip(), fps=15))]
        options.num_frames = options.fps = options.max_tiles = None
        options.tiles = "whole"
        return prune(options, ["demo"])


def prune(options: argparse.Namespace, titles: Sequence[str] | None = None) -> int:
    """
    Runs `autogaze prune`.

    Args:
        options (`argparse.Namespace`): the arguments.
        titles (`Sequence[str]`, *optional*): what to call the videos; as they were named by default.

    Returns:
        `int`: exit status; 2 where one of several videos failed.
    """
    if options.max_tiles is not None and options.tiles != "grid":
        raise ValueError(f"`--max-tiles` needs `--tiles grid`, got {options.max_tiles} with `--tiles {options.tiles}`")
    videos = _name_videos(options.videos)
    is_alone = len(videos) == 1
    folders = [options.output if is_alone else options.output / name for name in videos.values()]
    for folder in folders:
        check_folder(folder)
        check_not_inputs([folder / name for name in _FILES], videos)
    device = check_device(options.device)
    # What is at fault with a single video is said before the selector is loaded.
    opened = _open(*videos, options) if is_alone else None
    name = options.model if options.model is not None else _selector_name(options)
    selector, processor = load_selector(name, device=device)
    work = Pruning(options, selector, processor, _settings(options, selector))
    status = 0
    for video, title, folder in zip(videos, titles or videos, folders, strict=True):
        try:
            _prune_video(work, title, *(opened or _open(video, options)), folder)
        except (OSError, ValueError) as error:
            if is_alone:
                raise
            print_error(f"{_short(title)}: {error}")
            status = 2
    return status


def _name_videos(inputs: Sequence[str]) -> dict[str, str]:
    """Finds videos, and a name for each that no other has."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for item in inputs:
        is_url = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", item) is not None
        if not is_url and not os.path.exists(item):
            raise FileNotFoundError(
                f"VIDEO must be a video file, a folder of videos or an http(s) URL, but there is no {item!r}"
            )
        if os.path.isdir(item):
            paths = [path for path in map(Path, find_videos(Path(item))) if not _is_overlay(path)]
            if not paths:
                raise ValueError(
                    f"VIDEO folder {item!r} must hold videos beside those that an earlier run wrote, found none"
                )
            found = {str(path): str(path.relative_to(item).with_suffix("")) for path in paths}
        else:
            path = urlsplit(item).path if is_url and not os.path.exists(item) else item
            found = {item: Path(path[-_LONGEST:]).stem or "video"}
        for video, name in found.items():
            if video in names:
                continue
            places = chain([name], (f"{name}-{number}" for number in count(2)))
            names[video] = next(place for place in places if place not in taken)
            taken.add(names[video])
    return names


def _is_overlay(path: Path) -> bool:
    """Whether an earlier run wrote this video."""
    return path.name == _FILES[0] and path.with_name(_FILES[1]).exists()


def _open(video: str, options: argparse.Namespace) -> tuple[VideoMetadata, Iterator[np.ndarray]]:
    return stream_video(video, num_frames=options.num_frames, fps=options.fps)


def _prune_video(
    work: Pruning, title: str, metadata: VideoMetadata, frames: Iterator[np.ndarray], folder: Path
) -> None:
    """Gazes at a video and writes what was kept; all of it, or nothing."""
    options, length = work.options, len(metadata.frames_indices)
    rate = (metadata.fps or 30) * length / metadata.total_num_frames
    chunks = stream_gaze(
        work.selector,
        _SizedFrames(frames, length),
        work.processor.video_processor,
        tiles=options.tiles,
        frame_rate=rate,
        **({} if options.max_tiles is None else {"max_tiles": options.max_tiles}),
        **work.settings,
    )
    shown = {index * (length - 1) // max(1, min(length, _SHEET) - 1) for index in range(min(length, _SHEET))}
    panels: list[list[np.ndarray]] = []
    start = time.perf_counter()
    numbers = metadata.frames_indices, metadata.timestamps if metadata.fps else None
    with replacing_files(folder, _FILES) as unfinished, GazeFileWriter(*numbers) as records:
        summary = GazeSummary(work.processor, records)
        pictures = _draw(chunks, length, summary, shown, panels, is_sheet_only=options.no_overlay)
        if options.no_overlay:
            for _ in pictures:
                pass
        else:
            # Times of their own only where the frames come unevenly.
            times = getattr(metadata, "frame_times", None)
            write_video(unfinished / "overlay.mp4", pictures, fps=rate, times=times)
        seconds = time.perf_counter() - start
        statistics = summary.statistics()
        records.write(
            unfinished / "gaze.json",
            **summary.layout,
            num_frames=statistics["num_frames"],
            video=title,
            selector=_selector_name(options),
            tiles=options.tiles,
            settings=work.settings,
            fps=metadata.fps,
            width=metadata.width,
            height=metadata.height,
            duration=metadata.duration,
            statistics=statistics,
        )
        rows = [np.stack(strip) for strip in zip(*panels, strict=True)]
        sheet = contact_sheet(list(zip(_PANELS, rows, strict=True)), list(statistics["patches_each_scale"]))
        sheet.save(unfinished / "contact_sheet.png")
    _print_table(work, title, metadata, statistics, seconds, folder)


def _draw(
    chunks: Iterator[GazeChunk],
    total: int,
    summary: GazeSummary,
    shown: Collection[int],
    panels: list[list[np.ndarray]],
    is_sheet_only: bool,
) -> Iterator[np.ndarray]:
    """Draws the frames of the overlay, and fills `panels` with the pictures of the frames to show on the sheet."""
    with tqdm(total=total, unit="frame", desc="pruning") as progress:
        for chunk in chunks:
            pictures = summary.add(chunk, shown if is_sheet_only else None)
            first, length = chunk.start, len(chunk.frames)
            # Frames as they were filmed are large; they must not wait until the next ones are here.
            del chunk
            panels.extend([p[i].copy() for p in pictures] for i in range(length) if first + i in shown)
            progress.update(length)
            joined = [] if is_sheet_only else side_by_side(pictures)
            del pictures
            yield from joined
            del joined


def _settings(options: argparse.Namespace, selector: GazeSelector) -> dict[str, float]:
    """Gives the budgets and thresholds that were asked for, or those of the selector if none was."""
    names = ("clip_ratio", "tokens_per_second", "gazing_ratio", "task_loss_requirement")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if asked:
        return asked
    share = getattr(selector.config, "clip_ratio", None)
    return {"gazing_ratio": 0.75, "task_loss_requirement": 0.7} if share is None else {"clip_ratio": share}


class _SizedFrames:
    """Frames that come one by one, and how many they are."""

    def __init__(self, frames: Iterator[np.ndarray], count: int):
        self.frames, self.count = frames, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames


def _selector_name(options: argparse.Namespace) -> str:
    return options.model or options.selector or SELECTORS[0]


def _short(title: str) -> str:
    return title if len(title) <= _LONGEST else f"{title[:_LONGEST]}.."


def _print_table(
    work: Pruning,
    title: str,
    metadata: VideoMetadata,
    statistics: dict[str, Any],
    seconds: float,
    folder: Path,
) -> None:
    count, kept = statistics["num_frames"], statistics["num_patches"]
    asked = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in work.settings.items())
    scales = ", ".join(f"{number} at {scale}" for scale, number in statistics["patches_each_scale"].items())
    factor = statistics["reduction_factor"]
    tokens = f"{factor:.1f}x fewer than the {round(factor * kept)} of a dense encoder" if factor else "none"
    written = [folder / name for name in _FILES if not (work.options.no_overlay and name == "overlay.mp4")]
    rows = {
        "video": f"{Path(_short(title)).name}, {count} frames of {metadata.width}x{metadata.height}",
        "selector": f"{_selector_name(work.options)}, {asked}",
        "patches kept": f"{kept}, {kept / count:.1f} a frame ({scales})",
        "tokens": tokens,
        "reconstruction": f"{statistics['psnr']:.1f} dB PSNR from the kept patches alone",
        "time": f"{seconds:.2f} s, {count / seconds:.0f} frames/s on {work.selector.device}, from decoding to drawing",
        "written": ", ".join(map(str, written)),
    }
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))
