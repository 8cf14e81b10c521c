"""
Measures the time of vLLM's vision towers of Qwen2.5-VL and Qwen3-VL for different shares of kept merge units.

It compares vLLM's tower on all merge units, the plug-in's tower on the units that a selector keeps, and vLLM's pruning (EVS), which
drops tokens after the tower has encoded all units, so that as many are left. Towers have the sizes of Qwen2.5-VL-7B and Qwen3-VL-8B,
with random weights. The time of the selector, which runs on the CPU of the API server, is measured as well. All cases run
alternately, after a warm-up with eight frames. EVS uses the preceding run of vLLM's tower, whose time is included. The script prints a table, and
writes JSON after every measurement, so that a run can be interrupted. It needs vLLM.

    python benchmarks/vllm_tower.py video.mp4 --towers qwen2_5_vl --dtype bfloat16 --runs 5 -o vllm_tower.json
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measurement import DTYPES, machine, now
from transformers import AutoModel, Qwen2_5_VLConfig, Qwen3VLConfig
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer
from vllm.multimodal.video_prune.evs import compute_retention_mask

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeVideoProcessor, read_video
from transformers_autogaze.integrations.qwen_vl_gazing import UnitGazer, UnitSizes
from transformers_autogaze.integrations.qwen_vl_units import fold_units, kept_units
from transformers_autogaze.serving.vllm_tower import encode_kept_units
from transformers_autogaze.utils.output_files import replacing
from transformers_autogaze.video.demo import render_demo_clip


WHOLE = "vLLM's own"
TOWERS = {
    "qwen2_5_vl": (Qwen2_5_VisionTransformer, Qwen2_5_VLConfig, {"hidden_size": 1280, "intermediate_size": 3420}),
    "qwen3_vl": (
        Qwen3_VisionTransformer,
        Qwen3VLConfig,
        {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}
DEPTHS = {"qwen2_5_vl": 32, "qwen3_vl": 27}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="path of a video; a rendered clip by default")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--num-frames", type=int, default=64)
    parser.add_argument("--side", type=int, default=448, help="height and width of frames in pixels")
    parser.add_argument("--layers", type=int, help="layers of the towers; all by default")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("vllm_tower.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frames = render_demo_clip(options.num_frames) if options.video is None else None
    frames = read_video(options.video, options.num_frames)[0] if frames is None else frames
    result = {
        "machine": machine(options.threads, device, options.dtype),
        "num_frames": len(frames),
        "side": options.side,
        "layers": options.layers,
        "runs": options.runs,
        "rows": [],
    }
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "nccl" if device == "cuda" else "gloo")
        initialize_model_parallel()
        for name in options.towers:
            done, cells = result["rows"], []
            tower = make_tower(name, options.layers, device, DTYPES[options.dtype])
            for _ in measure(tower, frames[:8], options.side, options.ratios, 1, device):
                pass
            for cell in measure(tower, frames, options.side, options.ratios, options.runs, device):
                print(f"{name}, {cell['case']}, run {cell['run']}: {cell['seconds']:.2f} s", flush=True)
                cells.append(cell)
                result["rows"] = [*done, *({"tower": name, **row} for row in summarize(cells))]
                with replacing(options.output) as unfinished:
                    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    sys.stdout.flush()
    os._exit(0)  # The exit of vLLM's process groups would block.


def make_tower(name: str, layers: int | None, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Makes a tower of vLLM with random weights."""
    build, config, sizes = TOWERS[name]
    depth = layers or DEPTHS[name]
    sizes = {**sizes, "depth": depth, "out_hidden_size": 3584 if name == "qwen2_5_vl" else 4096}
    if "deepstack_visual_indexes" in sizes:
        sizes["deepstack_visual_indexes"] = [layer for layer in sizes["deepstack_visual_indexes"] if layer < depth]
    torch.manual_seed(0)
    tower = build(config(vision_config=sizes).vision_config).to(device, dtype).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for module in tower.modules():
        # On a CPU, layers of vLLM convert their weights after loading, depending on their dtype.
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return tower


