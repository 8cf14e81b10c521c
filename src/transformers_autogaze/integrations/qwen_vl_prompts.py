"""
Prompts of Qwen2.5-VL and Qwen3-VL from which dropped merge units are gone, and what puts the others in their places.

This module knows the language models' inputs. Which units are left is its caller's matter.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class GazedPrompt:
    """
    Prompts without the tokens of dropped units, and where the others are.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the tokens that are left; any where it is padded.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 where a prompt is padded.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): what the language model gets.
        position_ids (`torch.LongTensor` of shape `(3, batch, length)`):
            Time, height and width of every token in the whole prompt, as the MLLM itself counts them.
        next_position (`torch.LongTensor` of shape `(batch,)`): where an answer goes on.
        visual_index (`torch.LongTensor` of shape `(batch, length)`):
            The row of `deepstack` that belongs to a token, -1 for words.
        deepstack (`list[torch.FloatTensor]` of shape `(visual tokens, hidden_size)`):
            What the first layers of the language model add (Qwen3-VL); empty for Qwen2.5-VL.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): the labels that are left.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    visual_index: torch.Tensor
    deepstack: list[torch.Tensor]
    labels: torch.Tensor | None = None


@contextmanager
def in_place(mllm: PreTrainedModel, prompt: GazedPrompt) -> Iterator[None]:
    """
    Gives tokens their true positions, and the language model its deepstack features, while the MLLM is called.

    The MLLM itself takes the prompt for text, and counts its tokens one by one.
    """
    model, length = mllm.model, prompt.input_ids.shape[1]

    def at_language_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Releases of the library before 5.24 call the cache `past_key_values`.
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("cache", kwargs.get("past_key_values"))
        times = len(embeds) // len(prompt.input_ids)  # beams, or several answers to a prompt
        start = 0 if cache is None else int(cache.get_seq_length())
        slots = torch.arange(start, start + embeds.shape[1], device=prompt.position_ids.device)
        in_prompt = prompt.position_ids[:, :, slots.clamp(max=length - 1)]
        in_answer = prompt.next_position[:, None] + slots - length
        positions = torch.where(slots < length, in_prompt, in_answer).repeat_interleave(times, dim=1)
        counted = kwargs.get("position_ids")
        # Where there are four rows, the first is what attention masks are made from.
        if counted is not None and counted.ndim == 3 and len(counted) == 4:
            positions = torch.cat([counted[:1], positions.to(counted)])
        kwargs["position_ids"] = positions.to(embeds.device)
        index = prompt.visual_index[:, start : start + embeds.shape[1]].repeat_interleave(times, dim=0)
        if prompt.deepstack and bool((index >= 0).any()):
            shown = index[index >= 0]
            kwargs["visual_pos_masks"] = (index >= 0).to(embeds.device)
            kwargs["deepstack_visual_embeds"] = [layer[shown.to(layer.device)] for layer in prompt.deepstack]
        return args, kwargs

    handle = model.language_model.register_forward_pre_hook(at_language_model, with_kwargs=True)
    rope_deltas, model.rope_deltas = model.rope_deltas, None
    try:
        yield
    finally:
        handle.remove()
        model.rope_deltas = rope_deltas


def check_placeholders(
    config: PreTrainedConfig,
    kind: str,
    is_here: torch.Tensor,
    name: str,
    pixels: torch.Tensor | None,
    grid: torch.Tensor | None,
) -> None:
    """Checks that there are as many placeholders as units, and as many patches as these need."""
    merge = config.vision_config.spatial_merge_size
    patches = 0 if grid is None else int(grid.prod(1).sum())
    count, units = int(is_here.sum()), patches // merge**2
    if (0 if pixels is None else len(pixels)) != patches:
        raise ValueError(
            f"`{name}` must have the {patches} patches that `{kind}_grid_thw` counts, got "
            f"{None if pixels is None else tuple(pixels.shape)}"
        )
    if count != units:
        token = getattr(config, f"{kind}_token_id")
        raise ValueError(
            f"`input_ids` must have one {kind} placeholder, the token {token}, for each of the {units} merge units "
            f"in `{name}`, as the MLLM's processor writes them; got {count or f'no {kind} placeholder'}"
        )


def find_positions(mllm: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Asks an MLLM for the positions `(3, batch, length)` of whole prompts, by what its `get_rope_index` takes of these."""
    get_rope_index = mllm.model.get_rope_index
    known = inspect.signature(get_rope_index).parameters
    return get_rope_index(**{key: value for key, value in inputs.items() if key in known})[0]
