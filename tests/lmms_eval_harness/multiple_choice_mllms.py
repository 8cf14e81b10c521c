"""The tiny MLLMs of `tiny_mllms` with a language model head that answers by a letter of A to D."""

from pathlib import Path

import tiny_mllms
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer


SEED = 3  # with these weights answers differ from video to video, and none is decided by the rounding of bfloat16


def save_tiny(family: str, folder: Path) -> Path:
    """Writes a model of a family with its processor to a folder."""
    getattr(tiny_mllms, f"write_{family}")(folder, seed=SEED)
    mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    letters = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list("ABCD"))
    with torch.no_grad():
        weights = mllm.lm_head.weight[letters].clone()
        mllm.lm_head.weight.zero_()
        # All other tokens have the score 0, and the four scores have the mean 0, so one letter has the highest.
        mllm.lm_head.weight[letters] = weights - weights.mean(0)
    mllm.save_pretrained(folder)
    return folder
