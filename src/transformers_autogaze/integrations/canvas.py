"""
Attention to the canvas: the tokens of earlier frames that are visible where a frame kept nothing.

The canvas has at every place the latest token that was kept there. The tokens of a frame attend to their own frame and, at the
places where this frame kept nothing, to the canvas. This module computes the plan of this attention from tensors.
"""

from dataclasses import dataclass

import torch

from .packed_attention import PackedAttention


@dataclass(eq=False)
class Canvas:
    """
    The tokens that are visible to the frames that follow.

    Args:
        token_at (`torch.LongTensor` of shape `(groups, places)`):
            Index in `tokens` of the token at each place, -1 where nothing has been kept.
        tokens (`torch.LongTensor` of shape `(visible,)`):
            Ascending indices of the visible tokens among the keys of the call that returned this canvas: first the tokens of
            the canvas before, then those of the packed sequence.
    """

    token_at: torch.Tensor
    tokens: torch.Tensor


def tokens_at_places(token_of_patch: torch.Tensor, patch_at: torch.Tensor) -> torch.Tensor:
    """
    Finds the token at every place of a frame: that of the finest kept patch there.

    Args:
        token_of_patch (`torch.LongTensor` of shape `(.., patches)`):
            The token of each patch of all scales, -1 for patches that were not kept.
        patch_at (`torch.LongTensor` of shape `(scales, places)`):
            The patch of each scale, coarse to fine, at each place; see [`GazeGrid.patches_at`].

    Returns:
        `torch.LongTensor` of shape `(.., places)`: tokens, -1 where no patch was kept.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.canvas import tokens_at_places

    >>> patch_at = torch.tensor([[0, 0], [1, 2]])  # one patch over both places, or one patch each
    >>> tokens_at_places(torch.tensor([[5, -1, 6], [-1, 7, -1]]), patch_at).tolist()
    [[5, 6], [7, -1]]

    ```
    """
    token_at = token_of_patch[..., patch_at[0]]
    for patches in patch_at[1:]:
        finer = token_of_patch[..., patches]
        token_at = torch.where(finer >= 0, finer, token_at)
    return token_at


def plan_canvas(
    token_at: torch.Tensor, first_token: torch.Tensor, num_tokens: torch.Tensor, canvas: Canvas | None = None
) -> tuple[PackedAttention, Canvas]:
    """
    Plans attention to the canvas over groups of frames in one packed sequence.

    A group has one canvas: it is a clip, or a window of a video. The tokens of a group at one time are one segment of the
    sequence, and segments of a group are in order of time. A segment's keys are its own tokens and the distinct latest tokens
    at the places where it has none. If no segment has keys beyond its own, this is the plan of `"frame"`.

    Args:
        token_at (`torch.LongTensor` of shape `(groups, times, places)`):
            Token of the sequence at each place, -1 for none. Groups with fewer times are padded by -1.
        first_token, num_tokens (`torch.LongTensor` of shape `(groups, times)`):
            First token of each segment in the sequence, and number of its tokens, including those at no place. The segments
            fill the sequence; those without tokens are left out.
        canvas ([`Canvas`], *optional*):
            The canvas of earlier frames of the same groups. The keys of its tokens come before those of the sequence.

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
    key_at = torch.where(token_at < 0, -1, token_at + num_before)
    latest = torch.cat([before[:, None], key_at], dim=1).cummax(1).values
    end, latest = latest[:, -1], latest[:, 1:]

    # Segments in the order of the sequence, and the index of each in this order.
    segment = (num_tokens > 0).flatten().nonzero().squeeze(1)
    segment = segment[first_token.flatten()[segment].argsort()]
    rank = torch.zeros_like(num_tokens).flatten()
    rank[segment] = torch.arange(len(segment), device=rank.device)
    num_queries = num_tokens.flatten()[segment]
    ends = num_queries.cumsum(0)
    own = torch.arange(int(num_queries.sum()), device=rank.device)

    is_visible = (token_at < 0) & (latest >= 0) & (num_tokens > 0)[..., None]
    if not num_before and not is_visible.any():
        plan = PackedAttention(num_queries, ends - num_queries, ends)
    else:
        # One number encodes a segment and a key: `unique` drops repeated keys of a segment and sorts by segments.
        base = num_before + len(own)
        visible = (rank.view_as(num_tokens)[..., None] * base + latest)[is_visible]
        own = torch.arange(len(segment), device=own.device).repeat_interleave(num_queries) * base + own + num_before
        pairs = torch.cat([visible, own]).unique()
        num_keys = torch.bincount(pairs // base, minlength=len(segment))
        key_ends = num_keys.cumsum(0)
        group = segment // num_tokens.shape[1]
        plan = PackedAttention(num_queries, key_ends - num_keys, key_ends, key_index=pairs % base, group=group)

    tokens = end[end >= 0].unique()
    return plan, Canvas(torch.where(end < 0, -1, torch.searchsorted(tokens, end.contiguous())), tokens)