@torch.no_grad()
def measure(tower: torch.nn.Module, frames, side: int, ratios: list[float], runs: int, device: str) -> Iterator[dict]:
    """Runs all cases alternately, and yields the measurements of one run of one case at a time."""
    merge, patch = tower.spatial_merge_size, tower.patch_size
    processor = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False)
    size = (side // (merge * patch) * merge * patch,) * 2
    levels = processor.resize_levels(torch.from_numpy(frames[: len(frames) // 2 * 2]).permute(0, 3, 1, 2), size)
    pixels = fold_units(processor.to_pixel_values(levels), merge, patch)
    grid = torch.tensor([[len(levels) // 2, size[0] // patch, size[1] // patch]])
    units = (int(grid[0, 0]), size[0] // patch // merge, size[1] // patch // merge)
    gazer = UnitGazer(AutoModel.from_pretrained(DEFAULT_SELECTOR).eval(), processor, None, UnitSizes(merge, patch, 2))
    on_device = pixels.to(device, tower.dtype)

    for run in range(1, runs + 1):

        def cell(case: str, features: torch.Tensor, seconds: float, gazing_seconds: float = 0.0, run=run) -> dict:
            counts = {"units": len(features), "all_units": math.prod(units)}
            return {"case": case, "run": run, **counts, "seconds": seconds, "gazing_seconds": gazing_seconds}

        start = now(device)
        features = tower(on_device, grid.tolist())
        whole_seconds = now(device) - start
        yield cell(WHOLE, features, whole_seconds)
        for ratio in ratios:
            start = now()
            gaze = gazer.gaze(pixels, grid, gazing_ratio=ratio)[0]
            gazing_seconds = now() - start
            is_kept = kept_units(gaze, units)[0].flatten()
            patches = pixels.unflatten(0, (-1, merge**2))[is_kept].flatten(0, 1).to(device, tower.dtype)
            start = now(device)
            encoded = encode_kept_units(tower, patches, grid, is_kept)
            yield cell(f"gazing_ratio {ratio:g}", encoded, now(device) - start, gazing_seconds)
            if ratio < 1:
                start = now(device)
                pruned = prune(features, grid, merge, len(encoded))
                yield cell(f"EVS, tokens of {ratio:g}", pruned, whole_seconds + now(device) - start)


def prune(features: torch.Tensor, grid: torch.Tensor, merge: int, count: int) -> torch.Tensor:
    """Keeps `count` tokens like EVS, but at least those of the first pair of frames."""
    rate = 1 - (count + 0.5) / len(features)  # EVS rounds the number of tokens down
    is_kept = compute_retention_mask(features, grid[0].tolist(), spatial_merge_size=merge, q=rate)
    return features[is_kept]


def summarize(cells: list[dict]) -> list[dict]:
    """Returns one row per case, with medians over the runs."""
    by_case: dict[str, list[dict]] = {}
    for cell in cells:
        by_case.setdefault(cell["case"], []).append(cell)

    def median(case: str, name: str = "seconds") -> float:
        return statistics.median(cell[name] for cell in by_case[case])

    return [
        {
            "case": case,
            "units": runs[0]["units"],
            "all_units": runs[0]["all_units"],
            "seconds": median(case),
            "of_whole": median(case) / median(WHOLE),
            "gazing_seconds": median(case, "gazing_seconds"),
            "all_seconds": [cell["seconds"] for cell in runs],
        }
        for case, runs in by_case.items()
    ]


def print_table(result: dict) -> None:
    """Prints the rows of a result."""
    print("{device}, {dtype}, {threads} threads, torch {torch}".format(**result["machine"]), end="")
    print(f", median of {result['runs']}")
    print(f"{'':<34} {'units':>15} {'tower s':>9} {'of whole':>9} {'gazing s':>9}")
    for row in result["rows"]:
        print(
            f"{row['tower'] + ', ' + row['case']:<34} {row['units']:>6} of {row['all_units']:<5} {row['seconds']:>9.2f} "
            f"{row['of_whole']:>9.2f} {row['gazing_seconds']:>9.2f}"
        )


if __name__ == "__main__":
    main()
