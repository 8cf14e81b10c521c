"""
Measures the merge units that Qwen2.5-VL and Qwen3-VL read of real clips with a selector, and the time to the first token.

For 16 frames of each clip at their native size, it measures the kept merge units, the tokens of the prompt, and the time from the
processor's patches to the first token, with the time of the selector apart and included. Towers have the sizes of Qwen2.5-VL-3B and
Qwen3-VL-2B; the language models have their widths with fewer layers and a smaller vocabulary. Weights are random, which does not
change the times. The cases are the MLLM without a selector, the default selector on merge units, and patches of four scales at a
ratio of 0.10, where every unit that overlaps a kept patch is kept, with attention to the unit's own pair of frames. All cases run
alternately. Prints a table and writes JSON.

    python benchmarks/qwen_vl.py clip1.mp4 clip2.mp4 clip3.mp4 --threads 2 --runs 5 -o qwen_vl.json
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measurement import DTYPES, machine, now
from transformers import (
    AutoModel,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from transformers_autogaze import (
    DEFAULT_SELECTOR,
    AutoGazeVideoProcessor,
    GreedyGazeConfig,
    GreedyGazeSelector,
    gaze_video,
    read_video,
)
from transformers_autogaze.grid_autogaze import PUBLISHED_GRID
from transformers_autogaze.integrations.qwen_vl import GazeQwenVL
from transformers_autogaze.integrations.qwen_vl_gazing import UnitGazer, UnitSizes
from transformers_autogaze.integrations.qwen_vl_units import fold_units


IMAGE, VIDEO, START, END, WORDS = 31996, 31997, 31998, 31999, 30
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "bos_token_id": None,
    "eos_token_id": None,
}
FOUR_SCALES = "four scales, gazing_ratio 0.1"
CASES = {
    "without selector": None,
    FOUR_SCALES: {"gazing_ratio": 0.1},
    "gazing_ratio 0.1": {"gazing_ratio": 0.1},
    "clip_ratio 0.1": {"clip_ratio": 0.1},
    "clip_ratio 0.25": {"clip_ratio": 0.25},
    "tokens_per_clip 100": {"tokens_per_clip": 100},
    "task_loss_requirement 0.2": {"task_loss_requirement": 0.2},
    "gazing_ratio 1": {"gazing_ratio": 1.0},
}
FIRST_TOKEN = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", help="paths of videos")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--max-pixels", type=int, help="of a frame; larger frames are resized like by the processor")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model; 36 and 28 in real ones")
    parser.add_argument("--tower-layers", type=int, help="layers of the tower; 32 and 24 as in real ones by default")
    parser.add_argument("-o", "--output", type=Path, default=Path("qwen_vl.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    rows = []
    print(
        f"{options.device}, {options.dtype}, {options.threads} threads, torch {torch.__version__}, median of {options.runs}"
    )
    print(f"{'':<44} {'units':>13} {'prompt':>7} {'gazing s':>9} {'first token s':>14}")
    for build in (qwen2_5_vl, qwen3_vl):
        torch.manual_seed(0)
        mllm = build(options.layers, options.tower_layers).eval().to(options.device, DTYPES[options.dtype])
        print(mllm.config.model_type)
        for clip in options.clips:
            frames, _ = read_video(clip, options.num_frames)
            inputs, processor = process(mllm, frames, options.max_pixels)
            for row in measure(mllm, inputs, processor, options.runs):
                row = {"mllm": mllm.config.model_type, "clip": Path(clip).name, **row}
                rows.append(row)
                name, units = f"{row['clip'][:16]}, {row['case']}", f"{row['units']} of {row['all_units']}"
                print(
                    f"{name:<44} {units:>13} {row['prompt_length']:>7} {row['gazing_seconds']:>9.2f} "
                    f"{row['seconds']:>14.2f}"
                )
        del mllm
    result = {
        "machine": machine(options.threads, options.device, options.dtype),
        "runs": options.runs,
        "num_frames": options.num_frames,
        "layers": options.layers,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(mllm: PreTrainedModel, inputs: dict, processor: AutoGazeVideoProcessor, runs: int) -> list[dict]:
    """Runs all cases alternately on one clip; returns a row for each."""
    device = str(mllm.device)
    selector = AutoModel.from_pretrained(DEFAULT_SELECTOR).eval().to(device)
    four_scale_selector = GreedyGazeSelector(GreedyGazeConfig(PUBLISHED_GRID.scales)).to(device)
    model = GazeQwenVL(mllm, selector, processor)
    four_scale_model = GazeQwenVL(mllm, attention="frame")
    vision = mllm.config.vision_config
    sizes = UnitSizes(vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size)
    gazer = UnitGazer(four_scale_selector, processor, None, sizes)
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    units = int(grid.prod(1).sum()) // sizes.merge_size**2
    length = inputs["input_ids"].shape[1]
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    kept = dict.fromkeys(CASES, units)
    for run in range(runs + 1):
        for case, settings in CASES.items():
            start = now(device)
            if settings is None:
                gazed = start
                mllm.generate(**inputs, **FIRST_TOKEN)
            else:
                if case == FOUR_SCALES:
                    clips = gazer.frames(pixels, grid)
                    gaze = [gaze_video(four_scale_selector, frames, **settings) for frames in clips]
                else:
                    gaze = model.gaze(pixels, grid, **settings)
                gazed = now(device)
                (four_scale_model if case == FOUR_SCALES else model).generate(**inputs, gaze=gaze, **FIRST_TOKEN)
                kept[case] = model.count_units(gaze, grid)[0][0]
            if run:  # The first run is a warm-up.
                end = now(device)
                seconds[case].append((gazed - start, end - start))
    return [
        {
            "case": case,
            "units": kept[case],
            "all_units": units,
            "prompt_length": length - units + kept[case],
            "gazing_seconds": statistics.median(gazing for gazing, _ in seconds[case]),
            "seconds": statistics.median(whole for _, whole in seconds[case]),
            "all_seconds": [whole for _, whole in seconds[case]],
        }
        for case in CASES
    ]


def process(mllm: PreTrainedModel, frames, max_pixels: int | None) -> tuple[dict, AutoGazeVideoProcessor]:
    """Makes the inputs of the MLLM's own processor, which needs torchvision: patches, and a prompt of some words."""
    vision = mllm.config.vision_config
    merge, patch, pair = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    side = merge * patch
    processor = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False)
    levels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    shrink = min(1.0, (max_pixels / (levels.shape[2] * levels.shape[3])) ** 0.5) if max_pixels else 1.0
    size = tuple(max(side, round(length * shrink / side) * side) for length in levels.shape[2:])
    levels = processor.resize_levels(levels, size)
    levels = torch.cat([levels, levels[-1:].expand(-len(levels) % pair, -1, -1, -1)])
    times, rows, cols = len(levels) // pair, size[0] // patch, size[1] // patch
    pixels = fold_units(processor.to_pixel_values(levels), merge, patch, pair)
    frame_tokens = [VIDEO] * (rows * cols // merge**2)
    if mllm.config.model_type == "qwen2_5_vl":
        prompt = [START, *frame_tokens * times, END]
    else:
        prompt = [token for time in range(times) for token in (3 + time, START, *frame_tokens, END)]
    input_ids = torch.tensor([[*prompt, *range(3, 3 + WORDS)]], device=mllm.device)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": pixels.to(mllm.device, mllm.dtype),
        "video_grid_thw": torch.tensor([[times, rows, cols]], device=mllm.device),
        "mm_token_type_ids": 2 * (input_ids == VIDEO),
    }
    return inputs, processor


def qwen2_5_vl(layers: int, tower_layers: int | None) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**TEXT, "num_hidden_layers": layers, "intermediate_size": 11008, "num_key_value_heads": 2}
    vision = {"depth": tower_layers or 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048}
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(layers: int, tower_layers: int | None) -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text = {**TEXT, "num_hidden_layers": layers, "intermediate_size": 6144, "num_key_value_heads": 8, "head_dim": 128}
    vision = {"depth": tower_layers or 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048}
    vision["deepstack_visual_indexes"] = [index for index in (5, 11, 17) if index < vision["depth"]]
    config = Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


if __name__ == "__main__":
    main()
