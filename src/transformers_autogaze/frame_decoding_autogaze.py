"""
Videos in: RGB frames out of a file, a URL, bytes or a file object, with PyAV.

This module owns decoding: all frames, chosen ones, or one after the other. Where videos come from, which frames to choose
and how they are turned is the matter of `video_sources_`, `video_sampling_` and `frame_orientation_autogaze`. It knows
nothing of preprocessing, patches or models: what comes out are whole levels 0..255 at the size they were filmed.
"""

import os
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from transformers.video_utils import VideoMetadata

from .frame_orientation_autogaze import shown_size
from .frame_orientation_autogaze import to_rgb as _to_rgb
from .frame_sampling_autogaze import Timeline, check_sampling, check_start_frame, measure_timeline
from .frame_sampling_autogaze import sample_indices as sample_indices
from .video_sources_autogaze import VideoSource, is_picture_list, open_video, read_pictures, resolve_source


# FFmpeg's number of a picture that is coded without looking at others.
_INTRA_PICTURE = 1
# Containers that hold one frame in each packet, and codecs that give one frame for each: only there do time stamps tell
# which frame is which without decoding those before (VP8 has packets that show nothing, MPEG-TS a packet per field).
_SEEKABLE_FORMATS = ("mov", "matroska")
_SEEKABLE_CODECS = ("h264", "hevc", "vp9", "av1")
# Fewer frames than these are rather decoded than jumped over: the decoder has several in the works, and a jump throws
# them away.
_LEAST_JUMP = 16
# Pixels that are decoded at most only to see whether they can be: those of a whole video, or from its last keyframe on.
_LARGEST_CHECK = 2**24
_Source = str | os.PathLike | bytes | BinaryIO | Sequence[str | os.PathLike]


