"""The vision towers of Qwen2.5-VL and Qwen3-VL on some of their merge units."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .canvas import plan_canvas
from .packed_attention import PackedAttention, packed_attention, run_checkpointed
from .qwen_vl_units import UnitPlaces, locate_units


UNIT_ATTENTION_CHOICES = ("canvas", "frame")


class UnitPlan(NamedTuple):
    """
    The order of the kept merge units in a tower's sequence, the positions of their patches, and the attention.

    Args:
        order (`torch.LongTensor` of shape `(kept,)`):
            The kept units in the order of the tower's sequence, as indices among the kept units in the order of tokens.
        video (`torch.LongTensor` of shape `(patches,)`): index of each patch's video in `grid_thw`.
        rows, cols (`torch.LongTensor` of shape `(patches,)`): row and column of each patch in its frame.
        frames, windows ([`PackedAttention`]): attention in layers with full attention and with window attention.
    """

    order: torch.Tensor
    video: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    frames: PackedAttention
    windows: PackedAttention

    def to(self, device: torch.device) -> "UnitPlan":
        """Moves the plan to a device."""
        return UnitPlan._make(part.to(device) for part in self)

    def sort(self, patches: torch.Tensor) -> torch.Tensor:
        """Sorts the patches `(patches, ..)` of the kept units from the order of tokens to that of the sequence."""
        order = self.order.to(patches.device)
        return patches.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    def restore(self, features: torch.Tensor) -> torch.Tensor:
        """Sorts the tower's outputs `(kept, ..)` back to the order of tokens."""
        return features[torch.argsort(self.order).to(features.device)]

    def attention(self, tower: nn.Module, layer: int) -> PackedAttention:
        """Returns the attention of a layer."""
        return self.frames if layer in getattr(tower, "fullatt_block_indexes", (layer,)) else self.windows


