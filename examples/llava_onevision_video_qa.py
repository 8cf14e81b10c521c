"""
Asks LLaVA-OneVision about a video of which it sees only the gazed patches.

    python examples/llava_onevision_video_qa.py video.mp4 "What happens in this video?"
    python examples/llava_onevision_video_qa.py --tiny    # a quick run: random weights, rendered clip

The default selector chooses pooled patches, and --ratio is the share of them that the language model reads. --gaze-model names
another selector; one of fixed scales, such as the published AutoGaze, keeps that share of its own patches in every frame.
"""

import argparse

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from transformers_autogaze import DEFAULT_SELECTOR, read_video
from transformers_autogaze.integrations.mllm import GazeVideoLM
from transformers_autogaze.video.demo import render_demo_clip


QUESTION = "What happens in this video?"
PROMPT = "<|im_start|>user <video>\n{question}<|im_end|><|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a path or an http(s) URL")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--mllm", default="llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    parser.add_argument("--gaze-model", default=DEFAULT_SELECTOR, help="a folder or a repository of the Hub")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.125, help="share of the video's tokens to keep")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="a tiny MLLM with random weights")
    options = parser.parse_args()
    if options.video is None and not options.tiny:
        parser.error("name a video, or --tiny")

    mllm, tokenizer = tiny_mllm() if options.tiny else load_mllm(options.mllm)
    mllm = mllm.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    selector = transformers.AutoModel.from_pretrained(options.gaze_model)
    side = mllm.config.vision_config.image_size
    image_processor = transformers.SiglipImageProcessor(size={"height": side, "width": side})
    model = GazeVideoLM(mllm, selector.to(mllm.device), image_processor)

    frames = render_demo_clip(16) if options.video is None else read_video(options.video, options.num_frames)[0]
    video = image_processor(list(frames), return_tensors="pt")["pixel_values"][None]
    prompt = tokenizer(PROMPT.format(question=options.question), return_tensors="pt")["input_ids"].to(mllm.device)
    settings = {"clip_ratio" if selector.takes_any_grid else "gazing_ratio": options.ratio}
    gaze = model.gaze(video, **settings)
    [(tokens, whole)] = model.count_tokens(gaze)
    print(f"{type(selector).__name__}: {tokens} tokens for the video, {whole} without gazing")
    answer = model.generate(prompt, video, gaze=gaze, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True))


def load_mllm(name: str) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    mllm = LlavaOnevisionForConditionalGeneration.from_pretrained(name, dtype="auto")
    return mllm, transformers.AutoTokenizer.from_pretrained(name)


def tiny_mllm() -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    words = f"<unk> <image> <video> <|im_start|>user {QUESTION}".split()
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "siglip_vision_model", **size, "image_size": 224, "patch_size": 16}
    text = {"model_type": "qwen2", **size, "num_key_value_heads": 4, "vocab_size": len(words)}
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=1, video_token_index=2)
    return LlavaOnevisionForConditionalGeneration(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    main()
