"""
Measures the frames per second of decoding, preprocessing and choosing patches.

Renders a 1080p H.264 clip and measures, for every tiling: decoding to RGB; preprocessing of decoded frames (resizing, tiling,
normalisation); both together, as in `stream_gaze`; the selector; and all of it. Prints medians and writes JSON.

    python benchmarks/video_throughput.py -o video_throughput.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from measurement import machine
from transformers import AutoModel

from transformers_autogaze import AUTOGAZE_SELECTOR, GazeOutput, GazeSelector, stream_gaze, stream_video, write_video
from transformers_autogaze.video.demo import render_demo_clip


class EmptySelector:
    """Keeps no patch and takes no time."""

    def __init__(self, selector: GazeSelector):
        self.config, self.device, self.dtype = selector.config, selector.device, selector.dtype

    def generate(self, pixel_values_videos: torch.Tensor, **settings) -> GazeOutput:
        batch, frames = pixel_values_videos.shape[:2]
        counts = self.config.grid.num_patches_each_scale
        masks = [torch.zeros(batch, frames, count, dtype=torch.bool, device=self.device) for count in counts]
        return GazeOutput.from_masks(masks, self.config.grid)


class TimedSelector(EmptySelector):
    """Counts the seconds of a selector."""

    def __init__(self, selector: GazeSelector):
        super().__init__(selector)
        self.selector, self.seconds = selector, 0.0

    def generate(self, pixel_values_videos: torch.Tensor, **settings) -> GazeOutput:
        start = time.perf_counter()
        gaze = self.selector.generate(pixel_values_videos, **settings)
        gaze.num_real.tolist()  # Waits for a GPU.
        self.seconds += time.perf_counter() - start
        return gaze


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video (default: a rendered 1080p clip)")
    parser.add_argument(
        "--model",
        default=AUTOGAZE_SELECTOR,
        help="checkpoint of the selector (default: the published AutoGaze, from the Hub)",
    )
    parser.add_argument("--gazing-ratio", type=float, default=0.1)
    parser.add_argument("--frames", type=int, default=64, help="frames to decode, from the beginning")
    parser.add_argument("--max-tiles", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("video_throughput.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    selector = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval().to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        clip = options.video
        if clip is None:
            frames = islice(cycle(render_demo_clip(32, 1080, 1920)), options.frames)
            clip = write_video(Path(folder) / "clip.mp4", frames)
        rows = measure(selector, clip, options)
        bits = 8 * clip.stat().st_size

    metadata, _ = stream_video(clip) if options.video else (None, None)
    rate = bits / (metadata.duration if metadata else options.frames / 30) / 1e6
    print(
        f"{options.frames} frames, {rate:.1f} Mbit/s, {options.threads} threads, {options.device}, torch "
        f"{torch.__version__}, {Path(options.model).name}, ratio {options.gazing_ratio:g}, median of {options.runs} runs"
    )
    print("frames/s:")
    print(f"{'tiles':<10} {'decode':>8} {'preprocess':>11} {'both':>8} {'gaze':>8} {'all':>8}")
    for row in rows:
        print(
            f"{row['tiles']:<10} {row['decode']:>8.1f} {row['preprocess']:>11.1f} {row['both']:>8.1f} "
            f"{row['gaze']:>8.1f} {row['all']:>8.1f}"
        )
    options.output.write_text(
        json.dumps({"machine": machine(options.threads, options.device), "runs": options.runs, "rows": rows}, indent=1)
        + "\n"
    )


def measure(selector: GazeSelector, clip: Path, options: argparse.Namespace) -> list[dict]:
    settings = {"gazing_ratio": options.gazing_ratio, "max_tiles": options.max_tiles}
    decoded = np.stack(list(decode(clip, options.frames)))
    empty, rows = EmptySelector(selector), []
    for tiles in ("whole", "grid", "native"):
        timed = TimedSelector(selector)
        stages: dict[str, Callable[[], Iterable]] = {
            "decode": partial(decode, clip, options.frames),
            "preprocess": partial(gaze, empty, lambda: decoded, tiles=tiles, **settings),
            "both": partial(gaze, empty, partial(decode, clip, options.frames), tiles=tiles, **settings),
            "all": partial(gaze, timed, partial(decode, clip, options.frames), tiles=tiles, **settings),
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*stages, "gaze")}
        for run in range(options.runs + 1):
            timed.seconds = 0.0
            for name, stage in stages.items():
                start = time.perf_counter()
                for _ in stage():
                    pass
                if run:  # The first run is a warm-up.
                    seconds[name].append(time.perf_counter() - start)
            if run:
                seconds["gaze"].append(timed.seconds)
        rows.append(
            {"tiles": tiles, **{name: len(decoded) / statistics.median(values) for name, values in seconds.items()}}
        )
    return rows


def gaze(selector: EmptySelector, frames: Callable[[], Iterable], **settings) -> Iterable:
    return stream_gaze(selector, frames(), **settings)


def decode(clip: Path, count: int) -> Iterable[np.ndarray]:
    return islice(stream_video(clip)[1], count)


if __name__ == "__main__":
    main()
