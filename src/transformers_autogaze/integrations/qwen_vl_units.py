"""
Merge units of Qwen2.5-VL and Qwen3-VL: 2x2 patches over a pair of frames, which become one token.

This module computes their places in videos, the units that a gaze keeps, and their pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..gazing_autogaze import GazeOutput


class UnitPlaces(NamedTuple):
    """
    The places of merge units in videos.

    Args:
        video (`torch.LongTensor` of shape `(units,)`): index of the video in `grid_thw`.
        time (`torch.LongTensor` of shape `(units,)`): index of the pair of frames in the video.
        row, col (`torch.LongTensor` of shape `(units,)`): row and column in the frame, counted in units.
    """

    video: torch.Tensor
    time: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor


def locate_units(grid_thw: torch.Tensor, merge_size: int) -> UnitPlaces:
    """
    Lists the merge units of videos, in the order of their tokens.

    Args:
        grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
            Patches of each video in time, height and width, as the processor returns them.
        merge_size (`int`): rows and columns of patches in a unit.

    Returns:
        [`UnitPlaces`]

    Example:

    ```python
    >>> from transformers_autogaze.integrations.qwen_vl_units import locate_units

    >>> places = locate_units(torch.tensor([[2, 2, 4]]), merge_size=2)
    >>> places.time.tolist(), places.row.tolist(), places.col.tolist()
    ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1])

    ```
    """
    times, rows, cols = grid_thw[:, 0], grid_thw[:, 1] // merge_size, grid_thw[:, 2] // merge_size
    counts = times * rows * cols
    video = torch.arange(len(grid_thw), device=grid_thw.device).repeat_interleave(counts)
    place = torch.arange(len(video), device=grid_thw.device) - (counts.cumsum(0) - counts)[video]
    rows, cols = rows[video], cols[video]
    return UnitPlaces(video, place // (rows * cols), place // cols % rows, place % cols)


def kept_units(gaze: GazeOutput, units: tuple[int, int, int], frames_of_unit: int = 2) -> torch.Tensor:
    """
    Finds the merge units that a gaze keeps.

    A unit covers an area of the frame over some consecutive frames. It is kept if a kept patch of any scale overlaps it in at
    least one of these frames, however little. So nothing kept is lost where the edges of patches and units differ, and a
    patch of a coarse scale keeps all units that it covers.

    Args:
        gaze ([`GazeOutput`]): the kept patches, on any grid over the whole frame.
        units (`tuple[int, int, int]`): units in time, height and width.
        frames_of_unit (`int`, *optional*, defaults to 2):
            Video frames of a unit. The last units may have fewer, as the processor repeats the last frame.

    Returns:
        `torch.BoolTensor` of shape `(batch, *units)`.

    Raises:
        ValueError: if the frames of the gaze are not those of the units.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.integrations.qwen_vl_units import kept_units

    >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    >>> mask[0, 1, 0] = mask[0, 2, 3] = True  # top left in the second of four frames, bottom right in the third
    >>> kept_units(GazeOutput.from_masks([mask], GazeGrid([32])), units=(2, 2, 3)).int().tolist()
    [[[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 1]]]]

    ```
    """
    times, rows, cols = units
    frames = gaze.num_frames * gaze.frame_sampling_rate
    if -(-frames // frames_of_unit) != times:
        raise ValueError(
            f"it must be of {times * frames_of_unit} frames, {frames_of_unit} for each of the {times} units in time, got "
            f"{frames}"
        )
    covered = gaze.covered_cells(rows, cols).repeat_interleave(gaze.frame_sampling_rate, dim=1)
    last = covered[:, -1:].expand(-1, times * frames_of_unit - frames, -1, -1)
    return torch.cat([covered, last], dim=1).unflatten(1, (times, frames_of_unit)).any(2)


def unfold_units(
    pixel_values: torch.Tensor, grid_thw: Sequence[int], merge_size: int, patch_size: int
) -> torch.Tensor:
    """
    Puts the patches of one video together to frames.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(patches, 3 * frames_of_unit * patch_size**2)`):
            Patches unit by unit, as the processor returns them.
        grid_thw (`Sequence[int]`): patches in time, height and width.
        merge_size (`int`): rows and columns of patches in a unit.
        patch_size (`int`): height and width of a patch in pixels.

    Returns:
        `torch.FloatTensor` of shape `(times * frames_of_unit, height, width, 3)`: the frames, still normalised.
    """
    times, rows, cols = grid_thw
    units = (times, rows // merge_size, cols // merge_size, merge_size, merge_size)
    patches = pixel_values.view(*units, 3, -1, patch_size, patch_size).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return patches.reshape(-1, rows * patch_size, cols * patch_size, 3)


def fold_units(frames: torch.Tensor, merge_size: int, patch_size: int, frames_of_unit: int = 2) -> torch.Tensor:
    """
    Cuts frames into patches, unit by unit, as the processor does; the inverse of [`unfold_units`].

    Args:
        frames (`torch.FloatTensor` of shape `(times * frames_of_unit, 3, height, width)`): normalised frames.
        merge_size (`int`): rows and columns of patches in a unit.
        patch_size (`int`): height and width of a patch in pixels.
        frames_of_unit (`int`, *optional*, defaults to 2): frames of a unit.

    Returns:
        `torch.FloatTensor` of shape `(patches, 3 * frames_of_unit * patch_size**2)`

    Example:

    ```python
    >>> from transformers_autogaze.integrations.qwen_vl_units import fold_units, unfold_units

    >>> frames = torch.randn(4, 3, 16, 32)
    >>> patches = fold_units(frames, merge_size=2, patch_size=4)
    >>> patches.shape, torch.equal(unfold_units(patches, (2, 4, 8), 2, 4), frames.permute(0, 2, 3, 1))
    (torch.Size([64, 96]), True)

    ```
    """
    height, width = frames.shape[-2:]
    side = merge_size * patch_size
    sizes = (-1, frames_of_unit, 3, height // side, merge_size, patch_size, width // side, merge_size, patch_size)
    return frames.reshape(sizes).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * frames_of_unit * patch_size**2)
