"""
Measures the memory of `autogaze prune`, and its growth with the length of a video.

Prunes a 1080p clip of 300 and of 1200 frames and a 3840x2160 clip of 64 frames in 45 tiles, each in its own process. Prints the
peak of the resident memory and that of the idle process with the selector loaded, and writes JSON. Rendering the clips takes some
minutes. Needs Linux, whose kernel records the peak.

    python benchmarks/gaze_memory.py -o gaze_memory.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from measurement import machine, memory
from transformers import AutoModel

from transformers_autogaze import AUTOGAZE_SELECTOR, write_video
from transformers_autogaze.cli import main as autogaze
from transformers_autogaze.video.demo import render_demo_clip


CASES = (
    {"name": "1080p, 300 frames", "frames": 300, "size": (1080, 1920), "arguments": []},
    {"name": "1080p, 1200 frames", "frames": 1200, "size": (1080, 1920), "arguments": []},
    {
        "name": "2160p, 64 frames, 45 tiles",
        "frames": 64,
        "size": (2160, 3840),
        "arguments": ["--tiles", "grid", "--max-tiles", "45"],
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=AUTOGAZE_SELECTOR,
        help="checkpoint of the selector (default: the published AutoGaze, from the Hub)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("gaze_memory.json"))
    parser.add_argument("--prune", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        return measure(options.model, options.threads, options.prune)

    rows = []
    print(f"{options.threads} threads, torch {torch.__version__}, {Path(options.model).name}")
    print(f"{'case':<28} {'idle MiB':>9} {'peak MiB':>9} {'above MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            clip = write_video(Path(folder) / "clip.mp4", frames_of(case["frames"], *case["size"]))
            command = [
                sys.executable,
                __file__,
                "--model",
                options.model,
                "--threads",
                str(options.threads),
                "--prune",
            ]
            command += ["prune", str(clip), "--model", options.model, "-o", folder, *case["arguments"]]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            )
            if done.returncode:
                raise SystemExit(f"{case['name']} failed:\n{done.stderr}")
            row = {"case": case["name"], **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            print(
                f"{row['case']:<28} {row['idle']:>9.0f} {row['peak']:>9.0f} {row['peak'] - row['idle']:>10.0f}",
                flush=True,
            )
    growth = rows[1]["peak"] / rows[0]["peak"] - 1
    print(f"four times the frames: {100 * growth:+.1f} % of the peak")
    options.output.write_text(
        json.dumps({"machine": machine(options.threads), "unit": "MiB", "growth": growth, "rows": rows}, indent=1)
        + "\n"
    )


def frames_of(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Repeats a clip with motion and a cut."""
    return islice(cycle(render_demo_clip(32, height, width)), count)


def measure(model: str, threads: int, command: list[str]) -> None:
    """Runs the command line in this process and prints the initial and peak memory as JSON."""
    torch.set_num_threads(threads)
    selector = AutoModel.from_pretrained(model)
    idle = memory("VmRSS")
    del selector
    if status := autogaze(command):
        raise SystemExit(status)
    print(json.dumps({"idle": idle, "peak": memory("VmHWM")}))


if __name__ == "__main__":
    main()
