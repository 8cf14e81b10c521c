"""Videos out: frames into a file, with PyAV. Reading is `video_decoding_autogaze`; nothing here knows of gazes."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = 30) -> Path:
    """
    Writes frames to an H.264 video that every player shows (yuv420p), one frame in memory at a time.

    H.264 in yuv420p stores even sizes only: of an odd height or width, the last row or column is repeated once, so the
    video is one pixel larger and no pixel of a frame is lost. The encoding is lossy (constant rate factor 18, which
    looks like the original).

    Args:
        path (`str` or `os.PathLike`): file to write, such as `clip.mp4`; its ending names the container.
        frames (`Iterable[np.ndarray]` of shape `(height, width, 3)` and type uint8): RGB frames of one size, consumed
            one by one, so a generator keeps memory flat.
        fps (`float`, *optional*, defaults to 30): frames per second.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: if there is no frame, a frame has another shape or type, `fps` is not positive or the container is
            unknown. No half-written file is left behind.

    Example:

    ```python
    >>> from transformers_autogaze.video import write_video

    >>> write_video("fade.mp4", (np.full((32, 48, 3), 5 * i, dtype=np.uint8) for i in range(30)), fps=15).name
    'fade.mp4'

    ```
    """
    path = Path(path)
    if isinstance(fps, bool) or not 0 < fps < float("inf"):
        raise ValueError(f"`fps` must be above 0 frames per second, got {fps!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path` must lie in a folder that exists, but there is no {str(path.parent)!r}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("`frames` must hold at least one frame, got none")
    _check_frame(first, 0, None)
    try:
        container = av.open(str(path), mode="w")
    except (FFmpegError, ValueError) as error:
        raise ValueError(
            f"`path` must be a file that can be written and end as in clip.mp4, got {str(path)!r}"
        ) from error
    try:
        with container:
            height, width = first.shape[:2]
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(65535))
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            # Says how RGB was turned into YUV (BT.601), or players would guess by the frame's size.
            stream.codec_context.colorspace = 6
            stream.options = {"crf": "18"}
            index, frame = 0, first
            while frame is not None:
                _check_frame(frame, index, first.shape)
                padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
                index, frame = index + 1, next(frames, None)
            container.mux(stream.encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _check_frame(frame: np.ndarray, index: int, shape: tuple[int, ...] | None):
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        what = f"{frame.dtype} of shape {frame.shape}" if isinstance(frame, np.ndarray) else type(frame)
        raise ValueError(f"`frames[{index}]` must be a uint8 array of shape (height, width, 3), got {what}")
    if 0 in frame.shape or (shape is not None and frame.shape != shape):
        raise ValueError(f"`frames[{index}]` must have the shape {shape or 'of a picture'}, got {frame.shape}")