def plan_units(tower: Any, grid_thw: torch.Tensor, is_kept: torch.Tensor, attention: str) -> UnitPlan:
    """
    Plans the computation of a tower on the kept merge units.

    Args:
        tower (`nn.Module`):
            A tower of transformers, or of an inference engine, with the attribute `spatial_merge_size` and, if it has window
            attention, `window_size`, `patch_size` and `fullatt_block_indexes`.
        grid_thw, is_kept, attention: as in [`encode_units`].

    Returns:
        [`UnitPlan`], on the device of `is_kept`.
    """
    merge, device = tower.spatial_merge_size, is_kept.device
    places = UnitPlaces(*(coordinate[is_kept] for coordinate in locate_units(grid_thw.to(device), merge)))
    order, window = _sort_by_window(tower, places)
    places = UnitPlaces(*(coordinate[order] for coordinate in places))
    window = [coordinate[order] for coordinate in window]
    # The patches of a unit, row by row.
    inside = torch.arange(merge * merge, device=device)
    return UnitPlan(
        order=order,
        video=places.video.repeat_interleave(merge * merge),
        rows=(places.row[:, None] * merge + inside // merge).flatten(),
        cols=(places.col[:, None] * merge + inside % merge).flatten(),
        frames=_plan_attention(places, [], attention, merge * merge),
        windows=_plan_attention(places, window, attention, merge * merge),
    )


def encode_units(
    tower: Any,
    pixel_values: torch.Tensor,
    grid_thw: torch.Tensor,
    is_kept: torch.Tensor,
    attention: str = "canvas",
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Encodes the kept merge units with the tower.

    Every unit has the rotary positions, the learned position (Qwen3-VL) and the window (Qwen2.5-VL) that it has in the
    whole video. As in the tower, a unit attends to the kept units of its own pair of frames, or of its window there. Dropped
    units are not embedded. If all units are kept, the outputs are those of the tower itself, to the bit.

    Args:
        tower (`nn.Module`): a `Qwen2_5_VisionTransformerPretrainedModel` or a `Qwen3VLVisionModel`.
        pixel_values (`torch.FloatTensor` of shape `(patches, channels * temporal_patch_size * patch_size**2)`):
            All patches of all videos, as the processor returns them.
        grid_thw (`torch.LongTensor` of shape `(videos, 3)`): as in [`locate_units`].
        is_kept (`torch.BoolTensor` of shape `(units,)`): which units to encode, at least one.
        attention (`str`, *optional*, defaults to `"canvas"`):
            `"canvas"`: where its pair of frames kept nothing, a unit attends to the latest unit kept there before, of the
            frame or of its window; `"frame"`: it does not.

    Returns:
        `tuple`: features, a `torch.FloatTensor` of shape `(kept, out_hidden_size)`, in the order of tokens, and a `list` of
        such features for the first layers of the language model (Qwen3-VL's deepstack; empty for Qwen2.5-VL).
    """
    merge = tower.spatial_merge_size
    is_kept = is_kept.to(pixel_values.device)
    plan = plan_units(tower, grid_thw, is_kept, attention)
    patches = plan.sort(pixel_values.unflatten(0, (-1, merge * merge))[is_kept].flatten(0, 1))

    weight = tower.patch_embed.proj.weight
    # Weights that accelerate has offloaded are loaded when the module is called.
    hidden_states = tower.patch_embed(patches if weight.is_meta else patches.to(weight.device))
    plan = plan.to(hidden_states.device)
    if hasattr(tower, "pos_embed"):
        table = tower.pos_embed(torch.arange(tower.num_grid_per_side**2, device=hidden_states.device))
        positions = learned_positions(plan, grid_thw, partial(_resize_positions, table))
        hidden_states = hidden_states + positions.to(hidden_states)
    frequencies = tower.rotary_pos_emb.inv_freq.to(hidden_states.device).float()
    angles = torch.stack([plan.rows, plan.cols], dim=-1)[..., None].float() * frequencies
    angles = angles.flatten(1).repeat(1, 2)
    position_embeddings = (angles.cos(), angles.sin())

    deepstack = []
    for index, block in enumerate(tower.blocks):
        hidden_states = _run_block(block, hidden_states, plan.attention(tower, index), position_embeddings)
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(index)]
            deepstack.append(merger(hidden_states))  # in the order of tokens, as Qwen3-VL has no windows
    return plan.restore(tower.merger(hidden_states)), deepstack


def _sort_by_window(tower: Any, places: UnitPlaces) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the order of units sorted by window, and the rows and columns of their windows, if there are any."""
    order = torch.arange(len(places.video), device=places.video.device)
    if not hasattr(tower, "window_size"):
        return order, []
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size
    window = [places.row // side, places.col // side]
    for key in (*reversed(window), places.time, places.video):
        order = order[torch.argsort(key[order], stable=True)]
    return order, window


def _plan_attention(
    places: UnitPlaces, window: list[torch.Tensor], attention: str, patches_of_unit: int
) -> PackedAttention:
    """Plans the attention of patches, for units sorted by frame, or by window."""
    # A group is a video, or one window of it, and has one canvas. Its units of one time are a segment of the sequence.
    group = _rank([places.video, *window])
    num_groups, num_times = int(group.max()) + 1, int(places.time.max()) + 1
    segment, counts = torch.unique_consecutive(group * num_times + places.time, return_counts=True)
    ends = counts.cumsum(0)
    plan = PackedAttention(counts, ends - counts, ends)
    if attention == "canvas":
        first_token, num_tokens = counts.new_zeros(2, num_groups * num_times)
        first_token[segment], num_tokens[segment] = ends - counts, counts
        # Places are counted in each group, without those where no unit is ever kept.
        place = _rank([group, places.row, places.col])
        first_place = place.new_full((num_groups,), len(place)).scatter_reduce(0, group, place, "amin")
        place = place - first_place[group]
        token_at = place.new_full((num_groups, num_times, int(place.max()) + 1), -1)
        token_at[group, places.time, place] = torch.arange(len(place), device=place.device)
        shape = num_groups, num_times
        plan, _ = plan_canvas(token_at, first_token.view(shape), num_tokens.view(shape))
    inside = torch.arange(patches_of_unit, device=group.device)
    return PackedAttention(
        plan.num_queries * patches_of_unit,
        plan.first_key * patches_of_unit,
        plan.end_key * patches_of_unit,
        key_index=None if plan.key_index is None else (plan.key_index[:, None] * patches_of_unit + inside).flatten(),
        group=plan.group,
    )


def _rank(keys: list[torch.Tensor]) -> torch.Tensor:
    """Returns the ranks `(units,)` of units sorted by several keys `(units,)`; units with equal keys have the same rank."""
    combined = keys[0]
    for key in keys[1:]:
        combined = combined * (key.max() + 1) + key
    return combined.unique(return_inverse=True)[1]


def _run_block(
    block: nn.Module,
    hidden_states: torch.Tensor,
    plan: PackedAttention,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Runs one block of the tower on patches `(patches, hidden)`."""
    ends = F.pad(plan.end_key, (1, 0)).to(torch.int32)
    if plan.key_index is None:  # the tower's own attention
        return block(hidden_states, cu_seqlens=ends, position_embeddings=position_embeddings)
    # The plan splits the sequence, not the block.
    whole = ends.new_tensor([0, len(hidden_states)])

    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        with packed_attention(block, plan):
            return block(hidden_states, cu_seqlens=whole, position_embeddings=position_embeddings)

    return run_checkpointed(block, run, hidden_states)


def learned_positions(
    plan: UnitPlan, grid_thw: torch.Tensor, positions_of: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """
    Gathers the learned position embeddings of a plan's patches.

    Args:
        plan ([`UnitPlan`]): the plan.
        grid_thw (`torch.LongTensor` of shape `(videos, 3)`): as in [`encode_units`].
        positions_of (`Callable[[int, int], torch.Tensor]`):
            Returns the position embeddings `(rows, cols, hidden_size)` of a frame of `rows` and `cols` patches.

    Returns:
        `torch.FloatTensor` of shape `(patches, hidden_size)`
    """
    positions = None
    for height, width in {(height, width) for _, height, width in grid_thw.tolist()}:
        table = positions_of(height, width)
        positions = table.new_empty(len(plan.video), table.shape[-1]) if positions is None else positions
        is_size = ((grid_thw[:, 1] == height) & (grid_thw[:, 2] == width)).to(table.device)[plan.video]
        positions = positions.masked_scatter(is_size[:, None], table[plan.rows[is_size], plan.cols[is_size]])
    return positions


def _resize_positions(table: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Resizes a square table of position embeddings, `(places, hidden_size)`, to `(rows, cols, hidden_size)`."""
    side = math.isqrt(len(table))
    table = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(table, (rows, cols), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
