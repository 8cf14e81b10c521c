"""
NVILA-HD-Video with a selector of this package instead of the one in its published processor.

Gazes have the attributes and keys of that processor and its model (docs/specification.md, section 11), which are not part of
this package.
"""

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..selection_autogaze import GazeSelector
from ..video.tiles import slice_setting


_METHOD = "_get_gazing_info_from_videos"
_KINDS = ("tiles", "thumbnails")
_FIELDS = ("gazing_pos", "num_gazing_each_frame", "if_padded_gazing")
_SETTINGS = ("gazing_ratio_tile", "task_loss_requirement_tile", "gazing_ratio_thumbnail", "max_batch_size_autogaze")
_SCALES = (56, 112, 196, 392)
_PATCH_SIZE = 14


def attach(processor: Any, gaze_model: GazeSelector) -> None:
    """
    Replaces the selector in NVILA-HD-Video's processor.

    The processor then gazes with the new selector, by its own settings at the time of the call: `gazing_ratio_tile`,
    `task_loss_requirement_tile`, the same two for thumbnails, and `max_batch_size_autogaze`, the clips in a batch. The
    outputs have the keys, shapes and types that the MLLM expects. A frame has the same number of slots in every clip of a
    call, and unused slots are marked as padding. With a ratio of 1 and no threshold everything is kept, and the selector is
    not called.

    Args:
        processor:
            The published processor, or an object with its interface. It is changed in place: its attribute
            `_autogaze_model` and its method `_get_gazing_info_from_videos` are set. Without `target_scales` and
            `target_patch_size`, those of the published MLLM are used: 56, 112, 196 and 392 pixels, and 14.
        gaze_model ([`GazeSelector`]):
            The selector, with as many scales as the processor, such as [`AutoGazeModel`] or [`GreedyGazeSelector`].

    Raises:
        ValueError: if the processor has another interface, or the selector cannot gaze for its scales.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> from transformers_autogaze import GreedyGazeSelector
    >>> from transformers_autogaze.integrations.nvila import attach

    >>> processor = SimpleNamespace(  # instead of the published one
    ...     _autogaze_model=None,
    ...     _get_gazing_info_from_videos=None,
    ...     gazing_ratio_tile=[0.2, 0.06],
    ...     task_loss_requirement_tile=None,
    ...     gazing_ratio_thumbnail=1,
    ...     max_batch_size_autogaze=2,
    ... )
    >>> attach(processor, GreedyGazeSelector())
    >>> videos_inputs = {
    ...     "pixel_values_videos_tiles_autogaze": [torch.zeros(3, 2, 3, 392, 392)],
    ...     "pixel_values_videos_thumbnails_autogaze": [torch.zeros(1, 1, 3, 392, 392)],
    ... }
    >>> info = processor._get_gazing_info_from_videos(videos_inputs)
    >>> info["gazing_pos_tiles"][0].shape, info["num_gazing_each_frame_tiles"][0].tolist()
    (torch.Size([3, 275]), [[212, 63], [212, 63], [212, 63]])
    >>> info["gazing_pos_thumbnails"][0].shape
    torch.Size([1, 1060])

    ```
    """
    missing = [name for name in ("_autogaze_model", _METHOD, *_SETTINGS) if not hasattr(processor, name)]
    if missing:
        raise ValueError(
            f"`processor` must be NVILA-HD-Video's, got {type(processor).__name__} without {', '.join(missing)}"
        )
    if not hasattr(gaze_model, "generate") or not hasattr(getattr(gaze_model, "config", None), "grid"):
        raise ValueError(f"`gaze_model` must be a GazeSelector, got {type(gaze_model).__name__}")
    grid = _target_grid(processor)
    try:
        grid.tile_layout(gaze_model.config.grid)
    except ValueError as error:
        raise ValueError(f"`gaze_model` with {gaze_model.config.grid} cannot gaze for {grid}: {error}") from error
    processor._autogaze_model = gaze_model
    setattr(processor, _METHOD, MethodType(_get_gazing_info_from_videos, processor))


def gaze_to_nvila(tiles: GazeOutput, thumbnails: GazeOutput) -> dict[str, torch.Tensor]:
    """
    Converts the gazes at one video to NVILA-HD-Video's format.

    Args:
        tiles ([`GazeOutput`]): the gaze at its tiles, one clip per tile.
        thumbnails ([`GazeOutput`]): the gaze at its thumbnails.

    Returns:
        `dict` with `gazing_pos_tiles` (`torch.LongTensor` of shape `(tiles, N)`), `num_gazing_each_frame_tiles`
        (`torch.LongTensor` of shape `(tiles, frames)`, equal for all tiles), `if_padded_gazing_tiles` (`torch.BoolTensor`
        of shape `(tiles, N)`), and the same three for the thumbnails.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.integrations.nvila import gaze_to_nvila, nvila_to_gaze

    >>> grid = GazeGrid([14, 28], patch_size=14)
    >>> masks = [torch.tensor([[[True]], [[False]]]), torch.tensor([[[False] * 4], [[True, False, False, False]]])]
    >>> tiles = GazeOutput.from_masks(masks, grid)
    >>> info = gaze_to_nvila(tiles, thumbnails=tiles.select(0))
    >>> info["gazing_pos_tiles"].tolist(), info["num_gazing_each_frame_tiles"].tolist()
    ([[0], [1]], [[1], [1]])
    >>> nvila_to_gaze(info, grid)[0].gazing_pos.equal(tiles.gazing_pos)
    True

    ```
    """
    return {**_to_tensors(tiles, "tiles"), **_to_tensors(thumbnails, "thumbnails")}


