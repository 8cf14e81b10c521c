"""Writes tiny video MLLMs with random weights to folders, with tokenizers, processors and chat templates, for vLLM and lmms-eval."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor


QWEN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{m.role}}}}\n"
    "{{% if m.content is string %}}{{{{m.content}}}}{{% else %}}{{% for c in m.content %}}"
    "{{% if c.type in ('video', 'video_url') %}}{video}{{% elif c.type in ('image', 'image_url') %}}{image}"
    "{{% else %}}{{{{c.text}}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
QWEN_TEMPLATE = TEMPLATE.format(
    video="<|vision_start|><|video_pad|><|vision_end|>", image="<|vision_start|><|image_pad|><|vision_end|>"
)
SMALL = {"hidden_size": 128, "intermediate_size": 128}
TEXT = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # vLLM's attention on a CPU takes no heads of 16
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SIDE = 112
"""Height and width that videos are resized to at most; 4x4 units of Qwen2.5-VL."""


def write_qwen2_5_vl(folder: Path, seed: int = 0) -> None:
    """Writes a Qwen2.5-VL whose towers have windows of 2x2 units."""
    tokenizer, ids = _tokenizer(QWEN)
    pixels = {"min_pixels": 28 * 28, "max_pixels": SIDE * SIDE}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer) + 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        **SMALL,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        # A pair of frames is one position: transformers begins the text behind a video at its larger side in space, vLLM
        # behind its last position, and so both agree about short videos.
        "tokens_per_second": 1,
    }
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_visual_ids(ids))
    _save(Qwen2_5_VLForConditionalGeneration(config), folder)


def write_qwen3_vl(folder: Path, seed: int = 0) -> None:
    """Writes a Qwen3-VL with deepstack."""
    tokenizer, ids = _tokenizer(QWEN)
    video = {"shortest_edge": 2 * 32 * 32, "longest_edge": 16 * 128 * 128}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16,
            size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
            image_mean=[0.5] * 3,  # as for videos: vLLM normalises both in the model
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=video),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    text = {
        **TEXT,
        "head_dim": 64,
        "vocab_size": len(tokenizer) + 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        **SMALL,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 25,
    }
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_visual_ids(ids))
    _save(Qwen3VLForConditionalGeneration(config), folder)


def write_llava_onevision(folder: Path, seed: int = 0) -> None:
    """Writes a LLaVA-OneVision whose frames are 4x4 patches, pooled to 2x2 places."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer, ids = _tokenizer(special)
    size = {"height": 56, "width": 56}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[56, 56]]),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        chat_template=TEMPLATE.format(video="<video>", image="<image>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    ).save_pretrained(folder)
    text = {
        **TEXT,
        "model_type": "qwen2",
        "vocab_size": len(tokenizer) + 1,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        **SMALL,
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        image_grid_pinpoints=[[56, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    _save(LlavaOnevisionForConditionalGeneration(config), folder)


def _tokenizer(special: tuple[str, ...]) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """Makes a tokenizer of single bytes."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    for name, token in (
        ("image_token", special[-2]),
        ("video_token", special[-1]),
        ("vision_start_token", special[3]),
        ("vision_end_token", special[4]),
    ):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer, {token: tokenizer.convert_tokens_to_ids(token) for token in special}


def _visual_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _save(mllm: PreTrainedModel, folder: Path) -> None:
    """Draws weights that are large enough for answers to depend on what is seen, and writes them."""
    for name, parameter in mllm.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5)
    mllm.generation_config.eos_token_id = None
    mllm.save_pretrained(folder)
    if "siglip" in str(mllm.config):
        # As in published checkpoints, whose names vLLM knows.
        file = folder / "model.safetensors"
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model."): weight
            for name, weight in load_file(file).items()
        }
        save_file(weights, file, {"format": "pt"})
