"""
Measures the time of choosing patches, compared with a dense encoder.

Runs `generate` on 16-frame clips of 224x224 and a dense encoder on the same frames alternately, and prints the ratio of the median
times. The encoder is a `SiglipVisionModel` of the base size (12 layers, 768 channels, patch 16). Weights are random, which does
not change the times for a given number of patches. With `--large`, frames have 1072x1920 pixels, and only the selectors of one
scale are measured. Prints a table and writes JSON.

    python benchmarks/gaze_latency.py --threads 2 --runs 5 -o gaze_latency.json
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measurement import DTYPES, machine, run_in_turn
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from transformers_autogaze import (
    FEATURES_SELECTOR,
    FINEST_SELECTOR,
    AutoGazeConfig,
    AutoGazeModel,
    GazeSelector,
    GreedyGazeSelector,
)


_WARM_UPS = 2  # On CUDA, the second captures the graphs that the others replay.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also 64 frames as one sequence, and 256 as 16 clips")
    parser.add_argument("--large", action="store_true", help="large frames in native patches instead")
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
    if options.large:
        cases = large_cases(encoder, options.device, dtype)
    else:
        cases = small_cases(encoder, options.device, dtype, options.long)
    calls = {name: call for name, (call, _) in cases.items()}
    seconds = run_in_turn(calls, options.runs, options.device, _WARM_UPS)
    report({name: [value / cases[name][1] for value in values] for name, values in seconds.items()}, options)


def one_scale_selectors(device: str) -> dict[str, GazeSelector]:
    """Loads the package's selectors of one scale."""
    folders = {"features": FEATURES_SELECTOR, "pixels, finest scale": FINEST_SELECTOR}
    return {name: AutoModel.from_pretrained(folder).eval().to(device) for name, folder in folders.items()}


def small_cases(
    encoder: SiglipVisionModel, device: str, dtype: torch.dtype, is_long: bool
) -> dict[str, tuple[Callable[[], object], int]]:
    """Returns the cases on clips of 224x224: a call and its number of clips."""
    model = AutoGazeModel(AutoGazeConfig(decoding_positions="frame_tail")).eval().to(device, dtype)
    greedy = GreedyGazeSelector().to(device)
    clips = torch.randn(4, 16, 3, 224, 224, device=device, dtype=dtype)
    one = clips[:1]
    schedule = [0.75] + [10 / 265] * 15

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "dense encoder": (lambda: encoder(one[0]), 1),
        "schedule 0.75, then 10 patches": (lambda: model.generate(one, gazing_ratio=schedule), 1),
        "ratio 0.10": (lambda: model.generate(one, gazing_ratio=0.1), 1),
        "ratio 0.75": (lambda: model.generate(one, gazing_ratio=0.75), 1),
        "ratio 0.75, four clips, per clip": (lambda: model.generate(clips, gazing_ratio=0.75), 4),
        "greedy, 26 patches": (lambda: greedy.generate(one, gazing_ratio=26 / 265), 1),
    }
    for name, selector in one_scale_selectors(device).items():
        cases[f"{name}, 1/12 over time"] = (
            lambda selector=selector: selector.generate(one.float(), clip_ratio=1 / 12),
            1,
        )
    if is_long:
        frames = torch.randn(1, 256, 3, 224, 224, device=device, dtype=dtype)
        cases["schedule, 256 frames as 16 clips, per clip"] = (
            lambda: [model.generate(clip, gazing_ratio=schedule) for clip in frames.split(16, dim=1)],
            16,
        )
        cases["ratio 0.10, 64 frames as one sequence"] = (lambda: model.generate(frames[:, :64], gazing_ratio=0.1), 1)

    if device.startswith("cuda"):
        tiles = torch.randn(45, 16, 3, 224, 224, device=device, dtype=dtype)
        cases["schedule, 45 tiles of 16 frames"] = (lambda: model.generate(tiles, gazing_ratio=schedule), 1)
    return cases


def large_cases(
    encoder: SiglipVisionModel, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """Returns the cases on two frames of 1072x1920, with 67x120 patches each: a call and its number of clips."""
    size = 1072, 1920
    frames = torch.randn(1, 2, 3, *size, device=device, dtype=dtype)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "dense encoder": (lambda: encoder(frames[0], interpolate_pos_encoding=True), 1)
    }
    num_tokens = 2 * math.prod(side // 16 for side in size) // 12
    for name, selector in one_scale_selectors(device).items():
        cases[f"{name}, 1/12 over time"] = (
            lambda selector=selector: selector.generate(
                frames.float(), tokens_per_clip=num_tokens, target_scales=[size], target_patch_size=16
            ),
            1,
        )
    return cases


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Prints the medians and their ratios to the dense encoder's, and writes JSON."""
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
