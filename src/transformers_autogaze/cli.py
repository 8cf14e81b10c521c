"""
The command line: `autogaze prune` and `autogaze demo`.

A thin layer over the package: arguments in, files and a short table out. Frames pass through in chunks, so a long video
takes no more memory than a short one.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from transformers import AutoModel
from transformers.utils import logging

from . import DEFAULT_SELECTOR, AutoGazeProcessor, CompositeReconstruction, GazeOutput, GazeSelector
from .demo import render_demo_clip
from .selection_autogaze import resize_frames
from .video import write_video
from .video_decoding_autogaze import stream_video
from .visualization import contact_sheet, paint_gaze, side_by_side, to_frames


_CHUNK = 16  # frames, where the selector itself has no limit
_PANEL = 448  # pixels on the shorter side of a panel at most
_SHEET = 8  # frames on the contact sheet


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
    except (ValueError, OSError) as error:
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
    selector.add_argument("--selector", choices=["greedy"], help="a selector without weights (default: greedy)")
    output.add_argument(
        "--gazing-ratio",
        type=float,
        default=0.75,
        metavar="R",
        help="share of patches to keep at most, 0..1 (default: 0.75)",
    )
    output.add_argument(
        "--task-loss-requirement",
        type=float,
        default=0.7,
        metavar="L",
        help="loss at which a frame is good enough; 0.7 is 26 dB for the greedy selector (default: 0.7)",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    output.add_argument("--device", default=default_device, help=f"where to compute (default: {default_device})")

    prune = commands.add_parser("prune", parents=[output], help="prune a video and show what was kept")
    prune.add_argument("video", metavar="VIDEO", help="path or http(s) URL of a video")
    frames = prune.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=int, metavar="N", help="how many frames to take, evenly (default: all)")
    frames.add_argument("--fps", type=float, metavar="F", help="how many frames to take per second")
    prune.set_defaults(run=_prune)

    demo = commands.add_parser("demo", parents=[output], help="prune a clip that is rendered on the spot")
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    options.video = str(write_video(options.output / "clip.mp4", render_demo_clip(), fps=15))
    options.frames = options.fps = None
    _prune(options)


def _prune(options: argparse.Namespace) -> None:
    settings = {"gazing_ratio": options.gazing_ratio, "task_loss_requirement": options.task_loss_requirement}
    folder = DEFAULT_SELECTOR if options.model is None else options.model
    try:
        selector = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(options.device)
    except OSError as error:
        raise ValueError(
            f"`--model` must be a checkpoint's folder or Hub repository, got {folder!r}: {error}"
        ) from error
    pruning = Pruning(selector, _load_processor(folder), settings)
    metadata, frames = stream_video(options.video, num_frames=options.frames, fps=options.fps)
    count = len(metadata.frames_indices)
    shown = {index * (count - 1) // max(1, min(count, _SHEET) - 1) for index in range(min(count, _SHEET))}

    options.output.mkdir(parents=True, exist_ok=True)
    panels: list[list[np.ndarray]] = []

    def overlay() -> Iterator[np.ndarray]:
        done = 0
        with tqdm(total=count, unit="frame", desc="pruning") as progress:
            while chunk := list(islice(frames, pruning.chunk_length)):
                pictures = pruning.add(np.stack(chunk))
                panels.extend([p[i] for p in pictures] for i in range(len(chunk)) if done + i in shown)
                done += len(chunk)
                progress.update(len(chunk))
                yield from side_by_side(pictures)

    rate = (metadata.fps or 30) * count / metadata.total_num_frames
    write_video(options.output / "overlay.mp4", overlay(), fps=rate)
    rows = [np.stack(strip) for strip in zip(*panels, strict=True)]
    names = ("original", "kept patches", "reconstruction from the kept patches")
    contact_sheet(list(zip(names, rows, strict=True)), selector.config.scales).save(
        options.output / "contact_sheet.png"
    )

    statistics = pruning.statistics()
    gaze = {
        "video": options.video,
        "selector": options.model or "greedy",
        "frame_indices": [int(index) for index in metadata.frames_indices],
        **settings,
        "statistics": statistics,
        "records": pruning.records,
    }
    (options.output / "gaze.json").write_text(json.dumps(gaze, indent=1) + "\n", encoding="utf-8")
    _print_table(options, metadata, statistics, pruning.seconds)


def _load_processor(folder: str | Path) -> AutoGazeProcessor:
    try:
        return AutoGazeProcessor.from_pretrained(folder)
    except OSError:
        return AutoGazeProcessor()  # A checkpoint without a processor was trained on the published preprocessing.


@dataclass
class Pruning:
    """
    Prunes a video chunk by chunk and gathers what is to be told about it.

    Args:
        selector ([`GazeSelector`]): what chooses. One with `config.max_num_frames` starts anew with every chunk of so many
            frames; another goes on with its stream.
        processor ([`AutoGazeProcessor`]): what makes pixel values of frames.
        settings (`dict`): `gazing_ratio` and `task_loss_requirement`.
    """

    selector: GazeSelector
    processor: AutoGazeProcessor
    settings: dict[str, float]
    records: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    squared_errors: list[float] = field(default_factory=list)
    seconds: float = 0.0
    _state: object | None = None
    _reconstruction: torch.Tensor | None = None

    @property
    def chunk_length(self) -> int:
        """Frames that [`Pruning.add`] takes at once."""
        return self.selector.config.max_num_frames or _CHUNK

    @torch.no_grad()
    def add(self, frames: np.ndarray) -> list[np.ndarray]:
        """Prunes the next frames `(frames, height, width, 3)`; gives the frames, their kept patches and reconstruction."""
        video_processor = self.processor.video_processor
        inputs = video_processor(
            frames,
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
            device=str(self.selector.device),
        )
        video = inputs["pixel_values_videos"]
        start = time.perf_counter()
        goes_on = self.selector.config.max_num_frames is None
        gaze = self.selector.generate(video, **self.settings, past_key_values=self._state, use_cache=goes_on)
        self.parts.append(gaze.statistics())
        self.seconds += time.perf_counter() - start
        self._state = gaze.past_key_values

        pixels = video_processor.to_pixels(resize_frames(video, gaze.grid.sizes[-1])).clamp(0, 1)
        rebuilt = CompositeReconstruction(gaze.grid).reconstruct(pixels, gaze, self._reconstruction)
        self._reconstruction = rebuilt[:, -1]
        self.squared_errors += (rebuilt - pixels).square().mean((0, 2, 3, 4)).tolist()

        first = sum(part["num_frames"] for part in self.parts[:-1])
        records = self.processor.post_process_gaze(gaze, frames.shape[1:3])[0]
        self.records += [{**record, "frame": record["frame"] + first} for record in records]
        return self._draw(frames, gaze, rebuilt[0])

    def statistics(self) -> dict[str, Any]:
        """Sums up the whole video; see [`~GazeOutput.statistics`]. `psnr` is that of the closed-form reconstruction."""
        frames, patches = (sum(part[key] for part in self.parts) for key in ("num_frames", "num_patches"))
        grid = self.selector.config.grid
        return {
            "num_frames": frames,
            "num_patches": patches,
            "kept_ratio": patches / (frames * grid.num_patches),
            "reduction_factor": frames * grid.num_patches_each_scale[-1] / patches,
            "psnr": float(-10 * np.log10(max(np.mean(self.squared_errors), 1e-10))),
            "patches_each_frame": [count for part in self.parts for count in part["patches_each_frame"]],
            "patches_each_scale": {
                scale: sum(part["patches_each_scale"][scale] for part in self.parts)
                for scale in self.parts[0]["patches_each_scale"]
            },
        }

    def _draw(self, frames: np.ndarray, gaze: GazeOutput, rebuilt: torch.Tensor) -> list[np.ndarray]:
        height, width = frames.shape[1:3]
        shrink = min(1.0, _PANEL / min(height, width))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        if size != (height, width):
            small = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR) for frame in frames]
            frames = np.stack([np.asarray(frame) for frame in small])
        return [frames, paint_gaze(frames, gaze), to_frames(rebuilt, size)]


def _print_table(options: argparse.Namespace, metadata: Any, statistics: dict[str, Any], seconds: float) -> None:
    count = statistics["num_frames"]
    dense = round(statistics["reduction_factor"] * statistics["num_patches"])
    scales = ", ".join(f"{number} at {scale}" for scale, number in statistics["patches_each_scale"].items())
    rows = {
        "video": f"{Path(options.video).name}, {count} frames of {metadata.width}x{metadata.height}",
        "selector": f"{options.model or 'greedy'}, ratio {options.gazing_ratio:g}, threshold {options.task_loss_requirement:g}",
        "patches kept": f"{statistics['num_patches']}, {statistics['num_patches'] / count:.1f} a frame ({scales})",
        "tokens": f"{statistics['reduction_factor']:.1f}x fewer than the {dense} of a dense encoder",
        "reconstruction": f"{statistics['psnr']:.1f} dB PSNR from the kept patches alone",
        "gazing": f"{seconds:.2f} s, {count / seconds:.0f} frames/s on {options.device}",
        "written": ", ".join(str(options.output / name) for name in ("overlay.mp4", "gaze.json", "contact_sheet.png")),
    }
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
