"""
Measures the speed of the greedy selector, and the PSNR of its reconstructions.

Prints frames per second of `GreedyGazeSelector.generate` on 16-frame clips of 224x224, in batches of one and of four, and the PSNR
of the four closed-form reconstructions. Writes JSON. With `--video`, the clips are cut from a real video.

    python benchmarks/greedy_selector.py --video clip.mp4 -o greedy_selector.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from measurement import machine

from transformers_autogaze import AutoGazeProcessor, GreedyGazeSelector
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video of at least 64 frames (default: a rendered clip)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("greedy_selector.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    video = options.video or render_demo_clip(64)
    size = {"height": 224, "width": 224}
    inputs = AutoGazeProcessor()(videos=video, size=size, return_tensors="pt")["pixel_values_videos"]
    clips = inputs[0, :64].view(4, 16, 3, 224, 224)
    selector = GreedyGazeSelector()

    settings = [(batch, patches) for batch in (1, 4) for patches in (26, 66)]
    seconds: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    psnr: dict[int, list[float]] = {}
    for run in range(options.runs + 1):
        for batch, patches in settings:
            start = time.perf_counter()
            gaze = selector.generate(clips[:batch], gazing_ratio=patches / 265)
            if run:  # The first run is a warm-up.
                seconds[batch, patches].append(time.perf_counter() - start)
            if batch == 4:
                pixels = selector.to_pixels(clips)
                error = (selector.composite.reconstruct(pixels, gaze) - pixels).square().mean((1, 2, 3, 4))
                psnr[patches] = (-10 * error.log10()).tolist()

    rows = []
    print(f"{options.threads} threads, torch {torch.__version__}, median of {options.runs} runs, float32")
    print(f"{'batch':>5} {'patches':>8} {'ms':>8} {'frames/s':>9}  PSNR of the four clips, dB")
    for batch, patches in settings:
        median = statistics.median(seconds[batch, patches])
        rows.append(
            {"batch": batch, "patches": patches, "seconds": median, "frames_per_second": batch * 16 / median}
            | {"psnr": psnr[patches] if batch == 4 else None}
        )
        quality = "  ".join(f"{value:.1f}" for value in psnr[patches]) if batch == 4 else ""
        print(f"{batch:>5} {patches:>8} {1000 * median:>8.1f} {batch * 16 / median:>9.0f}  {quality}")
    options.output.write_text(
        json.dumps({"machine": machine(options.threads), "runs": options.runs, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