def read_video(
    source: _Source, num_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes a video, or evenly chosen frames of it, on all cores.

    Only chosen frames are converted and kept. The frames are counted in the stream itself, not taken from the
    container's header, which may be wrong or silent, and so are their times: where they come unevenly, `fps` takes those
    on show at each `i / fps` seconds. A frame that the file says to show rotated or mirrored is. Of several video streams
    the one is taken that FFmpeg's command line takes: the largest, or one marked as default that is not far smaller.

    Where a keyframe lies between chosen frames, decoding goes on from there (MP4, MOV, WebM and Matroska with H.264,
    HEVC, VP9 or AV1); the frames are those that decoding everything gives. Damage in what is left out goes unseen then.

    A damaged video gives what can be decoded, and a warning where the stream or its container tells that there should
    be more (MP4 and AVI say how many frames they hold; WebM and MPEG-TS don't, so one that is cut off reads as a short
    video). Sampling then goes over the frames that could be decoded.

    Only formats that hold what they show are opened. Those that name other files or addresses (playlists such as HLS and
    DASH, ffconcat, SDP) are refused, whatever the file is called. Of a URL or another source that cannot be rewound at
    most 1 GiB is read; the environment variable `AUTOGAZE_MAX_DOWNLOAD_BYTES` sets another bound.

    Args:
        source (`str`, `os.PathLike`, `bytes`, file object, `dict` or `list`):
            Path of a video, its http(s), file or data URL, its contents, or a binary file object, which is read from its
            beginning and stays open; a row of a `datasets` Video column, `{"path": .., "bytes": ..}` or decoded; or a list
            of pictures' paths, which are one video without a rate.
        num_frames (`int`, *optional*):
            How many frames to take, evenly over the video; see [`~frame_sampling_autogaze.sample_indices`].
        fps (`float`, *optional*): how many frames to take per second of video. Excludes `num_frames`.

    Returns:
        `tuple` of the frames, a `np.ndarray` of shape `(frames, height, width, 3)` and type uint8 (RGB), and their
        `VideoMetadata` with the frames, rate, size and duration of the whole video and the indices of those chosen. Where
        frames come unevenly, it has their `frame_times` in seconds, too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is no video, has no video stream or no frame that can be decoded, if a URL cannot be
            read, if the frames change their size, or if more frames are asked for than there are.

    Example:

    ```python
    >>> from transformers_autogaze.video import write_video
    >>> from transformers_autogaze.frame_decoding_autogaze import read_video

    >>> _ = write_video("clip.mp4", np.zeros((30, 32, 48, 3), dtype=np.uint8), fps=15)
    >>> frames, metadata = read_video("clip.mp4", num_frames=3)
    >>> frames.shape, metadata.frames_indices, metadata.fps
    ((3, 32, 48, 3), [0, 10, 20], 15.0)

    ```
    """
    check_sampling(num_frames, fps)
    if is_picture_list(source):
        indices, timeline = _choose_pictures(source, num_frames, fps)
        frames = np.stack(list(read_pictures(source, indices)))
        return frames, timeline.metadata(frames[0], indices)
    source = resolve_source(source)
    track = _probe(source)
    indices = _indices_of(source, track.timeline, num_frames, fps, track.promised)
    if track.is_whole and _pays_to_jump(indices, track.marks) and _ends_decode(source, track):
        try:
            frames = _gather(_jump(source, indices, track.marks), len(indices))
            return frames, track.timeline.metadata(frames[0], indices)
        except _LostError:
            pass
    frames, stamps = _decode(source, indices, track.threads)
    while len(stamps) != track.timeline.count:
        # Not every packet became one frame, so the choice was made out of a wrong number.
        track = track.counted(stamps)
        indices = _indices_of(source, track.timeline, num_frames, fps, track.promised)
        frames, stamps = _decode(source, indices, track.threads)
    if frames is None:
        raise _no_frame(source)
    _warn_of_damage(source, track)
    return frames, track.timeline.metadata(frames[0], indices)


def stream_video(
    source: _Source, num_frames: int | None = None, fps: float | None = None, start_frame: int = 0
) -> tuple[VideoMetadata, Iterator[np.ndarray]]:
    """
    Decodes a video like [`read_video`], but frame by frame as they are asked for, so memory stays flat.

    Args:
        source, num_frames, fps: as in [`read_video`].
        start_frame (`int`, *optional*, defaults to 0): how many of the chosen frames to leave out at the beginning.

    Returns:
        `tuple` of the `VideoMetadata`, whose `frames_indices` are those of all chosen frames, and an iterator of frames
        from `start_frame` on, `np.ndarray` of shape `(height, width, 3)` and type uint8 (RGB). The frames of a file that
        looks damaged, or whose first or last frames don't decode, are counted by decoding it once before. Where damage
        shows only on the way, the iterator ends early with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as [`read_video`]; a change of size only when it is reached. Also if `start_frame` lies beyond the
            end.
    """
    check_sampling(num_frames, fps)
    if is_picture_list(source):
        indices, timeline = _choose_pictures(source, num_frames, fps)
        check_start_frame(start_frame, len(indices))
        frames = read_pictures(source, indices[start_frame:])
    else:
        source = resolve_source(source)
        is_sampled = num_frames is not None or fps is not None
        # From the middle of all frames on, many short clips are read of one video: it is not looked through each time, but
        # decoded in a way in which damage costs no other frames.
        is_checked = is_sampled or not start_frame
        track = _checked_probe(source, is_sampled) if is_checked else _probe(source)._replace(threads="SLICE")
        timeline = track.timeline
        indices = _indices_of(source, timeline, num_frames, fps, track.promised)
        check_start_frame(start_frame, len(indices))
        frames = _stream(source, indices[start_frame:], track)
    first = next(frames, None)
    if first is None:
        raise _no_frame(source)
    return timeline.metadata(first, indices), chain([first], frames)


def _stream(source: VideoSource, wanted: list[int], track: "_Track") -> Iterator[np.ndarray]:
    """Yields chosen frames as they are asked for, as far as they can be decoded."""
    reformatter, taken, count = VideoReformatter(), 0, 0
    if not wanted:
        return
    if track.is_whole and _pays_to_jump(wanted, track.marks):
        try:
            for frame in _jump(source, wanted, track.marks):
                yield _to_rgb(frame, reformatter)
                taken += 1
            return
        except _LostError:
            pass  # What is missing is counted off from the beginning.
    for frame in _frames(source, track.threads):
        if count == wanted[taken]:
            yield _to_rgb(frame, reformatter)
            taken += 1
        count += 1
        if taken == len(wanted):
            return
    _warn_of_damage(source, track, count)


def _choose_pictures(
    paths: Sequence[str | os.PathLike], num_frames: int | None, fps: float | None
) -> tuple[list[int], Timeline]:
    timeline = Timeline(len(paths))
    return _indices_of(VideoSource("", f"list of {len(paths)} pictures"), timeline, num_frames, fps), timeline


def _no_frame(source: VideoSource) -> ValueError:
    return ValueError(f"`source` {source.name} holds no frame that can be decoded; give a complete video file")


def _indices_of(
    source: VideoSource, timeline: Timeline, num_frames: int | None, fps: float | None, promised: int = 0
) -> list[int]:
    try:
        return timeline.choose(num_frames, fps) if timeline.count else []
    except ValueError as error:
        note = ""
        if num_frames is not None and timeline.count < promised:
            note = f"; the file is damaged or cut off: {timeline.count} of its {promised} frames can be decoded"
        raise ValueError(f"`source` {source.name}: {error}{note}") from error


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


class _Track(NamedTuple):
    """What is known of a video stream before its frames are taken."""

    timeline: Timeline
    promised: int
    """Frames that there should be."""
    marks: _Marks | None
    """`None` where time stamps cannot be relied on."""
    is_whole: bool
    """Whether nothing speaks of damage so far."""
    pixels: int
    """Of a frame."""
    start: int | None
    """When the first frame is to come."""
    tick: Fraction | None
    rates: list[Fraction | None]
    threads: str = "AUTO"

    def counted(self, stamps: list[int | None]) -> "_Track":
        """The same, with the time stamps of the frames that were decoded in place of those of packets."""
        timeline = measure_timeline(stamps, self.tick, self.rates)
        # Threads lose frames beside those that are damaged; without them every run gives the same.
        return self._replace(timeline=timeline, marks=None, is_whole=False, threads="SLICE")


class _LostError(Exception):
    """A frame did not come where its time stamp says."""


def _probe(source: VideoSource) -> _Track:
    """Counts the packets to show and notes their times, without decoding."""
    with open_video(source) as (container, stream):
        is_seekable = container.format.name.startswith(_SEEKABLE_FORMATS) and _codec_of(stream) in _SEEKABLE_CODECS
        hidden, stamps, keys, is_whole, latest, last = 0, [], [], True, None, None
        width = _length_bytes(stream)
        for packet in _packets(container, stream):
            if packet is None:
                continue
            is_whole = is_whole and not packet.is_corrupt and (not width or _is_built_well(packet, width))
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if packet.is_discard:
                # Packets before a cut in an edited MP4 are decoded but not shown.
                hidden += 1
                continue
            stamps.append(packet.pts)
            if packet.pts is not None and (latest is None or packet.pts > latest):
                latest, last = packet.pts, packet.duration
        rates, context = [stream.average_rate, stream.guessed_rate], stream.codec_context
        promised = max(len(stamps), stream.frames - hidden)
        timeline = measure_timeline(stamps, stream.time_base, rates, last)
        times = sorted(stamps) if None not in stamps else []
        is_seekable = (
            is_seekable and bool(times and keys) and all(a < b for a, b in zip(times, times[1:], strict=False))
        )
        return _Track(
            timeline,
            promised,
            marks=_Marks(times, sorted(keys)) if is_seekable else None,
            is_whole=is_whole and len(stamps) == promised,
            pixels=context.width * context.height,
            start=times[0] if times else None,
            tick=stream.time_base,
            rates=rates,
        )


def _checked_probe(source: VideoSource, is_sampled: bool) -> _Track:
    """Counts the frames of a video and notes their times, by decoding them where its packets may not tell."""
    track = _probe(source)
    # Little is decoded twice without much ado. Without marks the end is only found by decoding all, which is not worth it
    # where a long video is taken whole.
    is_long = track.timeline.count * track.pixels > _LARGEST_CHECK
    if track.is_whole and is_long and (track.marks or not is_sampled) and _ends_decode(source, track):
        return track
    stamps = [frame.pts for frame in _frames(source, track.threads)]
    while len(stamps) != track.timeline.count:
        track = track.counted(stamps)
        stamps = [frame.pts for frame in _frames(source, track.threads)]
    _warn_of_damage(source, track)
    return track


def _ends_decode(source: VideoSource, track: _Track) -> bool:
    """Tells whether the first frame of a video and those from its last keyframe on come where they should."""
    with open_video(source) as (container, stream):
        first = next(_decoded(container, stream), None)
        if first is None or first.pts != track.start:
            return False
        if track.marks is None:
            return True
        times, key = track.marks.times, track.marks.keys[-1]
        tail = times[bisect_left(times, key) :]
        # From the keyframe before, for some are no whole pictures by themselves.
        begin = track.marks.keys[-2:][0]
        if (len(times) - bisect_left(times, begin)) * track.pixels > _LARGEST_CHECK:
            return True
        try:
            container.seek(begin, stream=stream)
        except FFmpegError:
            return False
        return [frame.pts for frame in _decoded(container, stream) if frame.pts is None or frame.pts >= key] == tail


def _length_bytes(stream: Any) -> int:
    """Gives how many bytes tell the length of each part of an H.264 or HEVC packet; 0 where they do not."""
    header, place = stream.codec_context.extradata or b"", {"h264": 4, "hevc": 21}.get(_codec_of(stream))
    return (header[place] & 3) + 1 if place and len(header) > place and header[0] == 1 else 0


def _is_built_well(packet: Any, width: int) -> bool:
    """Tells whether the parts of an H.264 or HEVC packet fill it; what was overwritten hardly ever does."""
    data, start = memoryview(packet), 0
    while start + width < len(data):
        length = int.from_bytes(data[start : start + width], "big")
        if not length or data[start + width] & 0x80:
            return False
        start += width + length
    return start == len(data)


def _codec_of(stream: Any) -> str:
    """Names what a stream is coded in, not the library that decodes it (AV1 has several)."""
    context = stream.codec_context
    return getattr(context.codec, "canonical_name", context.name)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the packets of a stream as far as the file is sound; then `None`, which empties the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except FFmpegError:
        pass
    yield None


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decodes frames from where the container stands, as far as it is sound."""
    for packet in _packets(container, stream):
        try:
            decoded = stream.decode(packet)
        except FFmpegError:
            continue
        yield from decoded


def _frames(source: VideoSource, threads: str) -> Iterator[Any]:
    """Decodes a video as far as it is sound; all frames have one size."""
    size = None
    with open_video(source, threads) as (container, stream):
        for count, frame in enumerate(_decoded(container, stream)):
            own = shown_size(frame)
            if size not in (None, own):
                raise ValueError(
                    f"`source` {source.name}: frame {count} is {own[0]}x{own[1]} pixels, those before are "
                    f"{size[0]}x{size[1]}; give a video whose frames have one size"
                )
            size = own
            yield frame


def _pays_to_jump(indices: Sequence[int], marks: _Marks | None) -> bool:
    """Tells whether a keyframe lies between chosen frames, or before the first, so that some need no decoding."""
    if marks is None:
        return False
    return any(
        index - before > _LEAST_JUMP and marks.key_before(index)[1] - (before + 1) >= _LEAST_JUMP
        for before, index in zip(chain([-1], indices), indices, strict=False)
    )


def _jump(source: VideoSource, indices: Sequence[int], marks: _Marks) -> Iterator[Any]:
    """
    Decodes chosen frames only, from the keyframe before each where that is shorter than going on.

    Every frame is known by its time stamp. A frame that does not come, because the stream is damaged or a keyframe
    was not really one, ends this with `_LostError` before a wrong frame is given, and so does a change of size.
    """
    size, count, key = None, 0, None
    with open_video(source) as (container, stream):
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
                if size not in (None, shown_size(frame)):
                    raise _LostError
                if key is not None and frame.pts >= key:
                    # A stream that refreshes bit by bit calls frames keys that are no whole picture by themselves.
                    if frame.pts > key or int(frame.pict_type) != _INTRA_PICTURE:
                        raise _LostError
                    key = None
                size = shown_size(frame)
                if frame.pts == marks.times[index]:
                    break
            else:
                raise _LostError
            yield frame
            count = index + 1


def _decode(source: VideoSource, indices: Sequence[int], threads: str) -> tuple[np.ndarray | None, list[int | None]]:
    """Decodes all frames and converts those at `indices`; also gives the time stamp of each that there was."""
    stamps: list[int | None] = []

    def chosen() -> Iterator[Any]:
        wanted = iter(indices)
        index = next(wanted, None)
        for frame in _frames(source, threads):
            if len(stamps) == index:
                yield frame
                index = next(wanted, None)
            stamps.append(frame.pts)

    return _gather(chosen(), len(indices)), stamps


def _gather(frames: Iterator[Any], count: int) -> np.ndarray | None:
    """Converts frames, `count` at most, into one array; `None` if there is none."""
    reformatter, pixels, taken = VideoReformatter(), None, 0
    for taken, frame in enumerate(frames, 1):
        rgb = _to_rgb(frame, reformatter)
        if pixels is None:
            # Not by numpy, which asks for huge pages: clearing them can take as long as decoding.
            pixels = torch.empty((count, *rgb.shape), dtype=torch.uint8).numpy()
        pixels[taken - 1] = rgb
    return pixels if pixels is None else pixels[:taken]


def _warn_of_damage(source: VideoSource, track: _Track, count: int | None = None):
    count = track.timeline.count if count is None else count
    if count < track.promised:
        warnings.warn(
            f"{source.name} is damaged or cut off: {count} of its {track.promised} frames could be decoded",
            UserWarning,
            stacklevel=3,
        )
