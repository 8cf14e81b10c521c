"""
Attention to the canvas: which earlier tokens still lie where a frame kept nothing.

Pasting what every frame kept over what the frames before it kept gives a canvas, at every place the latest token that was
kept there. A frame's tokens see their own frame and, at the places that it did not keep, the canvas. This module plans that
on tensors alone; it knows nothing of gazes, towers or layers.
"""

from dataclasses import dataclass

import torch

from .packed_attention import PackedAttention


@dataclass(eq=False)
class Canvas:
    """
    What the last frames leave to the frames that follow: the tokens that are visible at the end.

    Args:
        token_at (`torch.LongTensor` of shape `(groups, places)`):
            Which of the visible tokens lies at each place, -1 where nothing was kept so far.
        tokens (`torch.LongTensor` of shape `(visible,)`):
            Where the visible tokens lay among the keys of the call that made it, ascending: first those of the canvas
            that it began with, then the tokens of the packed sequence.
    """

    token_at: torch.Tensor
    tokens: torch.Tensor


def tokens_at_places(token_of_patch: torch.Tensor, patch_at: torch.Tensor) -> torch.Tensor:
    """
    Finds the token that a frame shows at every place: that of the finest kept patch over it.

    Args:
        token_of_patch (`torch.LongTensor` of shape `(.., patches)`):
            The token of each patch of all scales, -1 for patches that were not kept.
        patch_at (`torch.LongTensor` of shape `(scales, places)`):
            The patch of each scale, coarse to fine, that lies over a place; see [`GazeGrid.patches_at`].

    Returns:
        `torch.LongTensor` of shape `(.., places)`: tokens, -1 where no kept patch lies.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.canvas import tokens_at_places

    >>> patch_at = torch.tensor([[0, 0], [1, 2]])  # one patch over both places, or one patch each
    >>> tokens_at_places(torch.tensor([[5, -1, 6], [-1, 7, -1]]), patch_at).tolist()
    [[5, 6], [7, -1]]

    ```
    """
    shown = token_of_patch[..., patch_at[0]]
    for patches in patch_at[1:]:
        finer = token_of_patch[..., patches]
        shown = torch.where(finer >= 0, finer, shown)
    return shown


def plan_canvas(
    token_at: torch.Tensor, first_token: torch.Tensor, num_tokens: torch.Tensor, canvas: Canvas | None = None
) -> tuple[PackedAttention, Canvas]:
    """
    Plans attention to the canvas over groups of frames that lie in one packed sequence.

    A group is what shares a canvas: a clip, or a window of a video. The tokens that a group has at one time are one
    segment of the sequence; later ones of a group lie behind earlier ones. A segment's keys are its own tokens and, for
    the places where it shows none, the distinct tokens that were last shown there. Where no segment has keys beyond its
    own, this is the plan of `"frame"`.

    Args:
        token_at (`torch.LongTensor` of shape `(groups, times, places)`):
            Which token of the sequence is shown at each place, -1 for none. Groups with fewer times are padded by -1.
        first_token, num_tokens (`torch.LongTensor` of shape `(groups, times)`):
            Where a segment begins in the sequence, and its tokens, those that are shown nowhere included; the segments
            fill the sequence. Those without tokens are left out.
        canvas ([`Canvas`], *optional*):
            What earlier frames of the same groups left. Its tokens' keys then come before those of the sequence.

    Returns:
        `tuple`: a [`PackedAttention`] and the [`Canvas`] after the last frame.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.canvas import plan_canvas

    >>> token_at = torch.tensor([[[0, 1], [2, -1], [-1, 3]]])  # a clip of three frames with two places
    >>> plan, canvas = plan_canvas(token_at, torch.tensor([[0, 2, 3]]), torch.tensor([[2, 1, 1]]))
    >>> [keys.tolist() for keys in plan.key_index.tensor_split(plan.first_key[1:])]
    [[0, 1], [1, 2], [2, 3]]
    >>> canvas.tokens.tolist(), canvas.token_at.tolist()
    ([2, 3], [[0, 1]])

    ```
    """
    num_before = 0 if canvas is None else len(canvas.tokens)
    before = token_at.new_full(token_at[:, 0].shape, -1) if canvas is None else canvas.token_at.to(token_at.device)
    shown = torch.where(token_at < 0, -1, token_at + num_before)
    latest = torch.cat([before[:, None], shown], dim=1).cummax(1).values
    end, latest = latest[:, -1], latest[:, 1:]

    # Segments in the order of the sequence, and the number of each among them.
    segment = (num_tokens > 0).flatten().nonzero().squeeze(1)
    segment = segment[first_token.flatten()[segment].argsort()]
    number = torch.zeros_like(num_tokens).flatten()
    number[segment] = torch.arange(len(segment), device=number.device)
    num_queries = num_tokens.flatten()[segment]
    ends = num_queries.cumsum(0)
    own = torch.arange(int(num_queries.sum()), device=number.device)

    is_seen = (token_at < 0) & (latest >= 0) & (num_tokens > 0)[..., None]
    if not num_before and not is_seen.any():
        plan = PackedAttention(num_queries, ends - num_queries, ends)
    else:
        # One number for a segment and a key, so that a key counts once and keys lie segment by segment.
        base = num_before + len(own)
        seen = (number.view_as(num_tokens)[..., None] * base + latest)[is_seen]
        own = torch.arange(len(segment), device=own.device).repeat_interleave(num_queries) * base + own + num_before
        pairs = torch.cat([seen, own]).unique()
        num_keys = torch.bincount(pairs // base, minlength=len(segment))
        key_ends = num_keys.cumsum(0)
        group = segment // num_tokens.shape[1]
        plan = PackedAttention(num_queries, key_ends - num_keys, key_ends, key_index=pairs % base, group=group)

    tokens = end[end >= 0].unique()
    return plan, Canvas(torch.where(end < 0, -1, torch.searchsorted(tokens, end.contiguous())), tokens)
