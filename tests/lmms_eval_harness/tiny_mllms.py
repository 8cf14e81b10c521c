"""Small MLLMs with random weights, saved with their processors as published ones are. They answer by a letter of A to D."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<image>", "<video>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 8192}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def save_tiny(family: str, folder: Path) -> Path:
    """Writes a model of a family with its processor into a folder."""
    tokenizer = make_tokenizer(family)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "vocab_size": len(tokenizer)}
    torch.manual_seed(2)  # answers of these differ from video to video
    if family == "llava_onevision":
        mllm = make_llava({**TEXT, **ends}, ids)
        pixels = {"size": {"height": 56, "width": 56}}
        processor = LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[56, 56]]),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=CHAT,
        )
    else:
        mllm = make_qwen(family, {**TEXT, **ends, "rope_parameters": ROPE}, ids)
        processor = make_qwen_processor(family, tokenizer)
    answer_by_letters(mllm, tokenizer)
    mllm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Makes a token of every byte."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT
    )
    is_llava = family == "llava_onevision"
    tokenizer.image_token, tokenizer.video_token = SPECIAL[-2:] if is_llava else SPECIAL[-4:-2]
    return tokenizer


def make_qwen(family: str, text: dict, ids: dict[str, int]) -> PreTrainedModel:
    vision = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    if family == "qwen2_5_vl":
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text["head_dim"] = 32
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))


def make_qwen_processor(family: str, tokenizer: PreTrainedTokenizerFast):
    if family == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=CHAT,
        )
    half = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**half),
        chat_template=CHAT,
    )


def make_llava(text: dict, ids: dict[str, int]) -> PreTrainedModel:
    vision = {
        **SIZE,
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=vision,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[56, 56]],
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def answer_by_letters(mllm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives weights a size at which answers depend on what is seen, and letters the only scores that are not 0."""
    for name, parameter in mllm.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5)
    letters = tokenizer.convert_tokens_to_ids(list("ABCD"))
    with torch.no_grad():
        weights = mllm.lm_head.weight[letters].clone()
        mllm.lm_head.weight.zero_()
        mllm.lm_head.weight[letters] = weights - weights.mean(0)  # one of four numbers with the mean 0 is above 0
