"""
Prompts that name videos: where they do, and what they become when the videos' embeddings are put in.

This module works on token ids and embeddings alone; it knows neither MLLMs nor gazes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput


_IGNORED = -100  # a label where nothing is to be learned


def find_placeholders(
    input_ids: torch.Tensor, placeholder_id: int, attention_mask: torch.Tensor | None = None
) -> list[list[tuple[int, int]]]:
    """
    Finds where prompts name a video: by one placeholder, or by several in a row.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompts.
        placeholder_id (`int`): the token that stands for a video.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.

    Returns:
        `list`, one entry per prompt: a list of the first place and the place after the last of every run.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.prompts import find_placeholders

    >>> find_placeholders(torch.tensor([[1, 9, 9, 2, 9], [1, 2, 3, 4, 5]]), placeholder_id=9)
    [[(1, 3), (4, 5)], []]

    ```
    """
    stands = input_ids == placeholder_id
    if attention_mask is not None:
        stands = stands & attention_mask.bool()
    # A run starts and stops where a placeholder has another neighbour.
    edges = torch.nn.functional.pad(stands.long(), (1, 1)).diff(dim=1)
    return [
        list(zip((row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist(), strict=True))
        for row in edges
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
    Puts the embeddings of videos in the place of their placeholders. Gradients pass through.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompts.
        text (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): their embeddings.
        placeholder_id (`int`): the token that stands for a video.
        videos (`Sequence[torch.FloatTensor]` of shape `(tokens, hidden_size)`): one per run of placeholders, in order.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 where a prompt is padded.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to learn, -100 elsewhere.
        padding_side (`str`, *optional*, defaults to `"right"`): where prompts of unequal length are padded.
        pad_token_id (`int`, *optional*, defaults to 0): what they are padded with.

    Returns:
        `dict` with `inputs_embeds`, `attention_mask`, `input_ids`, with one placeholder per embedding of a video, and,
        if given, `labels`, which ignore videos.
    """
    device = input_ids.device
    # One index over the words of all prompts and then the tokens of all videos says what goes where.
    words = torch.arange(input_ids.numel(), device=device).view_as(input_ids)
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counts = [len(video) for video in videos]
    tokens = iter((words.numel() + torch.arange(sum(counts), device=device)).split(counts) if counts else ())
    rows = []
    for row, spans in enumerate(find_placeholders(input_ids, placeholder_id, attention_mask)):
        parts, done = [], 0
        for start, stop in spans:
            parts += [words[row, done:start][is_real[row, done:start]], next(tokens)]
            done = stop
        rows.append(torch.cat([*parts, words[row, done:][is_real[row, done:]]]))
    index = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=padding_side)
    is_token, index = index >= 0, index.clamp(min=0)

    def extended(values: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([values.flatten(), values.new_full((sum(counts),), value)])[index]

    source = torch.cat([text.flatten(0, 1), *(video.to(text) for video in videos)])
    filled = {
        "inputs_embeds": source[index.to(text.device)],
        "attention_mask": is_token.long(),
        "input_ids": extended(input_ids, placeholder_id).masked_fill(~is_token, pad_token_id),
    }
    if labels is not None:
        filled["labels"] = extended(labels, _IGNORED).masked_fill(~is_token, _IGNORED)
    return filled


def with_labels(output: Any, labels: torch.Tensor | None) -> Any:
    """Adds to the output of an MLLM the labels that belong to its logits, which are not as many as the caller's."""
    if labels is not None and isinstance(output, ModelOutput):
        output["labels"] = labels
    return output
