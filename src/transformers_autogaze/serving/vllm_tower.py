"""
Runs vLLM's vision towers of Qwen2.5-VL and Qwen3-VL on the kept merge units alone.

This module calls the layers of these towers. Positions and attention are planned by [`plan_units`], as for the towers of
transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models.utils import cast_overflow_tensors

from ..integrations.packed_attention import PackedAttention, attend
from ..integrations.qwen_vl_tower import learned_positions, plan_units


def encode_kept_units(
    tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor, is_kept: torch.Tensor
) -> torch.Tensor:
    """
    Runs the tower on the kept merge units alone, as [`encode_units`] does with `attention="canvas"`.

    Args:
        tower (`nn.Module`): a `Qwen2_5_VisionTransformer` or a `Qwen3_VisionTransformer` of vLLM.
        pixel_values (`torch.Tensor` of shape `(patches, channels * temporal_patch_size * patch_size**2)`):
            The patches of the kept units, in the order of tokens.
        grid_thw (`torch.LongTensor` of shape `(videos, 3)`): patches of the whole videos in time, height and width.
        is_kept (`torch.BoolTensor` of shape `(units,)`): which of all units are kept, at least one.

    Returns:
        `torch.FloatTensor` of shape `(kept, features)`: the outputs of the tower for these units, as many features as vLLM's own
        tower gives: `out_hidden_size`, and as many more for each deepstack layer of Qwen3-VL.
    """
    device = tower.device
    plan = plan_units(tower, grid_thw, is_kept, "canvas").to(device)
    hidden_states = tower.patch_embed(tower.input_norm(plan.sort(pixel_values.to(device)), tower.dtype))
    if hasattr(tower, "pos_embed"):
        hidden_states = hidden_states + learned_positions(plan, grid_thw, partial(_frame_positions, tower))
    places = torch.stack([plan.rows, plan.cols], dim=-1)
    cos, sin = (table[places].flatten(1) for table in tower.rotary_pos_emb.get_cos_sin(int(grid_thw[:, 1:].max())))
    hidden_states = hidden_states.unsqueeze(1)

    deepstack = []
    for number, block in enumerate(tower.blocks):
        with _attending(block.attn.attn, plan.attention(tower, number)):
            # Not through `__call__`, which may be compiled with the attention of whole frames.
            hidden_states = block.forward(
                hidden_states,
                cu_seqlens=None,
                rotary_pos_emb_cos=cos,
                rotary_pos_emb_sin=sin,
                max_seqlen=None,
                sequence_lengths=None,
            )
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)]
            deepstack.append(merger(hidden_states))
    if hasattr(tower, "fullatt_block_indexes") and hidden_states.dtype == torch.float16:
        hidden_states = cast_overflow_tensors(hidden_states)
    return plan.restore(torch.cat([tower.merger(hidden_states), *deepstack], dim=1))


@contextmanager
def _attending(attention: Any, plan: PackedAttention) -> Iterator[None]:
    """Replaces the attention of a layer, between its projections, by that of a plan."""

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        return attend(attention, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), plan)

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward


def _frame_positions(tower: Any, rows: int, cols: int) -> torch.Tensor:
    """Gives the learned positions of a frame, `(rows, cols, hidden_size)`, as the tower itself interpolates them."""
    merge = tower.spatial_merge_size
    positions = tower.fast_pos_embed_interpolate([[1, rows, cols]])
    positions = positions.view(rows // merge, cols // merge, merge, merge, -1)
    return positions.transpose(1, 2).reshape(rows, cols, -1)
