"""Selecting, stacking and concatenating gazes; the public methods are those of [`GazeOutput`] in `gazing_autogaze`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .gazing_autogaze import GazeOutput

_OF_SLOTS = ("log_action_probs", "task_loss_prediction")
_OF_FRAMES = ("task_loss_requirement", "clip_num_gazing_each_frame")


def select_clip(gaze: "GazeOutput", clip: int) -> "GazeOutput":
    """Returns one clip of a batch; see [`GazeOutput.select`]."""
    if not -gaze.batch_size <= clip < gaze.batch_size:
        raise ValueError(f"`clip` must lie in 0..{gaze.batch_size - 1}, got {clip}")
    clip %= gaze.batch_size
    counts = gaze.num_gazing_each_frame
    if gaze.clip_num_gazing_each_frame is not None:
        counts = gaze.clip_num_gazing_each_frame[clip]
    own = _place_in_frame(gaze) < counts[gaze.frame_of_slot]
    return gaze.replace(
        **{
            key: gaze[key][clip : clip + 1, own]
            for key in ("gazing_pos", "if_padded_gazing", *_OF_SLOTS)
            if gaze.get(key) is not None
        },
        **{key: gaze[key][clip : clip + 1] for key in _OF_FRAMES if gaze.get(key) is not None},
        num_gazing_each_frame=counts,
        gazing_mask=[mask[clip : clip + 1] for mask in gaze.gazing_mask],
        cache=None,
    )


def stack_gazes(gazes: Sequence["GazeOutput"]) -> "GazeOutput":
    """Stacks clips of equal length to a batch; see [`GazeOutput.stack`]."""
    first = _check_alike(gazes, ("scales", "patch_size", "frame_sampling_rate", "num_frames"))
    counts = torch.stack([gaze.num_gazing_each_frame for gaze in gazes]).amax(0)
    starts = counts.cumsum(0) - counts
    frame = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    # The padding of a frame is the id before its first, as in `GazeGrid.ids_from_masks`.
    padding = frame * first.num_vision_tokens_each_frame - 1

    def stacked(key: str, empty: torch.Tensor) -> torch.Tensor | None:
        if any(gaze.get(key) is None for gaze in gazes):
            return None
        parts = []
        for gaze in gazes:
            part = empty.to(gaze[key].dtype).expand(gaze.batch_size, -1).clone()
            part[:, starts[gaze.frame_of_slot] + _place_in_frame(gaze)] = gaze[key]
            parts.append(part)
        return torch.cat(parts)

    def of_frames(key: str) -> torch.Tensor | None:
        return None if any(gaze.get(key) is None for gaze in gazes) else torch.cat([gaze[key] for gaze in gazes])

    first_frames = {gaze.first_frame for gaze in gazes}
    return first.replace(
        gazing_pos=stacked("gazing_pos", padding),
        if_padded_gazing=stacked("if_padded_gazing", torch.ones_like(padding)),
        num_gazing_each_frame=counts,
        gazing_mask=[torch.cat(masks) for masks in zip(*(gaze.gazing_mask for gaze in gazes), strict=True)],
        **{key: stacked(key, torch.zeros_like(padding)) for key in _OF_SLOTS},
        **{key: of_frames(key) for key in _OF_FRAMES},
        first_frame=first.first_frame if len(first_frames) == 1 else None,
        cache=None,
    )


def concatenate_gazes(gazes: Sequence["GazeOutput"]) -> "GazeOutput":
    """Concatenates gazes of the same clips in time; see [`GazeOutput.concatenate`]."""
    first = _check_alike(gazes, ("scales", "patch_size", "frame_sampling_rate", "batch_size"))
    for index, (before, gaze) in enumerate(zip(gazes[:-1], gazes[1:], strict=True), start=1):
        if before.first_frame is not None and gaze.first_frame is not None:
            expected = before.first_frame + before.num_frames
            if gaze.first_frame != expected:
                raise ValueError(
                    f"`gazes[{index}]` must start at frame {expected} of its stream, where the previous one ends, got one that "
                    f"starts at frame {gaze.first_frame}"
                )

    def joined(key: str) -> torch.Tensor | None:
        parts = [gaze.get(key) for gaze in gazes]
        return None if any(part is None for part in parts) else torch.cat(parts, dim=-1)

    ids, start = [], 0
    for gaze in gazes:
        ids.append(gaze.gazing_pos + start * first.num_vision_tokens_each_frame)
        start += gaze.num_frames
    return first.replace(
        gazing_pos=torch.cat(ids, dim=1),
        gazing_mask=[torch.cat(parts, dim=1) for parts in zip(*(gaze.gazing_mask for gaze in gazes), strict=True)],
        cache=gazes[-1].cache,
        **{key: joined(key) for key in ("if_padded_gazing", "num_gazing_each_frame", *_OF_SLOTS, *_OF_FRAMES)},
    )


def _check_alike(gazes: Sequence["GazeOutput"], keys: Sequence[str]) -> "GazeOutput":
    """Checks that gazes agree in some fields, and returns the first of them."""
    if not gazes:
        raise ValueError("`gazes` must hold at least one gaze, got none")
    first = gazes[0]
    for index, gaze in enumerate(gazes):
        for key in keys:
            if getattr(gaze, key) != getattr(first, key):
                raise ValueError(
                    f"`gazes[{index}].{key}` is {getattr(gaze, key)}, but that of the first is {getattr(first, key)}"
                )
    return first


def _place_in_frame(gaze: "GazeOutput") -> torch.Tensor:
    """Returns the place of every slot in its frame, `(N,)`."""
    counts = gaze.num_gazing_each_frame
    starts = counts.cumsum(0) - counts
    return torch.arange(gaze.gazing_pos.shape[1], device=counts.device) - starts[gaze.frame_of_slot]
