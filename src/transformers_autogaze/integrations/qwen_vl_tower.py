"""
The vision towers of Qwen2.5-VL and Qwen3-VL on some of their merge units.

This module knows the layers of these towers. Where units lie is `qwen_vl_units`' matter; which of them are kept, and what
becomes of their tokens, its caller's.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .qwen_vl_units import UnitPlaces, locate_units


def encode_units(
    tower: nn.Module, pixel_values: torch.Tensor, grid_thw: torch.Tensor, is_kept: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Runs the tower on the kept merge units alone.

    Every unit keeps the rotary positions, the learned position (Qwen3-VL) and the window (Qwen2.5-VL) that it has in the
    whole video. As in the tower, a unit attends to those of its own pair of frames, or of its window there; what was not
    kept is embedded nowhere. With all units kept, this is what the tower itself gives.

    Args:
        tower (`nn.Module`): a `Qwen2_5_VisionTransformerPretrainedModel` or a `Qwen3VLVisionModel`.
        pixel_values (`torch.FloatTensor` of shape `(patches, channels * temporal_patch_size * patch_size**2)`):
            All patches of all videos, as the processor gives them.
        grid_thw (`torch.LongTensor` of shape `(videos, 3)`): as in [`locate_units`].
        is_kept (`torch.BoolTensor` of shape `(units,)`): which units to encode, at least one.

    Returns:
        `tuple`: `torch.FloatTensor` of shape `(kept, out_hidden_size)`, in the order of their tokens, and a `list` of as
        many more of them for the first layers of the language model (Qwen3-VL's deepstack; empty for Qwen2.5-VL).
    """
    merge, device = tower.spatial_merge_size, pixel_values.device
    is_kept = is_kept.to(device)
    places = UnitPlaces(*(of_unit[is_kept] for of_unit in locate_units(grid_thw.to(device), merge)))
    order, frame_ends, window_ends = _sort_by_window(tower, places)
    units = is_kept.nonzero().flatten()[order]
    patches = pixel_values.unflatten(0, (-1, merge * merge))[units].flatten(0, 1)

    weight = tower.patch_embed.proj.weight
    # Where accelerate brings in the weights of every module when it runs, they are nowhere before.
    hidden_states = tower.patch_embed(patches if weight.is_meta else patches.to(weight.device))
    device = hidden_states.device
    places = UnitPlaces(*(of_unit[order].to(device) for of_unit in places))
    # The patches of a unit, row by row: (units, merge * merge).
    inside = torch.arange(merge * merge, device=device)
    rows = (places.row[:, None] * merge + inside // merge).flatten()
    cols = (places.col[:, None] * merge + inside % merge).flatten()
    if hasattr(tower, "pos_embed"):
        video = places.video.repeat_interleave(merge * merge)
        hidden_states = hidden_states + _learned_positions(tower, grid_thw, video, rows, cols).to(hidden_states)
    angles = torch.stack([rows, cols], dim=-1)[..., None].float() * tower.rotary_pos_emb.inv_freq.to(device).float()
    angles = angles.flatten(1).repeat(1, 2)
    position_embeddings = (angles.cos(), angles.sin())

    deepstack = []
    for number, block in enumerate(tower.blocks):
        sees_frame = number in getattr(tower, "fullatt_block_indexes", (number,))
        ends = (frame_ends if sees_frame else window_ends).to(device) * merge * merge
        hidden_states = block(hidden_states, cu_seqlens=ends, position_embeddings=position_embeddings)
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(number)]
            deepstack.append(merger(hidden_states))  # in the order of tokens, for there are no windows here
    features = tower.merger(hidden_states)
    return features[torch.argsort(order).to(features.device)], deepstack


def _sort_by_window(tower: nn.Module, places: UnitPlaces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives the order of units in which windows lie together, and where frames and windows end in it."""
    frames = torch.stack([places.video, places.time])
    order = torch.arange(len(places.video), device=places.video.device)
    if not hasattr(tower, "window_size"):
        return order, _segment_ends(frames), _segment_ends(frames)
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size
    windows = torch.cat([frames, torch.stack([places.row // side, places.col // side])])
    for key in reversed(windows):
        order = order[torch.argsort(key[order], stable=True)]
    return order, _segment_ends(frames[:, order]), _segment_ends(windows[:, order])


def _segment_ends(keys: torch.Tensor) -> torch.Tensor:
    """Gives 0 and the ends of the runs of equal columns in `(keys, units)`, as attention over packed sequences wants."""
    counts = torch.unique_consecutive(keys, dim=1, return_counts=True)[1]
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _learned_positions(
    tower: nn.Module, grid_thw: torch.Tensor, video: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Reads the position table, resized to the grid of each patch's video, at the rows and columns of patches."""
    side = tower.num_grid_per_side
    table = tower.pos_embed(torch.arange(side * side, device=video.device)).view(1, side, side, -1).permute(0, 3, 1, 2)
    positions = table.new_empty(len(video), table.shape[1])
    for height, width in {(height, width) for _, height, width in grid_thw.tolist()}:
        resized = F.interpolate(table, (height, width), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        is_here = ((grid_thw[:, 1] == height) & (grid_thw[:, 2] == width)).to(table.device)[video]
        positions = positions.masked_scatter(is_here[:, None], resized[rows[is_here], cols[is_here]])
    return positions
