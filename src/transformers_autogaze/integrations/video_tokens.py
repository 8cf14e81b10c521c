"""
The tokens of videos: clips for the vision tower, the order of their tokens, and time embeddings.

A clip is one tile over a chunk of frames, or the thumbnails (whole frames) of a chunk.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..utils.output_files import replacing
from .wrapping import hub_arguments


Videos = torch.Tensor | Sequence[torch.Tensor]

ORDERS = ("time", "tile")
_TIME_FILE = "time_embedding.safetensors"
_THUMBNAIL = -1  # in place of the index of a tile


class VideoClip(NamedTuple):
    """
    A clip for the tower: one tile over one chunk of frames, or the thumbnails of a chunk.

    Args:
        video, chunk, tile (`int`):
            Index of the video, of the chunk in the video, and of the tile, row by row; -1 for thumbnails.
        frame_numbers (`torch.LongTensor` of shape `(frames,)`): indices of the frames in their video.
        frames (`torch.FloatTensor` of shape `(frames, channels, height, width)`): the pixels.
        masks (`list[torch.BoolTensor]` of shape `(frames, patches)`): the kept patches, one mask per scale.
    """

    video: int
    chunk: int
    tile: int
    frame_numbers: torch.Tensor
    frames: torch.Tensor
    masks: list[torch.Tensor]


class TokenPlaces(NamedTuple):
    """
    The video, frame and patch of each token.

    Args:
        video, chunk, tile, frame (`torch.LongTensor` of shape `(tokens,)`): as in [`VideoClip`].
        id (`torch.LongTensor` of shape `(tokens,)`):
            Patch id, counted from the first patch of the tile's frame; negative for tokens that are no patch.
    """

    video: torch.Tensor
    chunk: torch.Tensor
    tile: torch.Tensor
    frame: torch.Tensor
    id: torch.Tensor


def list_videos(videos: Videos) -> list[torch.Tensor]:
    """Lists videos `(frames, channels, height, width)` and checks their types and shapes."""
    for index, video in enumerate(videos):
        if not isinstance(video, torch.Tensor) or video.ndim != 4 or not video.is_floating_point() or 0 in video.shape:
            got = f"{video.dtype} {tuple(video.shape)}" if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(
                "`pixel_values_videos` must be normalised floats of shape (videos, frames, channels, height, width) or "
                f"a list of (frames, channels, height, width), got {got} for video {index}"
            )
    return list(videos)


def list_gazes(gaze: GazeOutput | Sequence[GazeOutput]) -> list[GazeOutput]:
    """Lists the gazes in a batch, or in several batches, one per video."""
    batches = [gaze] if isinstance(gaze, GazeOutput) else gaze
    return [
        batch if batch.batch_size == 1 else batch.select(clip) for batch in batches for clip in range(batch.batch_size)
    ]


def check_gaze(
    number: int,
    video: torch.Tensor,
    gaze: GazeOutput,
    tile_grid: GazeGrid,
    chunk_frames: int,
    max_frames: int | None = None,
) -> None:
    """
    Checks that a gaze fits the frames of a video, and whole tiles of a tower's grid.

    Args:
        number (`int`): index of the video, for the message.
        video (`torch.FloatTensor` of shape `(frames, channels, height, width)`): its frames.
        gaze ([`GazeOutput`]): its kept patches.
        tile_grid ([`GazeGrid`]): the patches of one tile.
        chunk_frames (`int`): frames of a chunk.
        max_frames (`int`, *optional*): maximum number of frames of the time embedding.

    Raises:
        ValueError: if it does not fit.
    """
    rows, cols = (max(1, own // tile) for own, tile in zip(gaze.grid.grids[-1], tile_grid.grids[-1], strict=True))
    frame_grid = GazeGrid([(rows * height, cols * width) for height, width in tile_grid.sizes], tile_grid.patch_size)
    if gaze.grid != frame_grid:
        raise ValueError(
            f"`gaze` of video {number} must be made for the tower's {tile_grid}, or for whole tiles of it, got {gaze.grid}"
        )
    rate = gaze.frame_sampling_rate
    if gaze.batch_size != 1 or gaze.num_frames * rate != len(video):
        raise ValueError(
            f"`gaze` of video {number} must be of its {len(video)} frames alone, got {gaze.batch_size} clips of "
            f"{gaze.num_frames * rate}"
        )
    if video.shape[-2] % rows or video.shape[-1] % cols:
        raise ValueError(
            f"`gaze` of video {number} is for {rows}x{cols} tiles, which frames of {tuple(video.shape[-2:])} pixels "
            "cannot be cut into"
        )
    if max_frames is not None and len(video) > max_frames:
        raise ValueError(
            f"`time_embedding` must have an embedding for each of the {len(video)} frames of video {number}, got {max_frames}"
        )
    if chunk_frames % rate:
        raise ValueError(
            f"`chunk_frames` must be a multiple of {rate}, the rate of `gaze` of video {number}, got {chunk_frames}"
        )


def cut_tiles(video: torch.Tensor, rows: int, cols: int) -> list[torch.Tensor]:
    """Cuts frames `(frames, channels, height, width)` into tiles of one size, row by row, without copying."""
    return [tile for band in video.chunk(rows, dim=-2) for tile in band.chunk(cols, dim=-1)]


def cut_clips(
    number: int,
    video: torch.Tensor,
    gaze: GazeOutput,
    tile_grid: GazeGrid,
    chunk_frames: int,
    thumbnail_interval: int | None = None,
    keeps_empty: bool = False,
) -> Iterator[VideoClip]:
    """
    Cuts a video and its gaze into clips.

    Args:
        number (`int`): index of the video.
        video (`torch.FloatTensor` of shape `(frames, channels, height, width)`): its frames.
        gaze ([`GazeOutput`]): a batch of one over whole frames, on a grid of whole tiles of `tile_grid`.
        tile_grid ([`GazeGrid`]): the patches of one tile.
        chunk_frames (`int`): frames of a chunk, a multiple of the gaze's `frame_sampling_rate`.
        thumbnail_interval (`int`, *optional*):
            Interval, in gazed frames, at which the whole frame is added, with all patches of its finest scale.
        keeps_empty (`bool`, *optional*, defaults to `False`): whether to yield tiles without kept patches as well.

    Yields:
        [`VideoClip`]: the clips in order of time.
    """
    rate = gaze.frame_sampling_rate
    tile_masks = gaze.grid.split_tiles(gaze.gazing_mask, tile_grid)
    tiles = cut_tiles(video, *gaze.grid.tile_layout(tile_grid))
    frames_of_chunks = torch.arange(0, len(video), rate).split(chunk_frames // rate)
    for chunk, numbers in enumerate(frames_of_chunks):
        if thumbnail_interval is not None:
            whole = numbers[numbers % (rate * thumbnail_interval) == 0]
            masks = [
                torch.full((len(whole), count), size == tile_grid.sizes[-1], device=gaze.gazing_pos.device)
                for count, size in zip(tile_grid.num_patches_each_scale, tile_grid.sizes, strict=True)
            ]
            if len(whole):
                yield VideoClip(number, chunk, _THUMBNAIL, whole, video[whole], masks)
        gazed = slice(int(numbers[0]) // rate, int(numbers[-1]) // rate + 1)
        pixels = slice(int(numbers[0]), int(numbers[-1]) + 1, rate)
        for tile, frames in enumerate(tiles):
            masks = [mask[tile, gazed] for mask in tile_masks]
            if keeps_empty or any(bool(mask.any()) for mask in masks):
                yield VideoClip(number, chunk, tile, numbers, frames[pixels], masks)


def batch_clips(clips: Iterator[VideoClip], max_batch_size: int) -> Iterator[list[VideoClip]]:
    """Groups clips whose frames have one shape, at most `max_batch_size` at a time."""
    by_shape: dict[tuple[int, ...], list[VideoClip]] = {}
    for clip in clips:
        by_shape.setdefault(tuple(clip.frames.shape), []).append(clip)
    for group in by_shape.values():
        for first in range(0, len(group), max_batch_size):
            yield group[first : first + max_batch_size]


def batch_streams(clips: Iterator[VideoClip], max_batch_size: int) -> Iterator[list[list[VideoClip]]]:
    """
    Groups the tiles of videos whose chunks have the same shapes, at most `max_batch_size` at a time.

    Args:
        clips (`Iterator[VideoClip]`): all chunks of each tile in order of time, including empty ones.
        max_batch_size (`int`): maximum number of tiles of a group.

    Yields:
        `list[list[VideoClip]]`: for each group its chunks in order of time, each a list of the same tiles. Tiles without
        any kept patch are left out.
    """
    streams: dict[tuple[int, int], list[VideoClip]] = {}
    for clip in clips:
        streams.setdefault((clip.video, clip.tile), []).append(clip)
    by_shapes: dict[tuple[tuple[int, ...], ...], list[list[VideoClip]]] = {}
    for stream in streams.values():
        if any(bool(mask.any()) for clip in stream for mask in clip.masks):
            by_shapes.setdefault(tuple(tuple(clip.frames.shape) for clip in stream), []).append(stream)
    for group in by_shapes.values():
        for first in range(0, len(group), max_batch_size):
            yield [list(chunk) for chunk in zip(*group[first : first + max_batch_size], strict=True)]


def order_tokens(places: TokenPlaces, order: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """
    Sorts the tokens of videos.

    Args:
        places ([`TokenPlaces`]): the video, frame and patch of each token.
        order (`str`):
            `"time"`: all tiles of a frame before the next frame. `"tile"`: all frames of a tile, inside its chunk,
            before the next tile. A frame's thumbnail comes before its tiles; patches ascend by id, coarse to fine.

    Returns:
        `tuple`: a `torch.LongTensor` of shape `(tokens,)` that sorts the tokens, and a `list` of the video and the number of
        tokens of each part. Separators come between parts: chunks if the order is `"time"`, clips if it is `"tile"`.
    """
    part = (places.video, places.chunk) if order == "time" else (places.video, places.chunk, places.tile)
    inside = (places.frame, places.tile, places.id) if order == "time" else (places.frame, places.id)
    index = torch.arange(len(places.id), device=places.id.device)
    # Stable sorting, from the last key to the first.
    for key in (*inside[::-1], *part[::-1]):
        index = index[torch.argsort(key[index], stable=True)]
    parts, counts = torch.unique_consecutive(torch.stack(part)[:, index], dim=1, return_counts=True)
    return index, list(zip(parts[0].tolist(), counts.tolist(), strict=True))


def count_tokens(
    gaze: GazeOutput,
    tile_grid: GazeGrid,
    chunk_frames: int,
    thumbnail_interval: int | None,
    order: str,
    num_prefix: int,
) -> list[int]:
    """
    Counts the tokens of each part of a video; see [`order_tokens`].

    Args:
        gaze, tile_grid, chunk_frames, thumbnail_interval: as in [`cut_clips`].
        order (`str`): as in [`order_tokens`].
        num_prefix (`int`): prefix tokens of every frame, or tile of a frame, with a kept patch.
    """
    frames = gaze.num_frames * gaze.frame_sampling_rate
    no_pixels = torch.empty(1).expand(frames, 1, *gaze.grid.tile_layout(tile_grid))
    parts: dict[tuple[int, ...], int] = {}
    for clip in cut_clips(0, no_pixels, gaze, tile_grid, chunk_frames, thumbnail_interval):
        is_kept = torch.cat(clip.masks, dim=-1)
        part = (clip.chunk,) if order == "time" else (clip.chunk, clip.tile)
        parts[part] = parts.get(part, 0) + int(is_kept.sum() + num_prefix * is_kept.any(-1).sum())
    return list(parts.values())


class SinusoidalTimeEmbedding(nn.Module):
    """
    Embeds the indices of frames by sines and cosines.

    Args:
        hidden_size (`int`): channels of the embeddings, an even number.
        amplitude (`float`, *optional*, defaults to 1.0): amplitude of the sines and cosines.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.video_tokens import SinusoidalTimeEmbedding

    >>> SinusoidalTimeEmbedding(4)(torch.tensor([0, 1])).shape
    torch.Size([2, 4])

    ```
    """

    def __init__(self, hidden_size: int, amplitude: float = 1.0):
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even, got {hidden_size}")
        self.hidden_size, self.amplitude = hidden_size, amplitude

    def forward(self, frame_numbers: torch.Tensor) -> torch.Tensor:
        """Returns embeddings `(tokens, hidden_size)` of frame numbers `(tokens,)`."""
        half = self.hidden_size // 2
        rates = 10000 ** (-torch.arange(half, device=frame_numbers.device) / half)
        angles = frame_numbers[:, None] * rates
        return self.amplitude * torch.cat([angles.sin(), angles.cos()], dim=-1)


def save_time_embedding(embedding: nn.Module | None, folder: Path) -> dict[str, Any] | None:
    """Saves the weights of a time embedding, if it has any; returns its entry of the wrapper's file."""
    if embedding is None:
        return None
    if isinstance(embedding, SinusoidalTimeEmbedding):
        return {"hidden_size": embedding.hidden_size, "amplitude": embedding.amplitude}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in embedding.state_dict().items()}
    with replacing(folder / _TIME_FILE) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    return {"class": type(embedding).__name__}


def load_time_embedding(
    name: str | os.PathLike,
    wrapper_config: Mapping[str, Any] | None,
    given: nn.Module | None,
    kwargs: Mapping[str, Any],
) -> nn.Module | None:
    """
    Loads the time embedding of a saved wrapper.

    Args:
        name (`str` or `os.PathLike`): folder or repository.
        wrapper_config (`Mapping[str, Any]`, *optional*): content of the wrapper's file.
        given (`nn.Module`, *optional*): the module to load saved weights into.
        kwargs (`Mapping[str, Any]`): arguments of `from_pretrained`, of which those about the Hub are used.

    Raises:
        ValueError: if weights were saved and no module is given for them.
    """
    saved = None if wrapper_config is None else wrapper_config.get("time_embedding")
    if saved is None or (given is not None and "class" not in saved):
        return given
    if "class" not in saved:
        return SinusoidalTimeEmbedding(**saved)
    if given is None:
        raise ValueError(f"`time_embedding` must be given: a {saved['class']} with weights of its own was saved")
    given.load_state_dict(load_file(cached_file(name, _TIME_FILE, **hub_arguments(kwargs))))
    return given
