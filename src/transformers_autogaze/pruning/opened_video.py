"""
Open videos: their metadata, and their frames, which can be iterated over more than once.

This module gives video files and frames of any other kind one interface; `frame_decoding_autogaze` and `streaming` read them.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from ..frame_arrays_autogaze import is_video_source, unwrap_frames
from ..frame_decoding_autogaze import stream_video
from ..video.streaming import open_source
from ..video_sources_autogaze import is_picture_list, resolve_source


class OpenedVideo:
    """
    An open video, an iterable over the frames taken from it. Every iteration reads the video again.

    Args:
        source:
            A video as [`read_video`] opens it, or frames whose number is known, as [`stream_gaze`] takes them. A source that
            cannot be rewound, such as a URL, is read once into a temporary file.
        num_frames, fps (*optional*): which frames to take; see [`stream_gaze`].

    Attributes:
        metadata (`VideoMetadata`): rate, size and duration of the whole video, and `frames_indices` of the frames taken.
        frame_times (`list[float]`, *optional*): times of the frames taken, in seconds; `None` if the video has no times.
        frame_rate (`float`, *optional*): frames taken per second of the video; `None` if its rate is unknown.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is not a video, or does not have that many frames.

    Example:

    ```python
    >>> from transformers_autogaze.pruning.opened_video import OpenedVideo

    >>> video = OpenedVideo(np.zeros((30, 48, 64, 3), dtype=np.uint8), num_frames=3)
    >>> len(video), video.metadata.frames_indices, next(iter(video)).shape
    (3, [0, 10, 20], (48, 64, 3))

    ```
    """

    def __init__(self, source: Any, num_frames: int | None = None, fps: float | None = None):
        self._is_file = is_video_source(source)
        self._source: Any = resolve_source(source) if self._is_file and not is_picture_list(source) else source
        self._sampling = num_frames, fps
        self.metadata, self._frames = self._open()
        # Reading the metadata has opened the frames: the first iteration uses these, so that nothing is opened twice.
        metadata = self.metadata
        self.frame_times = list(metadata.timestamps) if metadata.fps else None
        self.frame_rate = metadata.fps * len(self) / max(1, metadata.total_num_frames) if metadata.fps else None

    def __len__(self) -> int:
        return len(self.metadata.frames_indices)

    def __iter__(self) -> Iterator[Any]:
        frames, self._frames = self._frames, None
        return self._open()[1] if frames is None else frames

    def _open(self) -> tuple[VideoMetadata, Iterator[Any]]:
        num_frames, fps = self._sampling
        if self._is_file:
            return stream_video(self._source, num_frames, fps)
        given, rate = unwrap_frames(self._source)
        indices, frames, _ = open_source(self._source, num_frames, fps)
        if indices is None:
            raise ValueError(
                "`source` must be a video or frames whose number is known, such as an array or a list, got "
                f"{type(self._source).__name__}; `stream_gaze` takes frames without end"
            )
        first = next(frames)
        size = np.shape(first)[:2]
        height, width = size if len(size) == 2 else (None, None)
        metadata = VideoMetadata(
            total_num_frames=len(given),
            fps=rate,
            width=width,
            height=height,
            duration=len(given) / rate if rate else None,
            frames_indices=list(indices),
        )
        return metadata, chain([first], frames)
