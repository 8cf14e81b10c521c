"""
The number of tokens that the language model of an MLLM reads for a video, with pruning and without.

The tokens are counted with the code of `integrations`; no MLLM is loaded.
"""

import math
from typing import NamedTuple

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..integrations.nvila import gaze_to_nvila
from ..integrations.qwen_vl_gazing import UnitSizes
from ..integrations.qwen_vl_units import kept_units
from ..integrations.video_tokens import count_tokens


LLAVA_ONEVISION, QWEN, NVILA = MLLMS = ("LLaVA-OneVision", "Qwen2.5-VL", "NVILA-HD-Video")
"""MLLMs whose tokens are counted."""
LLAVA_PLACES = GazeGrid([378], patch_size=27)
"""The 14x14 places that LLaVA-OneVision pools a frame of 384x384 pixels to; each is a token."""
NVILA_TILE = GazeGrid([56, 112, 196, 392], patch_size=14)
"""The patches of a tile of NVILA-HD-Video; each is a token."""
QWEN_UNIT = UnitSizes(merge_size=2, patch_size=14, frames=2)
"""The merge unit of Qwen2.5-VL, which becomes one token."""
MAX_UNITS = 256
"""Maximum number of merge units of a frame, as with `max_pixels=256 * 28 * 28` in Qwen2.5-VL's processor."""


class TokenCount(NamedTuple):
    """
    Number of tokens that the language model reads for a video.

    Args:
        kept (`int`): tokens of the kept patches.
        whole (`int`): tokens of the whole video.
    """

    kept: int
    whole: int


def unit_grid(height: int, width: int) -> GazeGrid:
    """
    Returns the grid of Qwen2.5-VL's merge units, in frames resized as its processor does.

    Args:
        height, width (`int`): size of the video's frames in pixels.

    Returns:
        [`GazeGrid`]: one patch for every merge unit, at most [`MAX_UNITS`].

    Example:

    ```python
    >>> from transformers_autogaze.app.mllm_tokens import unit_grid

    >>> unit_grid(288, 512).grids, unit_grid(1080, 1920).grids
    (((10, 18),), ((12, 21),))

    ```
    """
    side = QWEN_UNIT.merge_size * QWEN_UNIT.patch_size
    rows, cols = max(1, round(height / side)), max(1, round(width / side))
    if rows * cols > MAX_UNITS:
        shrink = math.sqrt(height * width / (MAX_UNITS * side**2))
        rows, cols = (max(1, math.floor(length / shrink / side)) for length in (height, width))
    return QWEN_UNIT.grid(rows * QWEN_UNIT.merge_size, cols * QWEN_UNIT.merge_size)


def count_mllm_tokens(mllm: str, gaze: GazeOutput, height: int, width: int) -> TokenCount | None:
    """
    Counts the tokens that an MLLM's language model reads for a video.

    Args:
        mllm (`str`): one of [`MLLMS`].
        gaze ([`GazeOutput`]): a batch of one, over the whole frame, on any grid.
        height, width (`int`): size of the video's frames in pixels.

    Returns:
        [`TokenCount`]; `None` for NVILA-HD-Video if the grid does not consist of whole tiles of it.

        If the grid is not the MLLM's own, Qwen2.5-VL, and LLaVA-OneVision for a single scale, get every token whose area
        overlaps a kept patch. LLaVA-OneVision gets one token per kept patch for several scales.

    Raises:
        ValueError: if `mllm` is none of [`MLLMS`].
    """
    if mllm == QWEN:
        return _count_units(gaze, *unit_grid(height, width).grids[0])
    if mllm == NVILA:
        return _count_nvila(gaze)
    if mllm == LLAVA_ONEVISION:
        return _count_places(gaze)
    raise ValueError(f"`mllm` must be one of {', '.join(map(repr, MLLMS))}, got {mllm!r}")


def _count_units(gaze: GazeOutput, rows: int, cols: int) -> TokenCount:
    pairs = -(-gaze.num_frames * gaze.frame_sampling_rate // QWEN_UNIT.frames)
    kept = kept_units(gaze, (pairs, rows, cols), QWEN_UNIT.frames)
    return TokenCount(int(kept.sum()), kept.numel())


def _count_places(gaze: GazeOutput) -> TokenCount:
    rows, cols = LLAVA_PLACES.grids[0]
    frames = gaze.num_frames * gaze.frame_sampling_rate
    if len(gaze.grid.grids) == 1:
        covered = gaze.covered_cells(rows, cols).flatten(2)
        gaze = GazeOutput.from_masks([covered], LLAVA_PLACES, gaze.frame_sampling_rate)
    kept = count_tokens(gaze, gaze.grid, frames, None, "time", 0)
    newline = 1
    return TokenCount(sum(kept) + newline, frames * rows * cols + newline)


def _count_nvila(gaze: GazeOutput) -> TokenCount | None:
    rows, cols = (own // tile for own, tile in zip(gaze.grid.grids[-1], NVILA_TILE.grids[-1], strict=True))
    if list(gaze.grid.grids) != [(rows * tall, cols * wide) for tall, wide in NVILA_TILE.grids]:
        return None
    # Only the number of patches matters, not their size in pixels: 2x2 tiles of the published AutoGaze, of 224 pixels with
    # patches of 16, have as many patches at every scale as one tile of 392 pixels with patches of 14.
    sizes = [(rows * tall, cols * wide) for tall, wide in NVILA_TILE.sizes]
    whole = GazeGrid(sizes, NVILA_TILE.patch_size)
    tiles = GazeOutput.from_masks(whole.split_tiles(gaze.gazing_mask, NVILA_TILE), NVILA_TILE)
    # The published settings keep all patches of the thumbnails: whole frames that are encoded beside the tiles.
    info = gaze_to_nvila(tiles, GazeOutput.full(NVILA_TILE, 1, gaze.num_frames))
    kept = sum(int((~info[f"if_padded_gazing_{kind}"]).sum()) for kind in ("tiles", "thumbnails"))
    return TokenCount(kept, gaze.num_frames * NVILA_TILE.num_patches * (rows * cols + 1))


def mllm_grid(mllm: str, height: int, width: int) -> GazeGrid:
    """
    Returns the grid of the patches that become an MLLM's tokens: in the whole frame, or in a tile for NVILA-HD-Video.

    Args:
        mllm (`str`): one of [`MLLMS`].
        height, width (`int`): size of the video's frames in pixels.
    """
    grids = {LLAVA_ONEVISION: LLAVA_PLACES, NVILA: NVILA_TILE}
    return grids[mllm] if mllm in grids else unit_grid(height, width)
