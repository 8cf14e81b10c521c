"""
Measures the speed of a vision tower that encodes only gazed patches, with and without the time of the selector.

Runs a `SiglipVisionModel` of the base size (12 layers, 768 channels, patch 16) on 16 frames of 224x224, all cases alternately:
dense; on 213 patches (198 of the 265 patches of the first frame and one of each later frame) and on other shares of the patches;
the same together with a selector; and on a twelfth, an eighth and a quarter of the finest patches, chosen over time by the
selectors of one scale, with attention to the canvas. Weights and frames are random, which does not change the times for a given number of patches; patches are
chosen over time on the rendered demo clip. It then compares attention to the canvas with attention to all earlier frames on clips
of several lengths (`--lengths`), with a twelfth of the finest patches: those of the first frame, and random ones of the later
frames. Prints tables and writes JSON.

    python benchmarks/vision_tower.py --threads 2 --runs 5 -o vision_tower.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measurement import DTYPES, machine, run_in_turn
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from transformers_autogaze import (
    FEATURES_SELECTOR,
    FINEST_SELECTOR,
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeVideoProcessor,
    GazeGrid,
    GazeOutput,
    GreedyGazeSelector,
)
from transformers_autogaze.grid_autogaze import PUBLISHED_GRID
from transformers_autogaze.integrations import GazeVisionModel
from transformers_autogaze.video.demo import render_demo_clip


FRAMES = 16
SIZES = {
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
FEW = [198 / 265] + [1 / 265] * (FRAMES - 1)  # 213 patches
Case = tuple[Callable[[], object], int]  # a call and its number of patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", default="sdpa", help="the tower's attention implementation")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 64, 256], help="frames of the longer clips")
    parser.add_argument("-o", "--output", type=Path, default=Path("vision_tower.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    place = {"device": options.device, "dtype": DTYPES[options.dtype]}
    config = SiglipVisionConfig(**SIZES[options.size], image_size=224, patch_size=16)
    config._attn_implementation = options.attention
    tower = SiglipVisionModel(config).eval().to(**place)
    cases = four_scale_cases(tower, place) | over_time_cases(tower, place)
    seconds = run_in_turn({name: call for name, (call, _) in cases.items()}, options.runs, options.device)
    rows = report(seconds, {name: patches for name, (_, patches) in cases.items()}, options)
    lengths = compare_lengths(GazeVisionModel(tower), options.lengths, options.runs, place)
    options.output.write_text(
        json.dumps(
            {
                "machine": machine(options.threads, options.device, options.dtype) | {"attention": options.attention},
                "runs": options.runs,
                "rows": rows,
                "lengths": lengths,
            },
            indent=1,
        )
        + "\n"
    )


def four_scale_cases(tower: SiglipVisionModel, place: dict) -> dict[str, Case]:
    """Returns the cases on patches of four scales, on random frames."""
    gazed = GazeVisionModel(tower, scales=PUBLISHED_GRID.scales)
    model = AutoGazeModel(AutoGazeConfig(decoding_positions="frame_tail")).eval().to(**place)
    greedy = GreedyGazeSelector().to(place["device"])
    clip = torch.randn(1, FRAMES, 3, 224, 224, **place)
    cases: dict[str, Case] = {"dense": (lambda: tower(clip[0]), FRAMES * 196)}
    for name, ratio in {
        "213 patches": FEW,
        **{f"ratio {share:.2f}": share for share in (0.05, 0.1, 0.25, 0.5, 0.75)},
    }.items():
        gaze = random_gaze(gazed.grid, ratio).to(place["device"])
        cases[f"gazed, {name}"] = (lambda gaze=gaze: gazed(clip, gaze), int(gaze.num_real))
        for selector_name, selector in {"AutoGaze": model, "greedy": greedy}.items():
            cases[f"{selector_name} and gazed, {name}"] = (
                lambda ratio=ratio, selector=selector: gazed(clip, selector.generate(clip, gazing_ratio=ratio)),
                int(gaze.num_real),
            )
    return cases


def over_time_cases(tower: SiglipVisionModel, place: dict) -> dict[str, Case]:
    """Returns the cases on patches of one scale that are chosen over time, on the demo clip."""
    model = GazeVisionModel(tower)
    frames = list(render_demo_clip(FRAMES, 224, 224))
    clip = AutoGazeVideoProcessor()(frames, return_tensors="pt")["pixel_values_videos"].to(**place)
    cases: dict[str, Case] = {}
    for name, folder in {"features": FEATURES_SELECTOR, "pixels": FINEST_SELECTOR}.items():
        selector = AutoModel.from_pretrained(folder).eval().to(place["device"])
        for divisor in (12, 8, 4):
            count = FRAMES * 196 // divisor
            gaze = selector.generate(clip, tokens_per_clip=count)
            cases[f"canvas, 1/{divisor} over time by {name}"] = (lambda gaze=gaze: model(clip, gaze), count)
            cases[f"{name} over time and canvas, 1/{divisor}"] = (
                lambda selector=selector, count=count: model(clip, selector.generate(clip, tokens_per_clip=count)),
                count,
            )
    return cases


def report(seconds: dict[str, list[float]], patches: dict[str, int], options: argparse.Namespace) -> list[dict]:
    """Prints the medians and the speed-ups over the dense tower, and returns them as rows."""
    dense = statistics.median(seconds["dense"])
    rows = []
    print(
        f"{options.device}, {options.dtype}, {options.attention}, {options.threads} threads, torch {torch.__version__}, "
        f"median of {options.runs}"
    )
    print(f"{'':<36} {'patches':>8} {'ms':>9} {'times faster':>13}")
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {"case": name, "patches": patches[name], "seconds": median, "times_faster": dense / median}
        rows.append({**row, "all_seconds": values})
        print(f"{name:<36} {patches[name]:>8} {1000 * median:>9.1f} {dense / median:>13.2f}")
    return rows


def compare_lengths(model: GazeVisionModel, lengths: list[int], runs: int, place: dict) -> list[dict]:
    """Measures attention to the canvas and to all earlier frames on clips of several lengths."""
    rows = []
    print(f"\n{'frames':>6} {'patches':>8} {'canvas, s':>10} {'block_causal, s':>16} {'canvas, ms a frame':>19}")
    for length in lengths:
        gaze = changing_gaze(model.grid, length).to(place["device"])
        clip = torch.randn(1, length, 3, *model.grid.sizes[-1], **place)
        cases = {choice: partial(model, clip, gaze, choice) for choice in ("canvas", "block_causal")}
        seconds = run_in_turn(cases, runs, place["device"])
        canvas, block_causal = (statistics.median(values) for values in seconds.values())
        patches = int(gaze.num_real)
        rows.append({"frames": length, "patches": patches, "canvas": canvas, "block_causal": block_causal})
        rows[-1]["all_seconds"] = seconds
        print(f"{length:>6} {patches:>8} {canvas:>10.3f} {block_causal:>16.3f} {1000 * canvas / length:>19.2f}")
    return rows


def changing_gaze(grid: GazeGrid, num_frames: int) -> GazeOutput:
    """Keeps a twelfth of the patches of one scale: those of the first frame, and random ones spread over the later frames."""
    kept = torch.zeros(1, num_frames, grid.num_patches, dtype=torch.bool)
    kept[0, 0] = True
    rest = num_frames * grid.num_patches // 12 - grid.num_patches
    ends = torch.linspace(0, max(rest, 0), num_frames).long()
    for frame, count in enumerate(ends.diff().tolist(), 1):
        kept[0, frame, torch.randperm(grid.num_patches)[:count]] = True
    return GazeOutput.from_masks([kept], grid)


def random_gaze(grid: GazeGrid, ratio: float | list[float]) -> GazeOutput:
    """Keeps a share of the patches of every frame at random."""
    shares = [ratio] * FRAMES if isinstance(ratio, float) else ratio
    kept = torch.zeros(1, FRAMES, grid.num_patches, dtype=torch.bool)
    for frame, share in enumerate(shares):
        kept[0, frame, torch.randperm(grid.num_patches)[: int(share * grid.num_patches + 1e-6)]] = True
    return GazeOutput.from_masks(grid.split_by_scale(kept), grid)


if __name__ == "__main__":
    main()
