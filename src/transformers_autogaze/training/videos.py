"""Collections of training videos: frames of the videos of a folder, a list or a `datasets` dataset."""

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
from ..utils.video_files import find_videos
from ..video_processing_autogaze import AutoGazeVideoProcessor


_IN_MEMORY_EDGE = 320  # pixels; maximum of the shorter side of frames that are kept in memory


class VideoCollection:
    """
    Videos by index, each read when it is accessed.

    A video that cannot be read is skipped from then on: a warning names it, and `num_skipped` counts these videos, over all
    workers of a data loader. A damaged video has only the frames that can be decoded.

    Args:
        videos (`str`, `os.PathLike` or sequence):
            A folder, which is searched recursively for files that end in one of `VIDEO_SUFFIXES`; or a sequence of
            paths, URLs, contents (`bytes`), PIL images or frames (arrays of shape `(frames, height, width, 3)`, levels
            0..255); or a `datasets` dataset with one of these in a column.
        column (`str`, *optional*, defaults to `"video"`): the column of a `datasets` dataset that holds the videos.
        in_memory (`bool`, *optional*, defaults to `False`):
            Whether to decode all videos once and keep them in memory, with at most 320 pixels on the shorter side. This is fast
            for a small collection: a second of video takes 15 MB or less.

    Raises:
        ValueError: if the folder does not exist, or there is no video.

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
            if not folder.is_dir():
                raise ValueError(
                    f"`videos` must be a folder of videos or a sequence of videos, but there is no folder {str(folder)!r}"
                )
            self.videos: Sequence[Any] = find_videos(folder)
            self.names = [Path(path).relative_to(folder).as_posix() for path in self.videos]
        else:
            self.videos = videos
            self.names = [self._name(number) for number in range(len(videos))]
        if not len(self.videos):
            raise ValueError("`videos` must hold at least one video, got none")
        # Shared memory, so that a video that fails in one worker is skipped by all.
        self._is_broken = torch.zeros(len(self.videos), dtype=torch.bool).share_memory_()
        self._lengths: dict[int, int] = {}
        self._decodable: dict[int, int] = {}
        self._in_memory: list[torch.Tensor | None] | None = None
        if in_memory:
            numbers = tqdm(range(len(self.videos)), unit="video", desc="decoding")
            self._in_memory = [
                self._read_or_skip(number, lambda number: _decode_small(self._load(number))) for number in numbers
            ]

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def num_skipped(self) -> int:
        """Number of videos found unreadable so far."""
        return int(self._is_broken.sum())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Sizes in bytes of the videos that are files or encoded bytes, by name."""
        sizes = {}
        for name, video in zip(self.names, self.videos, strict=True):
            if isinstance(video, bytes):
                sizes[name] = len(video)
            elif isinstance(video, (str, os.PathLike)) and os.path.isfile(video):
                sizes[name] = os.path.getsize(video)
        return sizes

    def read_clip(self, number: int, choose: Callable[[int], range]) -> torch.Tensor | None:
        """
        Reads frames at a constant distance.

        Args:
            number (`int`): index of the video.
            choose (`Callable`): returns the indices of the frames to read, a `range`, for the number of frames of the video.

        Returns:
            `torch.ByteTensor` of shape `(frames, 3, height, width)`, levels 0..255, or `None` if the video cannot be read.
        """

        def read(number: int) -> torch.Tensor:
            chosen = choose(self._count_frames(number))
            source = self._load(number) if self._in_memory is None else self._in_memory[number]
            if not isinstance(source, (str, bytes)):
                return source[chosen.start : chosen.stop : chosen.step]
            try:
                return _decode_range(source, chosen)
            except ValueError:
                # A damaged video may declare more frames than can be decoded.
                return _decode_range(source, choose(self._count_decodable(number, source)))

        return self._read_or_skip(number, read)

    def read_evenly(self, number: int, num_frames: int) -> torch.Tensor | None:
        """
        Reads frames sampled evenly over the whole video, as processors do.

        Args:
            number (`int`): index of the video.
            num_frames (`int`): frames to read; a video with fewer frames counts as unreadable.

        Returns:
            As [`~VideoCollection.read_clip`].
        """

        def read(number: int) -> torch.Tensor:
            source = self._load(number) if self._in_memory is None else self._in_memory[number]
            if isinstance(source, (str, bytes)):
                return _to_levels(read_video(source, num_frames)[0])
            return source[sample_indices(len(source), num_frames=num_frames)]

        return self._read_or_skip(number, read)

    def _count_frames(self, number: int) -> int:
        if number not in self._lengths:
            source = self._load(number) if self._in_memory is None else self._in_memory[number]
            if isinstance(source, (str, bytes)):
                self._lengths[number] = stream_video(source)[0].total_num_frames
            else:
                self._lengths[number] = len(source)
        return self._lengths[number]

    def _count_decodable(self, number: int, source: str | bytes) -> int:
        if number not in self._decodable:
            self._decodable[number] = sum(1 for _ in stream_video(source)[1])
        return self._decodable[number]

    def _name(self, number: int) -> str:
        """Returns the name of a video: its path, or else its index."""
        video = self.videos[number]
        return str(video) if isinstance(video, (str, os.PathLike)) else str(number)

    def _load(self, number: int) -> str | bytes | torch.Tensor:
        """Returns the path or contents of a video, or its frames if it is not encoded."""
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

    def _read_or_skip(self, number: int, read: Callable[[int], torch.Tensor]) -> torch.Tensor | None:
        if self._is_broken[number]:
            return None
        try:
            return read(number)
        except (ValueError, OSError) as error:
            self._is_broken[number] = True
            warnings.warn(f"the video {self.names[number]} cannot be read and is left out: {error}", stacklevel=2)
            return None


def _decode_range(source: str | bytes, chosen: range) -> torch.Tensor:
    """Decodes frames at a constant distance; raises a `ValueError` if there are fewer."""
    frames = stream_video(source, start_frame=chosen.start)[1]
    decoded = list(itertools.islice(frames, 0, len(chosen) * chosen.step, chosen.step))
    if len(decoded) < len(chosen):
        raise ValueError(f"only {len(decoded)} of {len(chosen)} frames from frame {chosen.start} on can be decoded")
    return _to_levels(np.stack(decoded))


def _decode_small(source: str | bytes | torch.Tensor) -> torch.Tensor:
    """Decodes a whole video and resizes it for memory."""
    levels = _to_levels(read_video(source)[0]) if isinstance(source, (str, bytes)) else source
    height, width = levels.shape[-2:]
    scale = min(1.0, _IN_MEMORY_EDGE / min(height, width))
    return AutoGazeVideoProcessor().resize_levels(levels, (round(height * scale), round(width * scale)))


def _to_levels(frames: np.ndarray) -> torch.Tensor:
    # Channels stay last in memory, where resizing is fastest.
    return torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
