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
    merge = tower.spatial_merge_size
    device = tower.patch_embed.proj.weight.device
    places = UnitPlaces(*(of_unit[is_kept].to(device) for of_unit in locate_units(grid_thw, merge)))
    frames = torch.stack([places.video, places.time])
    windows, order = frames, torch.arange(len(places.video), device=device)
    whole_frame_layers = range(len(tower.blocks))
    if hasattr(tower, "fullatt_block_indexes"):
        whole_frame_layers = tower.fullatt_block_indexes
        side = tower.window_size // merge // tower.patch_size
        windows = torch.stack([places.video, places.time, places.row // side, places.col // side])
        for key in reversed(windows):
            order = order[torch.argsort(key[order], stable=True)]
    places = UnitPlaces(*(of_unit[order] for of_unit in places))
    frame_ends, window_ends = (_segment_ends(keys[:, order]) for keys in (frames, windows))

    units = is_kept.nonzero().flatten().to(pixel_values.device)[order.to(pixel_values.device)]
    patches = pixel_values.unflatten(0, (-1, merge * merge))[units].flatten(0, 1)
    hidden_states = tower.patch_embed(patches.to(device))
    # The patches of a unit, row by row: (units, merge * merge).
    inside = torch.arange(merge * merge, device=device)
    rows = (places.row[:, None] * merge + inside // merge).flatten()
    cols = (places.col[:, None] * merge + inside % merge).flatten()
    if hasattr(tower, "pos_embed"):
        video = places.video.repeat_interleave(merge * merge)
        hidden_states = hidden_states + _learned_positions(tower, grid_thw, video, rows, cols).to(hidden_states.dtype)
    angles = torch.stack([rows, cols], dim=-1)[..., None].float() * tower.rotary_pos_emb.inv_freq.to(device).float()
    angles = angles.flatten(1).repeat(1, 2)
    position_embeddings = (angles.cos(), angles.sin())

    deepstack = []
    for number, block in enumerate(tower.blocks):
        hidden_states = block(
            hidden_states,
            cu_seqlens=(frame_ends if number in whole_frame_layers else window_ends) * merge * merge,
            position_embeddings=position_embeddings,
        )
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(number)]
            deepstack.append(merger(hidden_states))
    back = torch.argsort(order)
    return tower.merger(hidden_states)[back], [features[back] for features in deepstack]


def _segment_ends(keys: torch.Tensor) -> torch.Tensor:
    """Gives 0 and the ends of the runs of equal columns in `(keys, units)`, as attention over packed sequences wants."""
    counts = torch.unique_consecutive(keys, dim=1, return_counts=True)[1]
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _learned_positions(
    tower: nn.Module, grid_thw: torch.Tensor, video: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Reads the position table, resized to the grid of each patch's video, at the rows and columns of patches."""
    side = tower.num_grid_per_side
    table = tower.pos_embed.weight.view(1, side, side, -1).permute(0, 3, 1, 2)
    positions = table.new_empty(len(video), table.shape[1])
    for height, width in {(height, width) for _, height, width in grid_thw.tolist()}:
        resized = F.interpolate(table, (height, width), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        is_here = ((grid_thw[:, 1] == height) & (grid_thw[:, 2] == width)).to(video.device)[video]
        positions = positions.masked_scatter(is_here[:, None], resized[rows[is_here], cols[is_here]])
    return positions
