"""
The command line: `autogaze prune` and `autogaze demo`; further commands are added by the `cli_*` modules.

A thin layer over the package: arguments in, files and a short table out. Frames pass through in chunks, so a long video
takes no more memory than a short one.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch.nn import functional as F
from transformers import AutoModel
from transformers.utils import logging

from . import (
    AUTOGAZE_SELECTOR,
    FEATURES_SELECTOR,
    FINEST_SELECTOR,
    GREEDY_SELECTOR,
    AutoGazeProcessor,
    CompositeReconstruction,
    GazeOutput,
    GazeSelector,
    cli_distillation,
    cli_evaluation,
    cli_training,
)
from .demo import render_demo_clip
from .gaze_files_autogaze import GazeFileWriter
from .selection_autogaze import resize_frames
from .video import write_video
from .video_decoding_autogaze import stream_video
from .video_gazing import GazeChunk, stream_gaze
from .visualization import contact_sheet, paint_gaze, side_by_side, to_frames


_SELECTORS = {
    "features": FEATURES_SELECTOR,
    "finest": FINEST_SELECTOR,
    "greedy": GREEDY_SELECTOR,
    "autogaze": AUTOGAZE_SELECTOR,
}
_PANEL = 448  # pixels on the shorter side of a panel at most
_SHEET = 8  # frames on the contact sheet
_PAINTED = 4  # frames that are painted together
_REBUILT = 2**22  # pixels of the frames that are rebuilt together, one frame at least


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        arguments (`Sequence[str]`, *optional*): the arguments, those of the process by default.

    Returns:
        `int`: exit status; 0 when all went well, 2 when the input was at fault.
    """
    options = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    try:
        options.run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"autogaze: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autogaze", description="Keep the patches of a video that matter.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write to")
    selector = output.add_mutually_exclusive_group()
    selector.add_argument("--model", metavar="DIR", help="checkpoint of a gaze model, a folder or a Hub repository")
    selector.add_argument(
        "--selector",
        choices=_SELECTORS,
        help="the selector distilled from DINOv2's features (features, the default), greedy search on pixels of the finest "
        "scale or of the four published ones, or the published AutoGaze weights, fetched from the Hub (no commercial use)",
    )
    budget = output.add_mutually_exclusive_group()
    budget.add_argument(
        "--clip-ratio",
        type=float,
        metavar="R",
        help="share of a dense encoder's tokens to keep of the whole video, 0..1, spent where they gain most (default: "
        "0.25 for the default selector)",
    )
    budget.add_argument("--tokens-per-second", type=float, metavar="N", help="tokens to keep per second of video")
    budget.add_argument(
        "--gazing-ratio",
        type=float,
        metavar="R",
        help="share of patches to keep of every frame at most, 0..1 (default: 0.75 for --selector greedy and autogaze)",
    )
    output.add_argument(
        "--task-loss-requirement",
        type=float,
        metavar="L",
        help="loss at which a frame is good enough; 0.7 is 26 dB for the selectors of this package (default: 0.7 for "
        "--selector greedy and autogaze)",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    output.add_argument("--device", default=default_device, help=f"where to compute (default: {default_device})")

    prune = commands.add_parser("prune", parents=[output], help="prune a video and show what was kept")
    prune.add_argument("video", metavar="VIDEO", help="path or http(s) URL of a video")
    frames = prune.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=int, metavar="N", help="how many frames to take, evenly (default: all)")
    frames.add_argument("--fps", type=float, metavar="F", help="how many frames to take per second")
    prune.add_argument(
        "--tiles",
        choices=["whole", "grid", "native"],
        default="whole",
        help="gaze at whole frames, resized (default); at tiles of frames resized to a grid of them that fits their "
        "aspect ratio; or at tiles of frames as large as they are",
    )
    prune.add_argument(
        "--max-tiles", type=int, default=48, metavar="N", help="tiles of a frame at most, for a grid (default: 48)"
    )
    prune.set_defaults(run=_prune)

    demo = commands.add_parser("demo", parents=[output], help="prune a clip that is rendered on the spot")
    demo.set_defaults(run=_demo)

    for module in (cli_training, cli_distillation, cli_evaluation):
        module.add_commands(commands)
    return parser


