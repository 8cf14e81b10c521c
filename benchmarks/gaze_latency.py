"""
What does choosing patches cost, next to the encoder that it saves work for?

Times `generate` on 16-frame clips of 224x224 in turn with a dense encoder on the same frames, a `SiglipVisionModel` of the
base size (12 layers, 768 channels, patch 16), and prints the ratio of the medians. Random weights cost what trained ones
do where the number of patches is given. Prints a table and writes JSON.

    python benchmarks/gaze_latency.py --threads 2 --runs 5 -o gaze_latency.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measurement import DTYPES, machine, now
from transformers import SiglipVisionConfig, SiglipVisionModel

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GreedyGazeSelector


_WARM_UPS = 2  # of each case: on CUDA the second captures the graphs that all others replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also 64 frames as one sequence, and 256 as 16 clips")
    parser.add_argument("-o", "--output", type=Path, default=Path("gaze_latency.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
        )
    )
    encoder = encoder.eval().to(options.device, dtype)
    model = AutoGazeModel(AutoGazeConfig(decoding_positions="frame_tail")).eval().to(options.device, dtype)
    greedy = GreedyGazeSelector().to(options.device)
    clips = torch.randn(4, 16, 3, 224, 224, device=options.device, dtype=dtype)
    one = clips[:1]
    schedule = [0.75] + [10 / 265] * 15

    # name -> (what to run, how many clips it gazes at)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "dense encoder": (lambda: encoder(one[0]), 1),
        "schedule 0.75, then 10 patches": (lambda: model.generate(one, gazing_ratio=schedule), 1),
        "ratio 0.10": (lambda: model.generate(one, gazing_ratio=0.1), 1),
        "ratio 0.75": (lambda: model.generate(one, gazing_ratio=0.75), 1),
        "ratio 0.75, four clips, per clip": (lambda: model.generate(clips, gazing_ratio=0.75), 4),
        "greedy, 26 patches": (lambda: greedy.generate(one, gazing_ratio=26 / 265), 1),
    }
    if options.long:
        frames = torch.randn(1, 256, 3, 224, 224, device=options.device, dtype=dtype)
        cases["schedule, 256 frames as 16 clips, per clip"] = (
            lambda: [model.generate(clip, gazing_ratio=schedule) for clip in frames.split(16, dim=1)],
            16,
        )
        cases["ratio 0.10, 64 frames as one sequence"] = (lambda: model.generate(frames[:, :64], gazing_ratio=0.1), 1)

    if options.device.startswith("cuda"):
        tiles = torch.randn(45, 16, 3, 224, 224, device=options.device, dtype=dtype)
        cases["schedule, 45 tiles of 16 frames"] = (lambda: model.generate(tiles, gazing_ratio=schedule), 1)

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for run in range(_WARM_UPS + options.runs):
            for name, (case, num_clips) in cases.items():
                start = now(options.device)
                case()
                taken = now(options.device) - start
                if run >= _WARM_UPS:
                    seconds[name].append(taken / num_clips)

    dense = statistics.median(seconds["dense encoder"])
    rows = []
    print(
        f"{options.device}, {options.dtype}, {options.threads} threads, torch {torch.__version__}, median of {options.runs}"
    )
    print(f"{'':<44} {'ms':>9} {'of dense':>9}")
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append({"case": name, "seconds": median, "of_dense": median / dense, "all_seconds": values})
        print(f"{name:<44} {1000 * median:>9.1f} {median / dense:>9.3f}")
    options.output.write_text(
        json.dumps(
            {"machine": machine(options.threads, options.device, options.dtype), "runs": options.runs, "rows": rows},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
