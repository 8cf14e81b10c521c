"""
Measures the time to the first token of a video MLLM that sees only gazed patches.

The time from normalised frames to the first token is measured for a LLaVA-OneVision with a `SiglipVisionModel` of the base size (12
layers, 768 channels, patch 16, 224x224) and a Qwen2 of the width of the 0.5B model, with fewer layers and a smaller vocabulary,
on 16 frames of the demo clip. The dense model runs as in transformers, with pooling to a quarter of the patches, and without
pooling. `GazeVideoLM` is measured with and without the time of the selector: the default selector and the greedy one keep pooled
places of the whole clip, and the model of the published size keeps patches of four scales in every frame, each of which is a
token. All cases run alternately. Weights of the MLLM are random, which does not change the times for a given number of patches.
Prints a table and writes JSON.

    python benchmarks/mllm.py --threads 2 --runs 5 -o mllm.json
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measurement import DTYPES, machine, now
from transformers import AutoModel, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipImageProcessor

from transformers_autogaze import DEFAULT_SELECTOR, AutoGazeConfig, AutoGazeModel, GreedyGazeSelector
from transformers_autogaze.integrations.mllm import GazeVideoLM
from transformers_autogaze.video.demo import render_demo_clip


VIDEO, IMAGE, WORDS = 31998, 31999, 30
BUDGETS = {"default": "clip_ratio", "greedy": "clip_ratio", "model": "gazing_ratio"}
OTHER_BUDGETS = [{"tokens_per_clip": 100}, {"task_loss_requirement": 0.2}]  # of the default selector
FIRST_TOKEN = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model; 24 in the model of 0.5B")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 0.75])
    parser.add_argument("-o", "--output", type=Path, default=Path("mllm.json"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    mllm = small_mllm(options.tower_layers, options.layers).to(options.device, DTYPES[options.dtype])
    selectors = {
        "default": AutoModel.from_pretrained(DEFAULT_SELECTOR).eval().to(options.device),
        "greedy": GreedyGazeSelector().to(options.device),
        "model": AutoGazeModel(AutoGazeConfig(decoding_positions="frame_tail")).eval().to(options.device, mllm.dtype),
    }
    budgets = [(name, {BUDGETS[name]: ratio}) for ratio in options.ratios for name in selectors]
    budgets += [("default", budget) for budget in OTHER_BUDGETS]
    image_processor = SiglipImageProcessor(size={"height": 224, "width": 224})
    gazed = {name: GazeVideoLM(mllm, selector, image_processor) for name, selector in selectors.items()}
    frames = list(render_demo_clip(options.num_frames))
    video = image_processor(frames, return_tensors="pt")["pixel_values"][None].to(options.device, mllm.dtype)
    # OneVision pools the 14x14 patches of a frame to 7x7.
    dense = {"dense": (mllm.model.apply_pooling, 49), "dense, pooling off": (lambda features: features, 196)}
    seconds: dict[str, list[float]] = {}
    for run in range(options.runs + 1):
        measured: dict[str, tuple[float, int]] = {}
        for case, (pooling, tokens_per_frame) in dense.items():
            mllm.model.apply_pooling = pooling
            measured |= time_dense(mllm, video, tokens_per_frame, case)
        for name, budget in budgets:
            [(argument, value)] = budget.items()
            measured |= time_gazed(gazed[name], video, budget, f"{name}, {argument} {value:g}")
        if run:  # The first run is a warm-up.
            for case, (value, _) in measured.items():
                seconds.setdefault(case, []).append(value)
    result = {
        "machine": machine(options.threads, options.device, options.dtype),
        "runs": options.runs,
        "num_frames": options.num_frames,
        "tower_layers": options.tower_layers,
        "layers": options.layers,
        "rows": report(seconds, {case: length for case, (_, length) in measured.items()}, options),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def time_dense(
    mllm: LlavaOnevisionForConditionalGeneration, video: torch.Tensor, tokens_per_frame: int, case: str
) -> dict[str, tuple[float, int]]:
    """Returns the seconds to the first token and the length of the prompt, without gazing."""
    prompt = make_prompt(video.shape[1] * tokens_per_frame + 1, video.device)
    start = now(video.device.type)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values_videos": video}
    mllm.generate(**inputs, **FIRST_TOKEN)
    return {case: (now(video.device.type) - start, prompt.shape[1])}


def time_gazed(
    model: GazeVideoLM, video: torch.Tensor, budget: dict[str, float], case: str
) -> dict[str, tuple[float, int]]:
    """Returns the seconds to the first token and the length of the prompt, without and with the time of the selector."""
    device = video.device.type
    start = now(device)
    gaze = model.gaze(video, **budget)
    gazing_seconds = now(device) - start
    prompt = make_prompt(1, video.device)
    start = now(device)
    model.generate(prompt, video, gaze=gaze, **FIRST_TOKEN)
    answering_seconds, length = now(device) - start, model.count_tokens(gaze)[0][0] + WORDS
    return {
        f"{case}, gaze given": (answering_seconds, length),
        case: (gazing_seconds + answering_seconds, length),
    }


def make_prompt(num_video_tokens: int, device: torch.device) -> torch.Tensor:
    """Makes a prompt of video tokens and some words."""
    words = torch.arange(3, 3 + WORDS, device=device)[None]
    return torch.cat([words.new_full((1, num_video_tokens), VIDEO), words], dim=1)


def report(seconds: dict[str, list[float]], lengths: dict[str, int], options: argparse.Namespace) -> list[dict]:
    """Prints the medians and their ratios to the dense model's, and returns them as rows."""
    dense = statistics.median(seconds["dense"])
    rows = []
    print(
        f"{options.device}, {options.dtype}, {options.threads} threads, torch {torch.__version__}, median of {options.runs}"
    )
    print(f"{'':<40} {'prompt':>7} {'ms':>9} {'of dense':>9}")
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(
            {
                "case": name,
                "prompt_length": lengths[name],
                "seconds": median,
                "of_dense": median / dense,
                "all_seconds": values,
            }
        )
        print(f"{name:<40} {lengths[name]:>7} {1000 * median:>9.1f} {median / dense:>9.3f}")
    return rows


def small_mllm(tower_layers: int, layers: int) -> LlavaOnevisionForConditionalGeneration:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    }
    tokens = {"video_token_index": VIDEO, "image_token_index": IMAGE}
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, **tokens)
    return LlavaOnevisionForConditionalGeneration(config).eval()


if __name__ == "__main__":
    main()
