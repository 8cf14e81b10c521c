"""
Collections of videos to train on: what there is, which frames of it, and what cannot be read.

This module owns the way from a folder, a list or a `datasets` dataset to levels of frames. It knows nothing of models,
labels or augmentation; decoding itself is `frame_decoding_autogaze`'s.
"""

import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from ..frame_decoding_autogaze import read_video, sample_indices, stream_video
from ..video_processing_autogaze import AutoGazeVideoProcessor


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_HELD_EDGE = 320  # pixels of the shorter side of frames that are held in memory, at most


class VideoCollection:
    """
    Videos by number, each read when it is asked for.

    A video that cannot be read is left out from then on: a warning names it, and `num_skipped` counts them, over all
    workers of a data loader. Of a damaged one, the frames that can be decoded are all that there is.

    Args:
        videos (`str`, `os.PathLike` or sequence):
            A folder, searched with the folders in it for files ending in one of `VIDEO_SUFFIXES`; or a sequence of
            paths, URLs, contents (`bytes`), PIL images or frames (arrays of shape `(frames, height, width, 3)`, levels
            0..255); or a `datasets` dataset with one of these in a column.
        column (`str`, *optional*, defaults to `"video"`): the column of a `datasets` dataset that holds the videos.
        in_memory (`bool`, *optional*, defaults to `False`):
            Whether to decode all videos once and hold them, at most 320 pixels on the shorter side. Fast for a small
            collection: a second of video takes 15 MB or less.

    Raises:
        ValueError: if there is no such folder, or no video.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_autogaze.training.videos import VideoCollection

    >>> videos = VideoCollection([np.zeros((9, 48, 64, 3), dtype=np.uint8)])
    >>> videos.read_clip(0, lambda total: range(0, total, 4)).shape
    torch.Size([3, 3, 48, 64])

    ```
    """

    def __init__(self, videos: Any, column: str = "video", in_memory: bool = False):
        self.column = column
        if isinstance(videos, (str, os.PathLike)):
            folder = Path(videos)
            self.videos: Sequence[Any] = find_videos(folder)
            self.names = [Path(path).relative_to(folder).as_posix() for path in self.videos]
        else:
            self.videos = videos
            self.names = [self._name(number) for number in range(len(videos))]
        if not len(self.videos):
            raise ValueError("`videos` must hold at least one video, got none")
        # Shared, so that all workers know what one of them found out.
        self._is_broken = torch.zeros(len(self.videos), dtype=torch.bool).share_memory_()
        self._lengths: dict[int, int] = {}
        self._decodable: dict[int, int] = {}
        self._held: list[torch.Tensor | None] | None = None
        if in_memory:
            numbers = tqdm(range(len(self.videos)), unit="video", desc="decoding")
            self._held = [self._attempt(number, lambda number: _shrink(self._load(number))) for number in numbers]

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def num_skipped(self) -> int:
        """Videos found unreadable so far."""
        return int(self._is_broken.sum())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Sizes in bytes by the names of the videos; only of videos that are files or encoded bytes."""
        sizes = {}
        for name, video in zip(self.names, self.videos, strict=True):
            if isinstance(video, bytes):
                sizes[name] = len(video)
            elif isinstance(video, (str, os.PathLike)) and os.path.isfile(video):
                sizes[name] = os.path.getsize(video)
        return sizes

    def read_clip(self, number: int, choose: Callable[[int], range]) -> torch.Tensor | None:
        """
        Reads frames at one distance from each other.

        Args:
            number (`int`): which video.
            choose (`Callable`): tells which frames to take, a `range`, given how many there are.

        Returns:
            `torch.ByteTensor` of shape `(frames, 3, height, width)`, levels 0..255, or `None` if the video cannot be read.
        """

        def read(number: int) -> torch.Tensor:
            chosen = choose(self._count_frames(number))
            source = self._load(number) if self._held is None else self._held[number]
            if not isinstance(source, (str, bytes)):
                return source[chosen.start : chosen.stop : chosen.step]
            try:
                return _take(source, chosen)
            except ValueError:
                # A damaged video may tell of more frames than it gives.
                return _take(source, choose(self._count_decodable(number, source)))

        return self._attempt(number, read)

    def read_evenly(self, number: int, num_frames: int) -> torch.Tensor | None:
        """
        Reads frames evenly chosen over the whole video, as processors do.

        Args:
            number (`int`): which video.
            num_frames (`int`): frames to take; a video with fewer counts as one that cannot be read.

        Returns: as [`~VideoCollection.read_clip`].
        """

        def read(number: int) -> torch.Tensor:
            source = self._load(number) if self._held is None else self._held[number]
            if isinstance(source, (str, bytes)):
                return _to_levels(read_video(source, num_frames)[0])
            return source[sample_indices(len(source), num_frames=num_frames)]

        return self._attempt(number, read)

    def _count_frames(self, number: int) -> int:
        if number not in self._lengths:
            source = self._load(number) if self._held is None else self._held[number]
            is_file = isinstance(source, (str, bytes))
            self._lengths[number] = stream_video(source)[0].total_num_frames if is_file else len(source)
        return self._lengths[number]

    def _count_decodable(self, number: int, source: str | bytes) -> int:
        if number not in self._decodable:
            self._decodable[number] = sum(1 for _ in stream_video(source)[1])
        return self._decodable[number]

    def _name(self, number: int) -> str:
        """Names a video: its path, or else its number."""
        video = self.videos[number]
        return str(video) if isinstance(video, (str, os.PathLike)) else str(number)

    def _load(self, number: int) -> str | bytes | torch.Tensor:
        """Finds a video: its path or contents, yet to decode, or its frames."""
        video = self.videos[number]
        if isinstance(video, Mapping) and self.column in video:
            video = video[self.column]
        if isinstance(video, Mapping):
            video = video["path"] if video.get("bytes") is None else video["bytes"]
        if isinstance(video, (str, os.PathLike)):
            return os.fspath(video)
        if isinstance(video, bytes):
            return video
        frames = np.asarray(video.convert("RGB"))[None] if hasattr(video, "convert") else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"video {number} must be a path, contents, an image, or levels 0..255 of shape (frames, height, width, "
                f"3), got {type(video).__name__} of shape {frames.shape} and type {frames.dtype}"
            )
        return _to_levels(frames)

    def _attempt(self, number: int, read: Callable[[int], torch.Tensor]) -> torch.Tensor | None:
        if self._is_broken[number]:
            return None
        try:
            return read(number)
        except (ValueError, OSError) as error:
            self._is_broken[number] = True
            warnings.warn(f"the video {self.names[number]} cannot be read and is left out: {error}", stacklevel=2)
            return None


def _take(source: str | bytes, chosen: range) -> torch.Tensor:
    """Decodes frames at one distance from each other; raises a `ValueError` where there are fewer."""
    frames = stream_video(source, start_frame=chosen.start)[1]
    taken = list(itertools.islice(frames, 0, len(chosen) * chosen.step, chosen.step))
    if len(taken) < len(chosen):
        raise ValueError(f"{len(chosen)} frames from frame {chosen.start} were asked for, but only {len(taken)} came")
    return _to_levels(np.stack(taken))


def find_videos(folder: Path) -> list[str]:
    """
    Finds videos in a folder and those in it, by the endings of their names.

    Args:
        folder (`Path`): the folder.

    Returns:
        `list[str]`: their paths, in order.

    Raises:
        ValueError: if there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"`videos` must be a folder of videos or a sequence, but there is no folder {str(folder)!r}")
    found = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"`videos` {str(folder)!r} must hold videos ({', '.join(VIDEO_SUFFIXES)}), found none")
    return found


def _shrink(source: str | bytes | torch.Tensor) -> torch.Tensor:
    """Decodes a whole video, small enough to be held."""
    levels = _to_levels(read_video(source)[0]) if isinstance(source, (str, bytes)) else source
    height, width = levels.shape[-2:]
    scale = min(1.0, _HELD_EDGE / min(height, width))
    return AutoGazeVideoProcessor().resize_levels(levels, (round(height * scale), round(width * scale)))


def _to_levels(frames: np.ndarray) -> torch.Tensor:
    # Channels stay last in memory, where resizing is fastest.
    return torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
