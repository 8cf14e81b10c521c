"""
Measures whether the cost of a frame stays constant in a very long stream.

The frames of a video are repeated as one stream, one at a time, for the default selector, the greedy one, or an `AutoGazeModel` of
the published size with random weights, whose cache is cropped to the last frames. Frames are decoded and preprocessed once, so
only the choice of patches is measured. Prints memory and milliseconds per frame, both wall time and CPU time (which depends less
on other processes), at intervals, and rewrites the JSON file each time.

    python benchmarks/soak.py clip.mp4 --selector autogaze --gazing-ratio 0.02 -o soak_autogaze.json
"""

import argparse
import json
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from measurement import machine, memory
from transformers import AutoModel

from transformers_autogaze import (
    DEFAULT_SELECTOR,
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    GazeCache,
    GreedyGazeSelector,
)


SELECTORS = {
    "default": lambda: AutoModel.from_pretrained(DEFAULT_SELECTOR),
    "greedy": GreedyGazeSelector,
    "autogaze": lambda: AutoGazeModel(AutoGazeConfig()).eval(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--selector", choices=SELECTORS, default="default")
    parser.add_argument("--frames", type=int, default=20000)
    parser.add_argument("--every", type=int, default=1000, help="frames of an interval")
    parser.add_argument("--gazing-ratio", type=float, default=0.1)
    parser.add_argument("--keep", type=int, default=16, help="frames in AutoGaze's cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    size = {"height": 224, "width": 224}
    video = AutoGazeProcessor()(videos=options.video, size=size, return_tensors="pt")["pixel_values_videos"]
    selector = SELECTORS[options.selector]()
    cache = GazeCache() if options.selector == "autogaze" else selector.cache_class()
    settings = {"gazing_ratio": options.gazing_ratio, "past_key_values": cache, "use_cache": True}
    stream, rows = cycle(video.split(1, dim=1)), []
    for first in range(0, options.frames, options.every):
        patches, start, cpu_start = 0, time.perf_counter(), time.process_time()
        for frame in islice(stream, min(options.every, options.frames - first)):
            patches += int(selector.generate(frame, **settings).num_real)
            if isinstance(cache, GazeCache):
                cache.crop(options.keep)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        last = min(first + options.every, options.frames)
        means = {"ms": 1000 * seconds, "processor_ms": 1000 * cpu_seconds, "patches": patches}
        rows.append({"frames": last, **{name: total / (last - first) for name, total in means.items()}})
        rows[-1]["mib"] = memory("VmRSS")
        print(
            "{frames:>8} frames {ms:>7.2f} ms {processor_ms:>7.2f} ms of CPU {mib:>7.0f} MiB".format(**rows[-1]),
            flush=True,
        )
        arguments = {name: str(value) for name, value in vars(options).items() if name != "output"}
        result = {"machine": machine(options.threads), "options": arguments, "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
