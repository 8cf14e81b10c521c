"""
How soon does a video MLLM answer when it sees the gazed patches only?

Time from normalised frames to the first token of the answer, for a LLaVA-OneVision with a `SiglipVisionModel` of the base
size (12 layers, 768 channels, patch 16, 224x224) and a Qwen2 as wide as that of 0.5B, with fewer layers and words, on 16
frames of the demo clip. The dense model is called as transformers has it, which pools every frame to a quarter of its patches,
and once more with pooling off. It runs in turn with `GazeVideoLM`, with the time for gazing apart and included: by the greedy
selector, which keeps a share of the pooled places in the whole clip, and by the model of the published size, which keeps a
share of the patches of its four scales in every frame, each a token. Random weights cost what trained ones do, for the
number of patches is given. Prints a table and writes JSON.

    python benchmarks/mllm.py --threads 2 --runs 5 -o mllm.json
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measurement import DTYPES, machine, now
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipImageProcessor

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GreedyGazeSelector
from transformers_autogaze.integrations.mllm import GazeVideoLM
from transformers_autogaze.video.demo import render_demo_clip


VIDEO, IMAGE, WORDS = 31998, 31999, 30


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
        "model": AutoGazeModel(AutoGazeConfig(decoding_positions="frame_tail")).eval().to(options.device, mllm.dtype),
        "greedy": GreedyGazeSelector().to(options.device),
    }
    budgets = {"model": "gazing_ratio", "greedy": "clip_ratio"}
    image_processor = SiglipImageProcessor(size={"height": 224, "width": 224})
    gazed = {name: GazeVideoLM(mllm, selector, image_processor) for name, selector in selectors.items()}
    frames = list(render_demo_clip(options.num_frames))
    video = image_processor(frames, return_tensors="pt")["pixel_values"][None].to(options.device, mllm.dtype)
    words = torch.arange(3, 3 + WORDS, device=options.device)[None]
    first_token = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}

    def run_dense(tokens_of_a_frame: int) -> int:
        count = options.num_frames * tokens_of_a_frame + 1
        prompt = torch.cat([words.new_full((1, count), VIDEO), words], dim=1)
        mask = torch.ones_like(prompt)
        mllm.generate(input_ids=prompt, attention_mask=mask, pixel_values_videos=video, **first_token)
        return prompt.shape[1]

    prompt = torch.cat([words.new_full((1, 1), VIDEO), words], dim=1)
    # OneVision makes 7x7 of the 14x14 patches of a frame.
    dense = {"dense": (mllm.model.apply_pooling, 49), "dense, pooling off": (lambda features: features, 196)}
    seconds: dict[str, list[float]] = {}
    lengths: dict[str, int] = {}

    def note(name: str, value: float, length: int) -> None:
        seconds.setdefault(name, []).append(value)
        lengths[name] = length

    for run in range(options.runs + 1):
        if run == 1:
            seconds.clear()  # The first run of each was a warm-up.
        for name, (pooling, tokens_of_a_frame) in dense.items():
            mllm.model.apply_pooling = pooling
            start = now(options.device)
            length = run_dense(tokens_of_a_frame)
            note(name, now(options.device) - start, length)
        for ratio in options.ratios:
            for selector, model in gazed.items():
                start = now(options.device)
                gaze = model.gaze(video, **{budgets[selector]: ratio})
                spent = now(options.device) - start
                start = now(options.device)
                model.generate(prompt, video, gaze=gaze, **first_token)
                answering, length = now(options.device) - start, model.count_tokens(gaze)[0][0] + WORDS
                note(f"{selector}, {budgets[selector]} {ratio:g}, gaze given", answering, length)
                note(f"{selector}, {budgets[selector]} {ratio:g}", spent + answering, length)

    whole = statistics.median(seconds["dense"])
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
                "of_dense": median / whole,
                "all_seconds": values,
            }
        )
        print(f"{name:<40} {lengths[name]:>7} {1000 * median:>9.1f} {median / whole:>9.3f}")
    sizes = {"num_frames": options.num_frames, "tower_layers": options.tower_layers, "layers": options.layers}
    result = {
        "machine": machine(options.threads, options.device, options.dtype),
        "runs": options.runs,
        **sizes,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


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