def _demo(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    options.video = str(write_video(options.output / "clip.mp4", render_demo_clip(), fps=15))
    options.frames = options.fps = None
    options.tiles, options.max_tiles = "whole", 1
    _prune(options)


def _prune(options: argparse.Namespace) -> None:
    folder = options.model or _SELECTORS[options.selector or "finest"]
    try:
        selector = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(options.device)
    except OSError as error:
        raise ValueError(
            f"`--model` must be a checkpoint's folder or Hub repository, got {folder!r}: {error}"
        ) from error
    settings = _settings(options, selector)
    processor = _load_processor(folder)
    metadata, frames = stream_video(options.video, num_frames=options.frames, fps=options.fps)
    count = len(metadata.frames_indices)
    rate = (metadata.fps or 30) * count / metadata.total_num_frames
    # Times of their own only where the frames come unevenly.
    times = getattr(metadata, "frame_times", None)
    chunks = stream_gaze(
        selector,
        _SizedFrames(frames, count),
        processor.video_processor,
        tiles=options.tiles,
        max_tiles=options.max_tiles,
        frame_rate=rate,
        **settings,
    )
    shown = {index * (count - 1) // max(1, min(count, _SHEET) - 1) for index in range(min(count, _SHEET))}

    options.output.mkdir(parents=True, exist_ok=True)
    panels: list[list[np.ndarray]] = []
    start = time.perf_counter()
    numbers = metadata.frames_indices, metadata.timestamps if metadata.fps else None
    with GazeFileWriter(*numbers) as records:
        summary = Summary(processor, records)

        def overlay() -> Iterator[np.ndarray]:
            with tqdm(total=count, unit="frame", desc="pruning") as progress:
                for chunk in chunks:
                    pictures = summary.add(chunk)
                    first, length = chunk.start, len(chunk.frames)
                    # Frames as they were filmed are large; they must not wait until the next ones are here.
                    del chunk
                    panels.extend([p[i].copy() for p in pictures] for i in range(length) if first + i in shown)
                    progress.update(length)
                    joined = side_by_side(pictures)
                    del pictures
                    yield from joined
                    del joined

        write_video(options.output / "overlay.mp4", overlay(), fps=rate, times=times)
        seconds = time.perf_counter() - start
        statistics = summary.statistics()
        records.write(
            options.output / "gaze.json",
            **summary.layout,
            num_frames=statistics["num_frames"],
            video=options.video,
            selector=_selector_name(options),
            tiles=options.tiles,
            settings=settings,
            fps=metadata.fps,
            width=metadata.width,
            height=metadata.height,
            duration=metadata.duration,
            statistics=statistics,
        )

    rows = [np.stack(strip) for strip in zip(*panels, strict=True)]
    names = ("original", "kept patches", "reconstruction from the kept patches")
    contact_sheet(list(zip(names, rows, strict=True)), list(statistics["patches_each_scale"])).save(
        options.output / "contact_sheet.png"
    )
    _print_table(options, settings, metadata, statistics, seconds)


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
    return options.model or options.selector or "finest"


def _load_processor(folder: str | Path) -> AutoGazeProcessor:
    try:
        return AutoGazeProcessor.from_pretrained(folder)
    except OSError:
        return AutoGazeProcessor()  # A checkpoint without a processor was trained on the published preprocessing.


@dataclass
class Summary:
    """
    Gathers what is to be told about a video that is gazed at chunk by chunk, and draws it.

    Args:
        processor ([`AutoGazeProcessor`]): what made the pixel values.
        records ([`GazeFileWriter`]): takes the records of kept patches.
    """

    processor: AutoGazeProcessor
    records: GazeFileWriter
    parts: list[dict[str, Any]] = field(default_factory=list)
    squared_errors: list[float] = field(default_factory=list)
    _composite: CompositeReconstruction | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    _reconstruction: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, chunk: GazeChunk) -> list[np.ndarray]:
        """Takes the next chunk; gives its frames, their kept patches and reconstruction, small enough to show."""
        height, width = chunk.frames.shape[1:3]
        self._composite = self._composite or CompositeReconstruction(chunk.gaze.grid)
        self._write_records(chunk, height, width)
        self.parts.append(chunk.gaze.statistics())

        shrink = min(1.0, _PANEL / min(height, width))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        frames = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        frames = self.processor.video_processor.resize_levels(frames, size).permute(0, 2, 3, 1).contiguous()
        # The grid may reach beyond the frame.
        bottom, right = (
            max(0, round(small * whole / part) - small)
            for small, whole, part in zip(size, chunk.extent, (height, width), strict=True)
        )
        padded = np.pad(frames.numpy(), ((0, 0), (0, bottom), (0, right), (0, 0)))
        rate, painted = chunk.gaze.frame_sampling_rate, []
        # Painting takes many times the memory of the frames, so few are painted together.
        for first in range(0, chunk.gaze.num_frames, _PAINTED):
            masks = [mask[:, first : first + _PAINTED] for mask in chunk.gaze.gazing_mask]
            gaze = GazeOutput.from_masks(masks, chunk.gaze.grid, rate)
            drawn = paint_gaze(padded[first * rate : (first + _PAINTED) * rate], gaze)
            painted.append(drawn[:, : size[0], : size[1]])
        return [frames.numpy(), np.concatenate(painted), self._rebuild(chunk, size)]

    def _write_records(self, chunk: GazeChunk, height: int, width: int) -> None:
        rate, records = chunk.gaze.frame_sampling_rate, self.processor.post_process_gaze(chunk.gaze, chunk.extent)[0]
        self.layout = {"grid": chunk.gaze.grid, "extent": chunk.extent, "frame_sampling_rate": rate}
        for record in records:
            left, top, right, bottom = record["box"]
            record["box"] = [left, top, min(right, width), min(bottom, height)]
            record["frame"] = record["frame"] * rate + chunk.start
        self.records.add(records)

    def _rebuild(self, chunk: GazeChunk, size: tuple[int, int]) -> np.ndarray:
        """Rebuilds the frames from the kept patches, measures the error and gives them in a size to show."""
        processor, grid = self.processor.video_processor, chunk.gaze.grid
        # Of a grid that reaches beyond the frame, only the frame counts.
        inside = [
            round(side * part / whole)
            for side, part, whole in zip(grid.sizes[-1], chunk.frames.shape[1:3], chunk.extent, strict=True)
        ]
        bottom, right = (whole - part for whole, part in zip(chunk.extent, chunk.frames.shape[1:3], strict=True))
        step = max(1, _REBUILT // (grid.sizes[-1][0] * grid.sizes[-1][1]))
        shown = []
        for first in range(0, len(chunk.levels), step):
            values = processor.to_pixel_values(chunk.levels[first : first + step])
            values = F.pad(values, (0, right, 0, bottom))
            pixels = processor.to_pixels(resize_frames(values[None], grid.sizes[-1])).clamp(0, 1)
            masks = [mask[:, first : first + step] for mask in chunk.gaze.gazing_mask]
            rebuilt = self._composite.reconstruct(pixels, masks, self._reconstruction)
            self._reconstruction = rebuilt[:, -1].clone()
            rebuilt, pixels = (x[..., : inside[0], : inside[1]] for x in (rebuilt, pixels))
            self.squared_errors += (rebuilt - pixels).square().mean((0, 2, 3, 4)).tolist()
            shown.append(to_frames(rebuilt[0], size))
        return np.concatenate(shown)

    def statistics(self) -> dict[str, Any]:
        """Sums up the whole video; see [`~GazeOutput.statistics`]. `psnr` is that of the closed-form reconstruction."""
        frames, patches = (sum(part[key] for part in self.parts) for key in ("num_frames", "num_patches"))
        grid = self._composite.grid
        return {
            "num_frames": frames,
            "num_patches": patches,
            "kept_ratio": patches / (frames * grid.num_patches),
            "reduction_factor": frames * grid.num_patches_each_scale[-1] / patches if patches else None,
            "psnr": float(-10 * np.log10(max(np.mean(self.squared_errors), 1e-10))),
            "patches_each_frame": [count for part in self.parts for count in part["patches_each_frame"]],
            "patches_each_scale": {
                scale: sum(part["patches_each_scale"][scale] for part in self.parts)
                for scale in self.parts[0]["patches_each_scale"]
            },
        }


def _print_table(
    options: argparse.Namespace, settings: dict[str, float], metadata: Any, statistics: dict[str, Any], seconds: float
) -> None:
    count = statistics["num_frames"]
    factor = statistics["reduction_factor"]
    tokens = (
        f"{factor:.1f}x fewer than the {round(factor * statistics['num_patches'])} of a dense encoder"
        if factor
        else "none"
    )
    asked = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
    scales = ", ".join(f"{number} at {scale}" for scale, number in statistics["patches_each_scale"].items())
    rows = {
        "video": f"{Path(options.video).name}, {count} frames of {metadata.width}x{metadata.height}",
        "selector": f"{_selector_name(options)}, {asked}",
        "patches kept": f"{statistics['num_patches']}, {statistics['num_patches'] / count:.1f} a frame ({scales})",
        "tokens": tokens,
        "reconstruction": f"{statistics['psnr']:.1f} dB PSNR from the kept patches alone",
        "time": f"{seconds:.2f} s, {count / seconds:.0f} frames/s on {options.device}, from decoding to drawing",
        "written": ", ".join(str(options.output / name) for name in ("overlay.mp4", "gaze.json", "contact_sheet.png")),
    }
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
