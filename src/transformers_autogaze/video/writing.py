"""Writing frames to video files, with PyAV."""

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from numbers import Rational, Real
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from ..utils.output_files import replacing


_TICKS = 90_000  # time units per second, as in MPEG-TS


def write_video(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = 30, times: Sequence[float] | None = None
) -> Path:
    """
    Writes frames to an H.264 video that every player can play (yuv420p), one frame in memory at a time.

    H.264 in yuv420p has even sizes only: if the height or width is odd, the last row or column is repeated once, so the
    video is one pixel larger and no pixel of a frame is lost. The encoding is lossy (constant rate factor 18).

    Args:
        path (`str` or `os.PathLike`):
            File to write, such as `clip.mp4`; its extension determines the container. An existing file is replaced when the
            video is complete, so the frames may come from the same file.
        frames (`Iterable[np.ndarray]` of shape `(height, width, 3)` and type uint8):
            RGB frames of one size, consumed one by one.
        fps (`float`, *optional*, defaults to 30): frames per second.
        times (`Sequence[float]`, *optional*):
            Ascending times of the frames in seconds, if they are uneven; `fps` is then their mean rate.

    Returns:
        `Path`: the file written.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
        ValueError: if there is no frame, a frame has another shape or type, `fps` is not positive, `times` are not
            ascending or fewer than the frames, or the container is unknown. An existing file is then unchanged.

    Example:

    ```python
    >>> from transformers_autogaze.video import write_video

    >>> write_video("fade.mp4", (np.full((32, 48, 3), 5 * i, dtype=np.uint8) for i in range(30)), fps=15).name
    'fade.mp4'

    ```
    """
    path = Path(path)
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < float("inf"):
        raise ValueError(f"`fps` must be above 0 frames per second, got {fps!r}")
    if times is not None and not all(a < b for a, b in zip(times, times[1:], strict=False)):
        raise ValueError("`times` must ascend from frame to frame")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path` must lie in a folder that exists, but there is no {str(path.parent)!r}")
    if not isinstance(frames, Iterable):
        raise ValueError(f"`frames` must be an array or an iterable of frames, got {frames!r}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("`frames` must hold at least one frame, got none")
    _check_frame(first, 0, None)
    with replacing(path) as unfinished:
        try:
            # With `file:` a name with a colon is not read as a protocol.
            container = av.open(f"file:{unfinished}", mode="w")
        except (FFmpegError, ValueError) as error:
            raise ValueError(
                f"`path` must be a file that can be written and end as in clip.mp4, got {str(path)!r}"
            ) from error
        with container:
            height, width = first.shape[:2]
            # `Fraction` does not take the floats of numpy.
            rate = Fraction(fps if isinstance(fps, Rational) else float(fps)).limit_denominator(65535)
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            # The colour space of the conversion to YUV (BT.601); players would otherwise guess it from the frame's size.
            stream.codec_context.colorspace = 6
            stream.options = {"crf": "18"}
            _encode(container, stream, chain([first], frames), first.shape, times)
            container.mux(stream.encode())
    return path


def _encode(
    container: Any, stream: Any, frames: Iterable[np.ndarray], shape: tuple[int, ...], times: Sequence[float] | None
) -> None:
    tick, (height, width) = Fraction(1, _TICKS), shape[:2]
    if times is not None:
        stream.codec_context.time_base = tick
    for index, frame in enumerate(frames):
        _check_frame(frame, index, shape)
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(padded, format="rgb24")
        if times is not None:
            if index == len(times):
                raise ValueError(f"`times` must name one time for each frame, got {len(times)}")
            picture.pts, picture.time_base = round((times[index] - times[0]) * _TICKS), tick
        container.mux(stream.encode(picture))


def _check_frame(frame: np.ndarray, index: int, shape: tuple[int, ...] | None) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        what = f"{frame.dtype} of shape {frame.shape}" if isinstance(frame, np.ndarray) else type(frame)
        raise ValueError(f"`frames[{index}]` must be a uint8 array of shape (height, width, 3), got {what}")
    if 0 in frame.shape or (shape is not None and frame.shape != shape):
        raise ValueError(f"`frames[{index}]` must have the shape {shape or 'of a picture'}, got {frame.shape}")
