"""Prompts with placeholders of videos: finding them, and replacing them by the embeddings of the videos."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput


IGNORED_LABEL = -100
"""The label of tokens that do not count in the loss."""


def find_placeholders(
    input_ids: torch.Tensor, placeholder_id: int, attention_mask: torch.Tensor | None = None
) -> list[list[tuple[int, int]]]:
    """
    Finds the placeholders of videos in prompts. Several placeholders in a row are those of one video.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompts.
        placeholder_id (`int`): the placeholder token of a video.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.

    Returns:
        `list[list[tuple[int, int]]]`: for each prompt, the start of every run of placeholders and its end, exclusive.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.prompts import find_placeholders

    >>> find_placeholders(torch.tensor([[1, 9, 9, 2, 9], [1, 2, 3, 4, 5]]), placeholder_id=9)
    [[(1, 3), (4, 5)], []]

    ```
    """
    is_placeholder = input_ids == placeholder_id
    if attention_mask is not None:
        is_placeholder = is_placeholder & attention_mask.bool()
    edges = torch.nn.functional.pad(is_placeholder.long(), (1, 1)).diff(dim=1)
    return [
        list(zip((edge == 1).nonzero().flatten().tolist(), (edge == -1).nonzero().flatten().tolist(), strict=True))
        for edge in edges
    ]


def fill_placeholders(
    input_ids: torch.Tensor,
    text: torch.Tensor,
    placeholder_id: int,
    videos: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    padding_side: str = "right",
    pad_token_id: int = 0,
) -> dict[str, torch.Tensor]:
    """
    Replaces the placeholders of videos by the videos' embeddings. Gradients flow to the embeddings.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompts.
        text (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): the embeddings of the prompts' tokens.
        placeholder_id (`int`): the placeholder token of a video.
        videos (`Sequence[torch.FloatTensor]` of shape `(tokens, hidden_size)`): one per run of placeholders, in order.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
        padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.
        pad_token_id (`int`, *optional*, defaults to 0): what they are padded with.

    Returns:
        `dict` with `inputs_embeds`, `attention_mask`, `input_ids`, which have one placeholder for each embedding of a video,
        and, if labels are given, `labels`, which are -100 for these.
    """
    device = input_ids.device
    # Indices count the tokens of all prompts and then the embeddings of all videos.
    words = torch.arange(input_ids.numel(), device=device).view_as(input_ids)
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counts = [len(video) for video in videos]
    embeddings = iter((words.numel() + torch.arange(sum(counts), device=device)).split(counts) if counts else ())
    filled_prompts = []
    for prompt, mask, spans in zip(
        words, is_real, find_placeholders(input_ids, placeholder_id, attention_mask), strict=True
    ):
        parts, end = [], 0
        for start, stop in spans:
            parts += [prompt[end:start][mask[end:start]], next(embeddings)]
            end = stop
        filled_prompts.append(torch.cat([*parts, prompt[end:][mask[end:]]]))
    index = pad_sequence(filled_prompts, batch_first=True, padding_value=-1, padding_side=padding_side)
    is_token, index = index >= 0, index.clamp(min=0)

    def fill(values: torch.Tensor, video_value: int) -> torch.Tensor:
        return torch.cat([values.flatten(), values.new_full((sum(counts),), video_value)])[index]

    source = torch.cat([text.flatten(0, 1), *(video.to(text) for video in videos)])
    filled = {
        "inputs_embeds": source[index.to(text.device)],
        "attention_mask": is_token.long(),
        "input_ids": fill(input_ids, placeholder_id).masked_fill(~is_token, pad_token_id),
    }
    if labels is not None:
        filled["labels"] = fill(labels, IGNORED_LABEL).masked_fill(~is_token, IGNORED_LABEL)
    return filled


def padding_side_of(attention_mask: torch.Tensor | None) -> str:
    """Returns `"left"` if a prompt is padded at its start, else `"right"`."""
    return "left" if attention_mask is not None and not bool(attention_mask[:, 0].all()) else "right"


def with_labels(output: Any, labels: torch.Tensor | None) -> Any:
    """Adds to the output of an MLLM the labels of its logits, which are as many as the logits, unlike the caller's."""
    if labels is not None and isinstance(output, ModelOutput):
        output["labels"] = labels
    return output
