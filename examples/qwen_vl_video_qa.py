"""
Asks Qwen2.5-VL or Qwen3-VL about a video of which it sees only the gazed merge units.

    python examples/qwen_vl_video_qa.py video.mp4 "What happens in this video?"
    python examples/qwen_vl_video_qa.py --tiny    # a quick run: random weights, rendered clip

The default selector chooses merge units, and --ratio is the share of them that the language model reads. A selector of fixed scales
(--gaze-model), such as the published AutoGaze, keeps that share of its own patches in every frame, which overlap many more units.
The MLLM's own processor needs torchvision.
"""

import argparse

import torch
import transformers
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin, Qwen2_5_VLConfig

from transformers_autogaze import DEFAULT_SELECTOR, read_video
from transformers_autogaze.integrations.qwen_vl import GazeQwenVL
from transformers_autogaze.video.demo import render_demo_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a path or an http(s) URL")
    parser.add_argument("question", nargs="?", default="What happens in this video?")
    parser.add_argument("--mllm", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--gaze-model", default=DEFAULT_SELECTOR, help="a folder or a repository of the Hub")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the video's merge units to keep")
    parser.add_argument("--tiny", action="store_true", help="a tiny MLLM with random weights")
    options = parser.parse_args()
    if options.video is None and not options.tiny:
        parser.error("name a video, or --tiny")
    mllm, processor, inputs = make_tiny() if options.tiny else load(options)
    mllm, inputs = (part.to("cuda" if torch.cuda.is_available() else "cpu") for part in (mllm.eval(), inputs))
    selector = transformers.AutoModel.from_pretrained(options.gaze_model)
    model = GazeQwenVL(mllm, selector.to(mllm.device), processor)
    settings = {"clip_ratio" if selector.takes_any_grid else "gazing_ratio": options.ratio}
    gaze = model.gaze(inputs["pixel_values_videos"], inputs["video_grid_thw"], **settings)
    [(kept, units)] = model.count_units(gaze, inputs["video_grid_thw"])
    length = inputs["input_ids"].shape[1]
    print(f"{type(selector).__name__}: {kept} of {units} merge units, {length - units + kept} of {length} tokens")
    answer = model.generate(**inputs, gaze=gaze, max_new_tokens=64)[0, length:]
    print(answer.tolist() if options.tiny else processor.decode(answer, skip_special_tokens=True))


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin, BatchFeature]:
    mllm = transformers.AutoModelForImageTextToText.from_pretrained(options.mllm, dtype="auto")
    processor = transformers.AutoProcessor.from_pretrained(options.mllm)
    content = [{"type": "video"}, {"type": "text", "text": options.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    frames, metadata = read_video(options.video, options.num_frames)
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    sampled = {"video_metadata": [metadata], "do_sample_frames": False}
    return mllm, processor, processor(text=[prompt], videos=[frames], **sampled, return_tensors="pt")


def make_tiny() -> tuple:
    size = {"hidden_size": 32, "intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**size, "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config={**size, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1], "out_hidden_size": 32},
        **{"image_token_id": 46, "video_token_id": 47, "vision_start_token_id": 48, "vision_end_token_id": 49},
    )
    # The image processor repeats every frame to a pair.
    processor = transformers.Qwen2VLImageProcessor()
    pictures = processor(list(render_demo_clip(8)), return_tensors="pt")
    grid = torch.tensor([[8, *pictures["image_grid_thw"][0, 1:].tolist()]])
    input_ids = torch.tensor([[1, 48, *[47] * (int(grid.prod()) // 4), 49, 2]])
    inputs = {"input_ids": input_ids, "pixel_values_videos": pictures["pixel_values"], "video_grid_thw": grid}
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor, BatchFeature(inputs)


if __name__ == "__main__":
    main()