def nvila_to_gaze(info: Mapping[str, torch.Tensor], grid: GazeGrid) -> tuple[GazeOutput, GazeOutput]:
    """
    Reads the gazes at one video from NVILA-HD-Video's format; the inverse of [`gaze_to_nvila`].

    Args:
        info (`Mapping[str, torch.Tensor]`):
            The six tensors of one video. The processor's outputs have a list of these for all videos.
        grid ([`GazeGrid`]): the scales and the patch size of the gazes.

    Returns:
        `tuple[GazeOutput, GazeOutput]`: the gazes at its tiles and at its thumbnails.

    Raises:
        ValueError: if a key is missing, or its shapes or counts do not agree.
    """
    gazes = []
    for kind in _KINDS:
        missing = [f"{field}_{kind}" for field in _FIELDS if f"{field}_{kind}" not in info]
        if missing:
            raise ValueError(f"`info` must have the keys of one video, got none of the name {', '.join(missing)}")
        ids, counts, is_padding = (info[f"{field}_{kind}"] for field in _FIELDS)
        if not isinstance(ids, torch.Tensor):
            raise ValueError(f"`info['gazing_pos_{kind}']` must be the tensor of one video, got {type(ids).__name__}")
        if not (counts == counts[:1]).all() or ids.shape != is_padding.shape or ids.shape[1] != int(counts[0].sum()):
            raise ValueError(
                f"`info['num_gazing_each_frame_{kind}']` must be the same for every clip and add up to the slots of "
                f"`gazing_pos_{kind}` and `if_padded_gazing_{kind}`, got {counts.tolist()} for {tuple(ids.shape)} and "
                f"{tuple(is_padding.shape)}"
            )
        gazes.append(GazeOutput.from_ids(ids, is_padding.bool(), counts[0], grid))
    return gazes[0], gazes[1]


def _get_gazing_info_from_videos(processor: Any, videos_inputs: Mapping[str, Any]) -> dict[str, list] | None:
    """Gazes at the tiles and thumbnails of videos; returns a list over videos for every key, `None` without videos."""
    if not videos_inputs.get("pixel_values_videos_tiles_autogaze"):
        return None
    info = {}
    for kind in _KINDS:
        info.update(_gaze_at(processor, videos_inputs[f"pixel_values_videos_{kind}_autogaze"], kind))
    return info


def _gaze_at(processor: Any, videos: Sequence[torch.Tensor], kind: str) -> dict[str, list[torch.Tensor]]:
    """Gazes at clips `(clips, frames, channels, height, width)` of each video by the processor's settings."""
    name, grid = kind.removesuffix("s"), _target_grid(processor)
    ratio = getattr(processor, f"gazing_ratio_{name}")
    threshold = getattr(processor, f"task_loss_requirement_{name}", None)
    by_length: dict[int, list[int]] = {}
    for index, video in enumerate(videos):
        by_length.setdefault(video.shape[1], []).append(index)
    info: dict[str, dict[int, torch.Tensor]] = {}
    for num_frames, indices in by_length.items():
        # A sequence has values for the longest clips.
        settings = [slice_setting(setting, 0, num_frames) for setting in (ratio, threshold)]
        gaze = _gaze_in_batches(processor, [clip for index in indices for clip in videos[index]], grid, *settings)
        for key, value in _to_tensors(gaze, kind).items():
            parts = value.split([len(videos[index]) for index in indices])
            info.setdefault(key, {}).update(zip(indices, parts, strict=True))
    return {key: [values[index] for index in range(len(videos))] for key, values in info.items()}


def _to_tensors(gaze: GazeOutput, kind: str) -> dict[str, torch.Tensor]:
    return {
        # The padding of a first frame may have the id -1, which is not a valid index.
        f"gazing_pos_{kind}": gaze.gazing_pos.clamp(min=0),
        f"num_gazing_each_frame_{kind}": gaze.num_gazing_each_frame.repeat(gaze.batch_size, 1),
        f"if_padded_gazing_{kind}": gaze.if_padded_gazing,
    }


def _gaze_in_batches(
    processor: Any, clips: list[torch.Tensor], grid: GazeGrid, ratio: Any, threshold: Any
) -> GazeOutput:
    """Gazes at clips `(frames, channels, height, width)` of one length; a frame has the same slots in all of them."""
    selector, batch_size = processor._autogaze_model, processor.max_batch_size_autogaze
    rate = selector.config.frame_sampling_rate
    if threshold is None and ratio is not None and np.all(np.asarray(ratio) == 1):
        shape = (len(clips), len(clips[0]) // rate)
        masks = [clips[0].new_ones(*shape, count, dtype=torch.bool) for count in grid.num_patches_each_scale]
        return GazeOutput.from_masks(masks, grid, rate)
    target = {}
    if selector.config.grid != grid:
        target = {"target_scales": grid.scales, "target_patch_size": grid.patch_size}
    parts = []
    for first in range(0, len(clips), batch_size):
        # Clips are stacked batch by batch, as the tiles of a long video take gigabytes.
        frames = torch.stack(clips[first : first + batch_size])
        frames = frames.to(getattr(selector, "device", "cpu"), torch.promote_types(frames.dtype, torch.float32))
        gaze = selector.generate(frames, ratio, threshold, **target)
        parts.append([mask.to(clips[0].device) for mask in gaze.gazing_mask])
    return GazeOutput.from_masks([torch.cat(masks) for masks in zip(*parts, strict=True)], grid, rate)


def _target_grid(processor: Any) -> GazeGrid:
    return GazeGrid(
        list(getattr(processor, "target_scales", _SCALES)), getattr(processor, "target_patch_size", _PATCH_SIZE)
    )
