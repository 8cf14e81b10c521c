"""
Pairs of crops of video frames and pictures, for distillation.

Both crops of a pair show the same part of two frames of a video, or overlapping parts of a picture.
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
from ..utils.video_files import VIDEO_SUFFIXES


PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MAX_FRAMES = 64  # frames of a video that crops are cut from
_MAX_DISTANCE = 0.25  # between the frames of a pair, as a share of these frames
_MAX_SHIFT = 0.12  # of the second crop of a picture, as a share of its sides
_MAX_ZOOM = 1.1  # of the second crop of a picture
_MAX_ASPECT = 4 / 3  # aspect ratio of a crop over that of its frame
_SHORT_SIDE = 1024  # pixels; a picture is reduced by a whole factor while its shorter side stays at least this long
_MIN_AREA = 0.06  # of a crop, as a share of the frame


class Source(NamedTuple):
    """
    A file to cut crops from.

    Args:
        path (`str`): the file.
        is_video (`bool`): whether it is a video; otherwise it is a picture.
        num_frames (`int`): number of frames, 1 for a picture.
    """

    path: str
    is_video: bool
    num_frames: int


def find_sources(inputs: Sequence[str | os.PathLike]) -> list[Source]:
    """
    Finds videos and pictures, and opens each to check that it can be read.

    Files that cannot be read are left out, with one warning that names the first.

    Args:
        inputs (`Sequence` of `str` or `os.PathLike`):
            Files, folders, and patterns such as `"clips/*.mp4"`; folders are searched recursively for files that end in one of
            `VIDEO_SUFFIXES` or `PICTURE_SUFFIXES`.

    Returns:
        `list[Source]`: in the order of their paths for each input, without repetition.

    Raises:
        ValueError: if an input does not exist or holds no readable file.
    """
    found: dict[str, Source] = {}
    broken: list[str] = []
    for item in inputs:
        paths = _paths(os.fspath(item))
        known = {}
        for path in paths:
            # A file with several names could otherwise be both trained on and held out.
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
    Cuts pairs of random crops, each in several sizes.

    In a video, both crops of a pair show the same part of two frames; in a picture, the second crop is shifted and zoomed
    slightly. The pairs depend on `seed` only.

    Args:
        source ([`Source`]): the file.
        count (`int`): number of pairs.
        sizes (`Sequence[tuple[int, int]]`): heights and widths in pixels to which every crop is resized, antialiased.
        seed (`Sequence[int]`): seed of the random numbers.

    Yields:
        `list[torch.ByteTensor]` of shape `(2, 3, height, width)`, levels 0..255: a pair in each size.

    Raises:
        ValueError: if the file cannot be read to the end.
    """
    generator = np.random.default_rng(list(seed))
    frames = read_source(source)
    for _ in range(count):
        first = second = int(generator.integers(len(frames)))
        if source.is_video and len(frames) > 1:
            distance = max(1, round(len(frames) * _MAX_DISTANCE))
            others = [t for t in range(first - distance, first + distance + 1) if t != first and 0 <= t < len(frames)]
            second = others[int(generator.integers(len(others)))]
        box = _draw_box(generator, frames.shape[-2:], min(sizes[0]))
        other = box if source.is_video else _move_box(generator, box)
        is_flipped = bool(generator.random() < 0.5)
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
        raise ValueError(f"`inputs`: no file or folder matches {item!r}")
    return [path for match in matches for path in _paths(match)]


def _open(path: str) -> Source:
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        return Source(path, True, stream_video(path)[0].total_num_frames)
    try:
        with Image.open(path) as picture:
            picture.load()
    except (SyntaxError, Image.DecompressionBombError) as error:  # a damaged PNG file, or too many pixels
        raise ValueError(str(error)) from error
    return Source(path, False, 1)


def read_source(source: Source) -> torch.Tensor:
    """Reads frames spread over a video, or a picture: `(frames, 3, height, width)`, channels last in memory."""
    if source.is_video:
        frames = read_video(source.path, num_frames=min(source.num_frames, _MAX_FRAMES))[0]
    else:
        with Image.open(source.path) as picture:
            factor = max(1, min(picture.size) // _SHORT_SIDE)
            frames = np.asarray(picture.convert("RGB").reduce(factor))[None]
    return torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)


class _Box(NamedTuple):
    """Top, left, height and width as shares of the frame."""

    top: float
    left: float
    height: float
    width: float


def _draw_box(generator: np.random.Generator, frame_size: Sequence[int], crop_size: int) -> _Box:
    """Draws a part of a frame, up to the whole frame, in about the frame's aspect ratio."""
    # Smaller crops would be upscaled by more than a factor of about 1.4.
    min_area = min(0.5, max(_MIN_AREA, (crop_size / min(frame_size)) ** 2 / 2))
    share = math.sqrt(min_area) ** generator.random()  # uniform in the logarithm
    aspect = _MAX_ASPECT ** (generator.uniform(-0.5, 0.5))
    height, width = min(1.0, share * aspect), min(1.0, share / aspect)
    return _Box(generator.random() * (1 - height), generator.random() * (1 - width), height, width)


def _move_box(generator: np.random.Generator, box: _Box) -> _Box:
    """Shifts and zooms a box slightly, like camera motion."""
    zoom = _MAX_ZOOM ** generator.uniform(-1, 1)
    height, width = min(1.0, box.height * zoom), min(1.0, box.width * zoom)
    top = box.top + box.height / 2 - height / 2 + _MAX_SHIFT * generator.uniform(-1, 1) * box.height
    left = box.left + box.width / 2 - width / 2 + _MAX_SHIFT * generator.uniform(-1, 1) * box.width
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
