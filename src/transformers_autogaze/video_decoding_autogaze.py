"""
Videos in: RGB frames out of a file, a URL, bytes or a file object, with PyAV.

This module owns decoding and the choice of frames. It knows nothing of preprocessing, patches or models: what comes out
are whole levels 0..255 at the size they were filmed.
"""

import os
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO, TextIOBase
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.request import Request, urlopen

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from transformers.video_utils import VideoMetadata


# FFmpeg's flag of a stream that is a still picture, such as the cover of a song.
_COVER_PICTURE = 0x400
# FFmpeg's number of a picture that is coded without looking at others.
_INTRA_PICTURE = 1
# Containers that hold one frame in each packet, and codecs that give one frame for each: only there do time stamps tell
# which frame is which without decoding those before (VP8 has packets that show nothing, MPEG-TS a packet per field).
_SEEKABLE_FORMATS = ("mov", "matroska")
_SEEKABLE_CODECS = ("h264", "hevc", "vp9", "av1")
# Fewer frames than these are rather decoded than jumped over: the decoder has several in the works, and a jump throws
# them away.
_LEAST_JUMP = 16


def sample_indices(
    total_num_frames: int,
    video_fps: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
) -> list[int]:
    """
    Chooses frames evenly over a video, as the video processors of transformers do.

    Frame `i` of `n` is `floor(i * total_num_frames / n)`; with `fps`, `n = max(1, floor(seconds * fps))`.

    Args:
        total_num_frames (`int`): frames of the video, at least 1.
        video_fps (`float`, *optional*): frames per second of the video; needed with `fps`.
        num_frames (`int`, *optional*): how many frames to choose. Excludes `fps`.
        fps (`float`, *optional*):
            How many frames to choose per second of video, at most the video's own rate (one percent of slack lets 30
            stand for 29.97). Excludes `num_frames`. With neither, all frames are chosen.

    Returns:
        `list[int]`: indices in ascending order, none of them twice.

    Raises:
        ValueError: if both are given, or if one asks for more than the video has.

    Example:

    ```python
    >>> from transformers_autogaze.video_decoding_autogaze import sample_indices

    >>> sample_indices(64, num_frames=4)
    [0, 16, 32, 48]
    >>> sample_indices(64, video_fps=30, fps=2)
    [0, 16, 32, 48]

    ```
    """
    _check_sampling(num_frames, fps)
    if total_num_frames < 1:
        raise ValueError("the video must have at least one frame, got none")
    if fps is not None:
        if not video_fps:
            raise ValueError(
                f"`fps` is {fps}, but how many frames per second the video itself has is unknown; give `num_frames`, "
                "or `video_metadata` with `fps` if the video is an array"
            )
        if fps > 1.01 * video_fps:
            raise ValueError(f"`fps` must be at most {video_fps:g}, the video's own frames per second, got {fps}")
        # The small term keeps 2 s at 4.1 fps from becoming 8 frames where the product falls just below a whole number.
        num_frames = min(max(1, int(total_num_frames / video_fps * fps + 1e-6)), total_num_frames)
    if num_frames is None:
        return list(range(total_num_frames))
    if num_frames > total_num_frames:
        raise ValueError(f"`num_frames` must be at most {total_num_frames}, the video's frames, got {num_frames}")
    return [index * total_num_frames // num_frames for index in range(num_frames)]


def read_video(
    source: str | os.PathLike | bytes | BinaryIO, num_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes a video, or evenly chosen frames of it, on all cores.

    Only chosen frames are converted and kept. The frames are counted in the stream itself, not taken from the
    container's header, which may be wrong or silent. A frame that the file says to show rotated is rotated.

    Where a keyframe lies between chosen frames, decoding goes on from there (MP4, MOV, WebM and Matroska with H.264,
    HEVC, VP9 or AV1); the frames are those that decoding everything gives. Damage in what is left out goes unseen then.

    A damaged video gives what can be decoded, and a warning where the stream or its container tells that there should
    be more (MP4 and AVI say how many frames they hold; WebM and MPEG-TS don't, so one that is cut off reads as a short
    video). Sampling then goes over the frames that could be decoded.

    Args:
        source (`str`, `os.PathLike`, `bytes` or file object):
            Path of a video, its http(s) URL, its contents, or a binary file object, which is read from its beginning
            and stays open.
        num_frames (`int`, *optional*): how many frames to take, evenly over the video; see [`sample_indices`].
        fps (`float`, *optional*): how many frames to take per second of video. Excludes `num_frames`.

    Returns:
        `tuple` of the frames, a `np.ndarray` of shape `(frames, height, width, 3)` and type uint8 (RGB), and their
        `VideoMetadata` with the frames, rate, size and duration of the whole video and the indices of those chosen.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is no video, has no video stream or no frame that can be decoded, if a URL cannot be
            read, if the frames change their size, or if more frames are asked for than there are.

    Example:

    ```python
    >>> from transformers_autogaze.video import write_video
    >>> from transformers_autogaze.video_decoding_autogaze import read_video

    >>> _ = write_video("clip.mp4", np.zeros((30, 32, 48, 3), dtype=np.uint8), fps=15)
    >>> frames, metadata = read_video("clip.mp4", num_frames=3)
    >>> frames.shape, metadata.frames_indices, metadata.fps
    ((3, 32, 48, 3), [0, 10, 20], 15.0)

    ```
    """
    _check_sampling(num_frames, fps)
    source, name = _resolve(source)
    counted, promised, video_fps, marks = _probe(source, name)
    indices = _indices_of(name, counted, video_fps, num_frames, fps)
    if counted >= promised and _pays_to_jump(indices, marks):
        try:
            frames = _gather(_jump(source, name, indices, marks), len(indices))
            return frames, _metadata(counted, video_fps, frames[0], indices)
        except _LostError:
            pass
    frames, total = _decode(source, name, indices)
    if total and total != counted:
        # Not every packet became one frame, so the choice was made out of a wrong number.
        indices = _indices_of(name, total, video_fps, num_frames, fps)
        frames, _ = _decode(source, name, indices)
    if frames is None:
        raise ValueError(f"`source` {name} holds no frame that can be decoded; give a complete video file")
    _warn_of_damage(name, total, promised)
    return frames, _metadata(total, video_fps, frames[0], indices[: len(frames)])


def stream_video(
    source: str | os.PathLike | bytes | BinaryIO,
    num_frames: int | None = None,
    fps: float | None = None,
    start_frame: int = 0,
) -> tuple[VideoMetadata, Iterator[np.ndarray]]:
    """
    Decodes a video like [`read_video`], but frame by frame as they are asked for, so memory stays flat.

    Args:
        source, num_frames, fps: as in [`read_video`].
        start_frame (`int`, *optional*, defaults to 0): how many of the chosen frames to leave out at the beginning.

    Returns:
        `tuple` of the `VideoMetadata`, whose `frames_indices` are those of all chosen frames, and an iterator of frames
        from `start_frame` on, `np.ndarray` of shape `(height, width, 3)` and type uint8 (RGB). Frames are chosen by the
        number that the stream is to hold; where fewer can be decoded, the iterator ends early with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as [`read_video`]; a change of size only when it is reached. Also if `start_frame` lies beyond the
            end.
    """
    _check_sampling(num_frames, fps)
    source, name = _resolve(source)
    counted, promised, video_fps, marks = _probe(source, name)
    indices = _indices_of(name, counted, video_fps, num_frames, fps)
    check_start_frame(start_frame, len(indices))
    wanted = indices[start_frame:]

    def chosen() -> Iterator[np.ndarray]:
        reformatter, taken, count = VideoReformatter(), 0, 0
        if not wanted:
            return
        if _pays_to_jump(wanted, marks):
            try:
                for frame in _jump(source, name, wanted, marks):
                    yield _to_rgb(frame, reformatter)
                    taken += 1
                return
            except _LostError:
                pass  # What is missing is counted off from the beginning.
        for frame in _frames(source, name):
            if count == wanted[taken]:
                yield _to_rgb(frame, reformatter)
                taken += 1
            count += 1
            if taken == len(wanted):
                return
        _warn_of_damage(name, count, promised)

    frames = chosen()
    first = next(frames, None)
    if first is None:
        raise ValueError(f"`source` {name} holds no frame that can be decoded; give a complete video file")
    return _metadata(counted, video_fps, first, indices), chain([first], frames)


def check_start_frame(start_frame: int, count: int | None = None):
    """Checks that a stream of `count` frames (`None` if nobody knows) can begin at `start_frame`."""
    if isinstance(start_frame, bool) or not isinstance(start_frame, Integral) or start_frame < 0:
        raise ValueError(f"`start_frame` must be a whole number of at least 0, got {start_frame!r}")
    if start_frame and count is not None and start_frame >= count:
        raise ValueError(f"`start_frame` must be below {count}, the number of frames taken, got {start_frame}")


def _check_sampling(num_frames: int | None, fps: float | None):
    if num_frames is not None and fps is not None:
        raise ValueError(f"give one of `num_frames` and `fps`, not both; got {num_frames} and {fps}")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1
    ):
        raise ValueError(f"`num_frames` must be a whole number of at least 1, got {num_frames!r}")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < float("inf")):
        raise ValueError(f"`fps` must be above 0 frames per second, got {fps!r}")


def _resolve(source: Any) -> tuple[str | BinaryIO, str]:
    """Turns a source into something that can be opened twice, and its name for messages."""
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        return _download(source), source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"`source` must be a video file or an http(s) URL, but there is no {str(path)!r}")
        if not path.is_file():
            raise ValueError(f"`source` must be a video file, but {str(path)!r} is a folder or a device")
        return str(path), repr(str(path))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source), f"of {len(source)} bytes"
    if hasattr(source, "read") and not isinstance(source, TextIOBase):
        name = f"file object {getattr(source, 'name', type(source).__name__)!r}"
        return source if hasattr(source, "seekable") and source.seekable() else BytesIO(source.read()), name
    raise ValueError(f"`source` must be a path, an http(s) URL, bytes or a binary file object, got {type(source)}")


def _download(url: str) -> BytesIO:
    # Not left to FFmpeg, which does not check certificates by default.
    try:
        with urlopen(Request(url, headers={"User-Agent": "transformers-autogaze"}), timeout=60) as response:
            return BytesIO(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"`source` {url!r} could not be downloaded: {error}") from error


@contextmanager
def _open(source: str | BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """Opens a source and finds its video stream."""
    if not isinstance(source, str):
        source.seek(0)
    try:
        container = av.open(source, metadata_errors="ignore")
    except FFmpegError as error:
        raise ValueError(
            f"`source` {name} is no video that FFmpeg can open, or it is incomplete ({error.strerror}); give a "
            "complete video file such as MP4, WebM or AVI"
        ) from error
    with container:
        streams = [s for s in container.streams.video if not int(getattr(s, "disposition", 0)) & _COVER_PICTURE]
        # FFmpeg draws text files as a terminal would.
        if not streams or container.format.name == "tty":
            found = (
                sorted({stream.type for stream in container.streams}) if container.format.name != "tty" else ["text"]
            )
            raise ValueError(
                f"`source` {name} has no video stream, only {' and '.join(found) or 'nothing'}; give a video file "
                "such as MP4, WebM or AVI"
            )
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the packets of a stream as far as the file is sound; then `None`, which empties the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except FFmpegError:
        pass
    yield None


class _Marks(NamedTuple):
    """What the time stamps of a stream tell about its frames in the order of showing."""

    times: list[int]
    """Of every frame, ascending."""
    keys: list[int]
    """Of the frames that decoding can begin at, ascending."""

    def key_before(self, index: int) -> tuple[int, int]:
        """The time of the last keyframe not after a frame, and the number of the frame that it is or comes before."""
        place = bisect_right(self.keys, self.times[index]) - 1
        return (self.keys[place], bisect_left(self.times, self.keys[place])) if place >= 0 else (self.times[0], 0)


class _LostError(Exception):
    """A frame did not come where its time stamp says."""


def _probe(source: str | BinaryIO, name: str) -> tuple[int, int, float | None, _Marks | None]:
    """
    Counts the packets to show, the frames there should be, and the frames per second, without decoding.

    Also gives the time stamps, or `None` where they cannot be relied on.
    """
    with _open(source, name) as (container, stream):
        is_seekable = container.format.name.startswith(_SEEKABLE_FORMATS) and _codec_of(stream) in _SEEKABLE_CODECS
        shown, hidden, times, keys = 0, 0, [], []
        for packet in _packets(container, stream):
            if packet is None:
                continue
            shown, hidden = shown + (not packet.is_discard), hidden + packet.is_discard
            if is_seekable and (is_seekable := packet.pts is not None):
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if not packet.is_discard:
                    times.append(packet.pts)
        rate = stream.average_rate or stream.guessed_rate
        times.sort()
        is_seekable = is_seekable and all(a < b for a, b in zip(times, times[1:], strict=False))
        marks = _Marks(times, sorted(keys)) if is_seekable and len(keys) > 1 else None
        # Packets before a cut in an edited MP4 are decoded but not shown.
        return shown, max(shown, stream.frames - hidden), float(rate) if rate else None, marks


def _codec_of(stream: Any) -> str:
    """Names what a stream is coded in, not the library that decodes it (AV1 has several)."""
    context = stream.codec_context
    return getattr(context.codec, "canonical_name", context.name)


def _indices_of(
    name: str, total: int, video_fps: float | None, num_frames: int | None, fps: float | None
) -> list[int]:
    try:
        return sample_indices(total, video_fps, num_frames, fps) if total else []
    except ValueError as error:
        raise ValueError(f"`source` {name}: {error}") from error


def _metadata(total: int, video_fps: float | None, frame: np.ndarray, indices: list[int]) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=total,
        fps=video_fps,
        width=frame.shape[1],
        height=frame.shape[0],
        duration=total / video_fps if video_fps else None,
        video_backend="pyav",
        frames_indices=indices,
    )


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decodes frames from where the container stands, as far as it is sound."""
    for packet in _packets(container, stream):
        try:
            decoded = stream.decode(packet)
        except FFmpegError:
            continue
        yield from decoded


def _frames(source: str | BinaryIO, name: str) -> Iterator[Any]:
    """Decodes a video as far as it is sound; all frames have one size."""
    size = None
    with _open(source, name) as (container, stream):
        for count, frame in enumerate(_decoded(container, stream)):
            if size is not None and size != (frame.width, frame.height):
                raise ValueError(
                    f"`source` {name}: frame {count} is {frame.width}x{frame.height} pixels, those before are "
                    f"{size[0]}x{size[1]}; give a video whose frames have one size"
                )
            size = (frame.width, frame.height)
            yield frame


def _pays_to_jump(indices: Sequence[int], marks: _Marks | None) -> bool:
    """Tells whether a keyframe lies between chosen frames, or before the first, so that some need no decoding."""
    if marks is None:
        return False
    return any(
        index - before > _LEAST_JUMP and marks.key_before(index)[1] - (before + 1) >= _LEAST_JUMP
        for before, index in zip(chain([-1], indices), indices, strict=False)
    )


def _jump(source: str | BinaryIO, name: str, indices: Sequence[int], marks: _Marks) -> Iterator[Any]:
    """
    Decodes chosen frames only, from the keyframe before each where that is shorter than going on.

    Every frame is known by its time stamp. A frame that does not come, because the stream is damaged or a keyframe
    was not really one, ends this with `_LostError` before a wrong frame is given, and so does a change of size.
    """
    size, count, key = None, 0, None
    with _open(source, name) as (container, stream):
        frames = _decoded(container, stream)
        for index in indices:
            time, first = marks.key_before(index)
            if first - count >= _LEAST_JUMP:
                key = time
                try:
                    container.seek(time, stream=stream)
                except FFmpegError as error:
                    raise _LostError from error
                frames = _decoded(container, stream)
            for frame in frames:
                if frame.pts is None or frame.pts > marks.times[index]:
                    raise _LostError
                if size not in (None, (frame.width, frame.height)):
                    raise _LostError
                if key is not None and frame.pts >= key:
                    # A stream that refreshes bit by bit calls frames keys that are no whole picture by themselves.
                    if frame.pts > key or int(frame.pict_type) != _INTRA_PICTURE:
                        raise _LostError
                    key = None
                size = (frame.width, frame.height)
                if frame.pts == marks.times[index]:
                    break
            else:
                raise _LostError
            yield frame
            count = index + 1


def _to_rgb(frame: Any, reformatter: VideoReformatter) -> np.ndarray:
    frame, shape = reformatter.reformat(frame, format="rgb24"), (frame.height, frame.width, 3)
    # A view of FFmpeg's picture, whose rows may have spare bytes at their ends; copying it costs as much as resizing.
    plane = frame.planes[0]
    pixels = np.ndarray(shape, np.uint8, buffer=plane, strides=(plane.line_size, 3, 1))
    # Older PyAV does not tell the rotation.
    return np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90))


def _decode(source: str | BinaryIO, name: str, indices: Sequence[int]) -> tuple[np.ndarray | None, int]:
    """Decodes all frames and converts those at `indices`; also returns how many frames there were."""
    total = 0

    def chosen() -> Iterator[Any]:
        nonlocal total
        wanted = iter(indices)
        index = next(wanted, None)
        for frame in _frames(source, name):
            if total == index:
                yield frame
                index = next(wanted, None)
            total += 1

    return _gather(chosen(), len(indices)), total


def _gather(frames: Iterator[Any], count: int) -> np.ndarray | None:
    """Converts frames, `count` at most, into one array; `None` if there is none."""
    reformatter, pixels, taken = VideoReformatter(), None, 0
    for taken, frame in enumerate(frames, 1):
        rgb = _to_rgb(frame, reformatter)
        if pixels is None:
            pixels = np.empty((count, *rgb.shape), dtype=np.uint8)
        pixels[taken - 1] = rgb
    return pixels if pixels is None else pixels[:taken]


def _warn_of_damage(name: str, total: int, promised: int):
    if total < promised:
        warnings.warn(
            f"{name} is damaged or cut off: {total} of its {promised} frames could be decoded",
            UserWarning,
            stacklevel=3,
        )
