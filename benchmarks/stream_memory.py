"""
Measures the growth of memory with the length of a stream that is gazed at and encoded.

The repeated frames of the demo clip go through `stream_gaze` with the default selector and, chunk by chunk, through a
`SiglipVisionModel` of the base width with attention to the canvas and a `GazeVisionCache`. Each length runs in its own process.
Prints the peak memory of each process and writes JSON.

    python benchmarks/stream_memory.py --lengths 300 1200 --threads 2 -o stream_memory.json
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from measurement import machine
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeVideoProcessor, GazeVisionModel, stream_gaze
from transformers_autogaze.integrations import GazeVisionCache
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1200], help="frames of the streams")
    parser.add_argument("--layers", type=int, default=4, help="layers of the tower; 12 in a real one")
    parser.add_argument("--clip-ratio", type=float, default=1 / 12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("stream_memory.json"))
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(options)))
    rows = []
    for length in options.lengths:
        command = [sys.executable, __file__, "--measure", str(length), "--layers", str(options.layers)]
        command += ["--threads", str(options.threads), "--clip-ratio", str(options.clip_ratio)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print("{frames:>6} frames {tokens:>7} tokens {peak_mib:>8.0f} MiB {seconds:>7.1f} s".format(**rows[-1]))
    options.output.write_text(json.dumps({"machine": machine(options.threads), "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """Streams `options.measure` frames and returns the peak memory of the process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    selector, processor = AutoModel.from_pretrained(DEFAULT_SELECTOR), AutoGazeVideoProcessor()
    tower = GazeVisionModel(SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=options.layers)).eval())
    frames = islice(cycle(render_demo_clip(64, 224, 224)), options.measure)
    cache, tokens, start = GazeVisionCache(), 0, time.perf_counter()
    for chunk in stream_gaze(selector, frames, processor, clip_ratio=options.clip_ratio):
        values = processor.to_pixel_values(chunk.levels)[None]
        tokens += len(tower(values, chunk.gaze, cache=cache).last_hidden_state)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"frames": options.measure, "tokens": tokens, "peak_mib": peak, "seconds": seconds}


if __name__ == "__main__":
    main()
