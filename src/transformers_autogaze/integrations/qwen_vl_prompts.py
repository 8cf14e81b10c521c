"""Prompts of Qwen2.5-VL and Qwen3-VL without the tokens of dropped merge units, and the language model's inputs for them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .prompts import IGNORED_LABEL


class WholePrompt(NamedTuple):
    """
    Prompts with the tokens of all merge units.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the tokens.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 where a prompt is padded.
        is_video, is_image (`torch.BoolTensor` of shape `(batch, length)`): true for the placeholders of videos, of images.
        position_ids (`torch.LongTensor` of shape `(3, batch, length)`): time, height and width of every token.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    is_video: torch.Tensor
    is_image: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class GazedPrompt:
    """
    Prompts without the tokens of dropped units, and the positions of the others.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the kept tokens; arbitrary ones where a prompt is padded.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 where a prompt is padded.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): inputs of the language model.
        position_ids (`torch.LongTensor` of shape `(3, batch, length)`):
            Time, height and width of every token in the whole prompt, as the MLLM itself computes them.
        next_position (`torch.LongTensor` of shape `(batch,)`): position of the first token of the answer.
        visual_index (`torch.LongTensor` of shape `(batch, length)`): index of each token in `deepstack`, -1 for words.
        deepstack (`list[torch.FloatTensor]` of shape `(visual tokens, hidden_size)`):
            Features added in the first layers of the language model (Qwen3-VL); empty for Qwen2.5-VL.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): labels of the kept tokens.
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
def language_model_inputs(mllm: PreTrainedModel, prompt: GazedPrompt) -> Iterator[None]:
    """
    Passes a prompt's positions and deepstack features to the language model, for calls of the MLLM in this context.

    Without it the MLLM would treat the prompt as text and number its tokens one by one.
    """
    model, length = mllm.model, prompt.input_ids.shape[1]

    def set_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Releases of transformers before 5.24 call the cache `past_key_values`.
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("cache", kwargs.get("past_key_values"))
        copies = len(embeds) // len(prompt.input_ids)  # beams, or several answers to a prompt
        start = 0 if cache is None else int(cache.get_seq_length())
        index = torch.arange(start, start + embeds.shape[1], device=prompt.position_ids.device)
        in_prompt = prompt.position_ids[:, :, index.clamp(max=length - 1)]
        in_answer = prompt.next_position[:, None] + index - length
        positions = torch.where(index < length, in_prompt, in_answer).repeat_interleave(copies, dim=1)
        text_positions = kwargs.get("position_ids")
        # Of four sets of positions, the first one is for the attention mask.
        if text_positions is not None and text_positions.ndim == 3 and len(text_positions) == 4:
            positions = torch.cat([text_positions[:1], positions.to(text_positions)])
        kwargs["position_ids"] = positions.to(embeds.device)
        visual_index = prompt.visual_index[:, start : start + embeds.shape[1]].repeat_interleave(copies, dim=0)
        is_visual = visual_index >= 0
        if prompt.deepstack and bool(is_visual.any()):
            visual_index = visual_index[is_visual]
            kwargs["visual_pos_masks"] = is_visual.to(embeds.device)
            kwargs["deepstack_visual_embeds"] = [
                features[visual_index.to(features.device)] for features in prompt.deepstack
            ]
        return args, kwargs

    handle = model.language_model.register_forward_pre_hook(set_inputs, with_kwargs=True)
    rope_deltas, model.rope_deltas = model.rope_deltas, None
    try:
        yield
    finally:
        handle.remove()
        model.rope_deltas = rope_deltas


def check_placeholders(
    config: PreTrainedConfig,
    kind: str,
    is_placeholder: torch.Tensor,
    name: str,
    pixels: torch.Tensor | None,
    grid: torch.Tensor | None,
) -> None:
    """
    Checks that prompts and patches agree with the grids of videos or images.

    Args:
        config (`PreTrainedConfig`): that of the MLLM.
        kind (`str`): `"video"` or `"image"`.
        is_placeholder (`torch.BoolTensor` of shape `(batch, length)`): true for the placeholders of this kind.
        name (`str`): name of the argument `pixels`.
        pixels (`torch.FloatTensor` of shape `(patches, ..)`, *optional*): the patches.
        grid (`torch.LongTensor` of shape `(videos or images, 3)`, *optional*): patches in time, height and width.

    Raises:
        ValueError: if the numbers of patches, or of placeholders, are not those of the grids.
    """
    merge = config.vision_config.spatial_merge_size
    patches = 0 if grid is None else int(grid.prod(1).sum())
    count, units = int(is_placeholder.sum()), patches // merge**2
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


def compute_position_ids(mllm: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Computes the positions `(3, batch, length)` of whole prompts, from those inputs that `get_rope_index` takes."""
    get_rope_index = mllm.model.get_rope_index
    names = inspect.signature(get_rope_index).parameters
    return get_rope_index(**{key: value for key, value in inputs.items() if key in names})[0]


