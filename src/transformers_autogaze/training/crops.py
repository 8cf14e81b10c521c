"""
What a network is distilled on: crops of frames and pictures, two at a time, that lie in the same place or a little apart.

This module owns the way from files to pairs of crops in levels 0..255. It knows nothing of encoders or networks.
"""

import glob
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..frame_decoding_autogaze import read_video, stream_video
from .videos import VIDEO_SUFFIXES


PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MAX_FRAMES = 64  # of a video that crops are cut from
_REACH = 0.25  # frames between the two crops of a pair, as a share of those
_SHIFT = 0.12  # by which the second crop of a picture lies elsewhere at most, as a share of its sides
_ZOOM = 1.1  # by which it is smaller or larger at most
_ASPECT = 4 / 3  # by which a crop is taller or wider than its frame at most
_LARGE = 1024  # pixels of the shorter side of a picture, of twice which it is halved
_LEAST_AREA = 0.06  # of a frame that a crop takes, however large the frame is


class Source(NamedTuple):
    """
    A file to cut crops from.

    Args:
        path (`str`): the file.
        is_video (`bool`): whether it is a video, or else a picture.
        num_frames (`int`): frames of the video, 1 for a picture.
    """

    path: str
    is_video: bool
    num_frames: int


def find_sources(inputs: Sequence[str | os.PathLike]) -> list[Source]:
    """
    Finds videos and pictures, and opens each to see that it can be read.

    What cannot be read is left out, with one warning that names the first.

    Args:
        inputs (`Sequence` of `str` or `os.PathLike`):
            Files, folders, patterns of them such as `"clips/*.mp4"`; folders are searched with those in them for files that end
            in one of `VIDEO_SUFFIXES` or `PICTURE_SUFFIXES`.

    Returns:
        `list[Source]`: in the order of their paths for each input, no file twice.

    Raises:
        ValueError: if there is no file of a name, or an input holds nothing that can be read.
    """
    found: dict[str, Source] = {}
    broken: list[str] = []
    for item in inputs:
        paths = _paths(os.fspath(item))
        known = {}
        for path in paths:
            # One file under several names would be trained on and held out at once.
            file = os.path.realpath(path)
            try:
                known[file] = found.get(file) or _open(path)
            except (ValueError, OSError) as error:
                broken.append(f"{path}: {error}")
        if not known:
            raise ValueError(
                f"`inputs`: {os.fspath(item)!r} must hold videos ({', '.join(VIDEO_SUFFIXES)}) or pictures "
                f"({', '.join(PICTURE_SUFFIXES)}) that can be read, found "
                + (f"none; {broken[-1]}" if paths else "none")
            )
        found |= known
    if broken:
        warnings.warn(f"{len(broken)} files are left out, as they cannot be read; {broken[0]}", stacklevel=2)
    return list(found.values())


def cut_pairs(
    source: Source, count: int, sizes: Sequence[tuple[int, int]], seed: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """
    Cuts pairs of random crops, in several sizes each.

    Of a video, both crops of a pair show the same part of two frames; of a picture, the second lies a little elsewhere.
    Random numbers follow from `seed` alone, so the same pairs come again.

    Args:
        source ([`Source`]): the file.
        count (`int`): pairs to cut.
        sizes (`Sequence[tuple[int, int]]`): heights and widths in pixels that every crop is resized to, antialiased.
        seed (`Sequence[int]`): where random numbers start from.

    Yields:
        `list[torch.ByteTensor]` of shape `(2, 3, height, width)`, levels 0..255: a pair in each size.

    Raises:
        ValueError: if the file cannot be read to the end.
    """
    draw = np.random.default_rng(list(seed))
    frames = read_source(source)
    for _ in range(count):
        first = second = int(draw.integers(len(frames)))
        if source.is_video and len(frames) > 1:
            reach = max(1, round(len(frames) * _REACH))
            others = [t for t in range(first - reach, first + reach + 1) if t != first and 0 <= t < len(frames)]
            second = others[int(draw.integers(len(others)))]
        box = _draw_box(draw, frames.shape[-2:], min(sizes[0]))
        other = box if source.is_video else _move_box(draw, box)
        is_flipped = bool(draw.random() < 0.5)
        crops = [_cut(frames[t], part) for t, part in ((first, box), (second, other))]
        pair = [torch.stack([_resize(crop, size) for crop in crops]) for size in sizes]
        yield [crops.flip(-1) if is_flipped else crops for crops in pair]


def _paths(item: str) -> list[str]:
    if os.path.isdir(item):
        suffixes = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES)
        return sorted(str(path) for path in Path(item).rglob("*") if path.suffix.lower() in suffixes)
    if os.path.exists(item):
        return [item]
    matches = sorted(glob.glob(item))
    if not matches:
        raise ValueError(f"`inputs`: there is no file, folder or pattern of them {item!r}")
    return [path for match in matches for path in _paths(match)]


def _open(path: str) -> Source:
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        return Source(path, True, stream_video(path)[0].total_num_frames)
    with Image.open(path) as picture:
        picture.verify()
    return Source(path, False, 1)


def read_source(source: Source) -> torch.Tensor:
    """Reads frames spread over a video, or a picture: `(frames, 3, height, width)`, channels last in memory."""
    if source.is_video:
        frames = read_video(source.path, num_frames=min(source.num_frames, _MAX_FRAMES))[0]
    else:
        with Image.open(source.path) as picture:
            shrink = max(1, min(picture.size) // _LARGE)
            frames = np.asarray(picture.convert("RGB").reduce(shrink))[None]
    return torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)


class _Box(NamedTuple):
    """Top, left, height and width as shares of the frame."""

    top: float
    left: float
    height: float
    width: float


def _draw_box(draw: np.random.Generator, frame: Sequence[int], size: int) -> _Box:
    """Draws a part of a frame, as small as shows detail and as large as all of it, in about the frame's aspect ratio."""
    least = min(0.5, max(_LEAST_AREA, (size / min(frame)) ** 2 / 2))
    share = math.sqrt(least) ** draw.random()  # evenly in how far the camera went in
    aspect = _ASPECT ** (draw.uniform(-0.5, 0.5))
    height, width = min(1.0, share * aspect), min(1.0, share / aspect)
    return _Box(draw.random() * (1 - height), draw.random() * (1 - width), height, width)


def _move_box(draw: np.random.Generator, box: _Box) -> _Box:
    """Moves a part of a picture a little, as a camera does."""
    zoom = _ZOOM ** draw.uniform(-1, 1)
    height, width = min(1.0, box.height * zoom), min(1.0, box.width * zoom)
    top = box.top + box.height / 2 - height / 2 + _SHIFT * draw.uniform(-1, 1) * box.height
    left = box.left + box.width / 2 - width / 2 + _SHIFT * draw.uniform(-1, 1) * box.width
    return _Box(min(max(top, 0.0), 1 - height), min(max(left, 0.0), 1 - width), height, width)


def _cut(frame: torch.Tensor, box: _Box) -> torch.Tensor:
    rows, cols = frame.shape[-2:]
    top, left = int(box.top * rows), int(box.left * cols)
    height, width = max(1, round(box.height * rows)), max(1, round(box.width * cols))
    return frame[:, top : top + height, left : left + width]


def _resize(crop: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(crop.shape[-2:]) == tuple(size):
        return crop
    return F.interpolate(crop[None], size, mode="bilinear", antialias=True)[0]