def drop_tokens(
    whole: WholePrompt,
    is_unit_kept: torch.Tensor,
    embedding: nn.Module,
    features: torch.Tensor,
    deepstack: list[torch.Tensor],
    padding_side: str,
) -> GazedPrompt:
    """
    Removes the tokens of dropped units from prompts, and embeds the others.

    Args:
        whole ([`WholePrompt`]): the prompts.
        is_unit_kept (`torch.BoolTensor` of shape `(units,)`): which merge units of the videos to keep, in the order of tokens.
        embedding (`nn.Module`): the input embeddings of the language model.
        features (`torch.FloatTensor` of shape `(visual tokens, hidden_size)`): of images, then of the kept units of videos.
        deepstack (`list[torch.FloatTensor]` of shape `(visual tokens, hidden_size)`): as in [`GazedPrompt`].
        padding_side (`str`): `"left"` or `"right"`, where prompts of unequal length are padded.

    Returns:
        [`GazedPrompt`]
    """
    is_kept = whole.attention_mask.bool().masked_scatter(whole.is_video, is_unit_kept)
    visual_index = _index_visual_tokens(whole.is_image, whole.is_video & is_kept)
    index, is_real = _find_kept_tokens(is_kept, padding_side)
    input_ids = whole.input_ids.gather(1, index)
    visual_index = visual_index.gather(1, index).masked_fill(~is_real, -1)
    labels = None if whole.labels is None else whole.labels.gather(1, index).masked_fill(~is_real, IGNORED_LABEL)
    return GazedPrompt(
        input_ids=input_ids,
        attention_mask=is_real.long(),
        inputs_embeds=_insert_features(embedding(input_ids), features, visual_index),
        position_ids=whole.position_ids.gather(2, index.expand(3, -1, -1)),
        next_position=_compute_next_position(whole.position_ids, whole.attention_mask),
        visual_index=visual_index,
        deepstack=deepstack,
        labels=labels,
    )


def _index_visual_tokens(is_image: torch.Tensor, is_video: torch.Tensor) -> torch.Tensor:
    """Numbers the tokens of images and then those of videos, both masks `(batch, length)`; words have the index -1."""
    num_images, num_videos = int(is_image.sum()), int(is_video.sum())
    index = torch.full(is_image.shape, -1, device=is_image.device)
    index[is_image] = torch.arange(num_images, device=index.device)
    index[is_video] = torch.arange(num_images, num_images + num_videos, device=index.device)
    return index


def _insert_features(inputs_embeds: torch.Tensor, features: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """
    Replaces the embeddings of placeholders by visual features. Gradients flow to both.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): embeddings of tokens.
        features (`torch.FloatTensor` of shape `(visual tokens, hidden_size)`): the features.
        visual_index (`torch.LongTensor` of shape `(batch, length)`): index of each token's feature, -1 for words.
    """
    is_visual = visual_index >= 0
    inserted = features[visual_index[is_visual].to(features.device)].to(inputs_embeds)
    return inputs_embeds.masked_scatter(is_visual.to(inputs_embeds.device)[..., None], inserted)


def _find_kept_tokens(is_kept: torch.Tensor, padding_side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the kept tokens of prompts, in order and padded to one length.

    Args:
        is_kept (`torch.BoolTensor` of shape `(batch, length)`): which tokens to keep.
        padding_side (`str`): `"left"` or `"right"`.

    Returns:
        `tuple`: a `torch.LongTensor` of shape `(batch, new length)` with the indices of the kept tokens in their prompt, and a
        `torch.BoolTensor` of this shape, false for padding, whose indices are those of dropped tokens.
    """
    length, pads_left = int(is_kept.sum(1).max()), padding_side == "left"
    # A stable sort by one bit moves the dropped tokens to one side and keeps the order of the others.
    index = torch.argsort(is_kept if pads_left else ~is_kept, dim=1, stable=True)
    index = index[:, -length:] if pads_left else index[:, :length]
    return index, is_kept.gather(1, index)


def _compute_next_position(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Computes the position of the first token of the answer to each prompt, `(batch,)`.

    It follows the position of the prompt's last token, even if a video before this token ends at a higher one.
    """
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (index * attention_mask).argmax(1, keepdim=True)
    return position_ids.amax(0).gather(1, last).flatten() + 1
