"""
Decoding of videos to RGB frames with PyAV: all frames, sampled ones, or one after the other.

Frames are uint8 in the size of the video. Opening videos is in `video_sources_autogaze`, sampling in `frame_sampling_autogaze`,
rotation and mirroring in `frame_orientation_autogaze`.
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

from .frame_orientation_autogaze import display_size
from .frame_orientation_autogaze import to_rgb as _to_rgb
from .frame_sampling_autogaze import Timeline, check_sampling, check_start_frame, measure_timeline
from .frame_sampling_autogaze import sample_indices as sample_indices
from .video_sources_autogaze import VideoSource, is_picture_list, open_video, read_pictures, resolve_source


# FFmpeg's type of a picture that is coded without references to others.
_INTRA_PICTURE = 1
# Containers with one frame per packet, and codecs with one displayed frame per packet. Only with these, time stamps identify
# frames without decoding earlier ones (VP8 has packets without a displayed frame, MPEG-TS a packet per field).
_SEEKABLE_FORMATS = ("mov", "matroska")
_SEEKABLE_CODECS = ("h264", "hevc", "vp9", "av1")
# Frames that seeking must skip at least: the decoder works on several frames at a time, which seeking discards.
_MIN_SKIPPED = 16
# Maximum number of pixels that are decoded only to check for damage, in a whole video or from its last keyframe on.
_MAX_CHECKED_PIXELS = 2**24
_Source = str | os.PathLike | bytes | BinaryIO | Sequence[str | os.PathLike]


def read_video(
    source: _Source, num_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes a video, or evenly sampled frames of it, on all cores.

    Only sampled frames are converted and kept. The number of frames and their times are read from the stream, not from the
    header of the container, which may be wrong or incomplete. With uneven times, `fps` takes the frames displayed at each
    `i / fps` seconds. Frames are rotated and mirrored as the file says. Of several video streams, the one that FFmpeg's
    command line chooses is decoded: the largest, or the default one if it is not much smaller.

    With a keyframe between sampled frames, decoding continues from there (MP4, MOV, WebM and Matroska with H.264, HEVC, VP9
    or AV1). The frames are the same as without seeking, but damage in skipped parts is not noticed.

    Of a damaged video, all frames that can be decoded are returned, with a warning if there should be more. MP4 and AVI
    files contain the number of their frames; WebM and MPEG-TS files do not, so a truncated one is read as a short video.
    Frames are sampled from those that can be decoded.

    Only self-contained formats are opened. Formats that refer to other files or addresses (playlists such as HLS and DASH,
    ffconcat, SDP) are refused, whatever the name of the file. At most 1 GiB is read from a URL or another source that
    cannot be rewound; the environment variable `AUTOGAZE_MAX_DOWNLOAD_BYTES` changes this limit.

    Args:
        source (`str`, `os.PathLike`, `bytes`, file object, `dict` or `list`):
            Path of a video, its http(s), file or data URL, its contents, or a binary file object, which is read from its
            beginning and not closed; a row of a `datasets` Video column, `{"path": .., "bytes": ..}` or decoded; or a list
            of paths of pictures, which is a video without a frame rate.
        num_frames (`int`, *optional*):
            Number of frames to sample evenly; see [`~frame_sampling_autogaze.sample_indices`].
        fps (`float`, *optional*): number of frames to sample per second. Excludes `num_frames`.

    Returns:
        `tuple` of the frames, a `np.ndarray` of shape `(frames, height, width, 3)` and type uint8 (RGB), and their
        `VideoMetadata` with the number of frames, rate, size and duration of the whole video and the sampled indices. With
        uneven times, it also has `frame_times` in seconds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is not a video, has no video stream or no frame that can be decoded, if a URL cannot be
            read, if the frames change their size, or if more frames are requested than there are.

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
    video = resolve_source(source)
    track = _probe(video)
    indices = _indices_of(video, track.timeline, num_frames, fps, track.expected)
    if track.is_intact and _is_seeking_faster(indices, track.seek_table) and _first_and_last_decode(video, track):
        try:
            frames = _gather(_decode_by_seeking(video, indices, track.seek_table), len(indices))
            return frames, track.timeline.metadata(frames[0], indices)
        except _FrameNotFoundError:
            pass
    frames, stamps = _decode(video, indices, track.threads)
    while len(stamps) != track.timeline.num_frames:
        # The number of packets was not that of frames, so the indices are wrong.
        track = track.counted(stamps)
        indices = _indices_of(video, track.timeline, num_frames, fps, track.expected)
        frames, stamps = _decode(video, indices, track.threads)
    if frames is None:
        raise _no_frame(video)
    _warn_about_damage(video, track)
    return frames, track.timeline.metadata(frames[0], indices)


def stream_video(
    source: _Source, num_frames: int | None = None, fps: float | None = None, start_frame: int = 0
) -> tuple[VideoMetadata, Iterator[np.ndarray]]:
    """
    Decodes a video like [`read_video`], but frame by frame on request, so that memory stays constant.

    Args:
        source, num_frames, fps: as in [`read_video`].
        start_frame (`int`, *optional*, defaults to 0): number of sampled frames to skip at the beginning.

    Returns:
        `tuple` of the `VideoMetadata`, with the `frames_indices` of all sampled frames, and an iterator of frames from
        `start_frame` on, `np.ndarray` of shape `(height, width, 3)` and type uint8 (RGB). If a file seems damaged, or its
        first or last frames cannot be decoded, it is decoded once before to count its frames. If damage appears later, the
        iterator ends early with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as [`read_video`]; a change of size only when it is reached. Also if `start_frame` is beyond the end.
    """
    check_sampling(num_frames, fps)
    if is_picture_list(source):
        indices, timeline = _choose_pictures(source, num_frames, fps)
        check_start_frame(start_frame, len(indices))
        frames = read_pictures(source, indices[start_frame:])
        first = next(frames)
    else:
        video = resolve_source(source)
        is_sampled = num_frames is not None or fps is not None
        # With `start_frame` and no sampling, callers read many short clips of one video. The video is not checked each time;
        # instead it is decoded so that damage affects no other frames.
        is_checked = is_sampled or not start_frame
        track = _checked_probe(video, is_sampled) if is_checked else _probe(video)._replace(threads="SLICE")
        timeline = track.timeline
        indices = _indices_of(video, timeline, num_frames, fps, track.expected)
        check_start_frame(start_frame, len(indices))
        frames = _stream(video, indices[start_frame:], track)
        first = next(frames, None)
        if first is None:
            raise _no_frame(video)
    return timeline.metadata(first, indices), chain([first], frames)


def _stream(source: VideoSource, wanted: list[int], track: "_Track") -> Iterator[np.ndarray]:
    """Yields sampled frames as far as they can be decoded."""
    reformatter, taken, count = VideoReformatter(), 0, 0
    if not wanted:
        return
    if track.is_intact and _is_seeking_faster(wanted, track.seek_table):
        try:
            for frame in _decode_by_seeking(source, wanted, track.seek_table):
                yield _to_rgb(frame, reformatter)
                taken += 1
            return
        except _FrameNotFoundError:
            pass  # the remaining frames are decoded from the beginning
    for frame in _frames(source, track.threads):
        if count == wanted[taken]:
            yield _to_rgb(frame, reformatter)
            taken += 1
        count += 1
        if taken == len(wanted):
            return
    _warn_about_damage(source, track, count)


def _choose_pictures(
    paths: Sequence[str | os.PathLike], num_frames: int | None, fps: float | None
) -> tuple[list[int], Timeline]:
    timeline = Timeline(len(paths))
    return _indices_of(VideoSource("", f"list of {len(paths)} pictures"), timeline, num_frames, fps), timeline


def _no_frame(source: VideoSource) -> ValueError:
    return ValueError(f"`source` {source.name} holds no frame that can be decoded; give a complete video file")


def _indices_of(
    source: VideoSource, timeline: Timeline, num_frames: int | None, fps: float | None, expected: int = 0
) -> list[int]:
    try:
        return timeline.choose(num_frames, fps) if timeline.num_frames else []
    except ValueError as error:
        note = ""
        if num_frames is not None and timeline.num_frames < expected:
            note = f"; the file is damaged or cut off: {timeline.num_frames} of its {expected} frames can be decoded"
        raise ValueError(f"`source` {source.name}: {error}{note}") from error


class _SeekTable(NamedTuple):
    """Time stamps of the frames of a stream in display order."""

    times: list[int]
    """Time stamps of all frames, ascending."""
    keys: list[int]
    """Time stamps of keyframes, ascending."""

    def key_before(self, index: int) -> tuple[int, int]:
        """Returns the time stamp of the last keyframe up to a frame, and the index of the first frame from there on."""
        place = bisect_right(self.keys, self.times[index]) - 1
        return (self.keys[place], bisect_left(self.times, self.keys[place])) if place >= 0 else (self.times[0], 0)


class _Track(NamedTuple):
    """Information about a video stream before decoding."""

    timeline: Timeline
    expected: int
    """Expected number of frames."""
    seek_table: _SeekTable | None
    """`None` where time stamps are not reliable."""
    is_intact: bool
    """Whether there is no sign of damage so far."""
    pixels: int
    """Number of pixels of a frame."""
    start: int | None
    """Time stamp of the first frame."""
    tick: Fraction | None
    rates: list[Fraction | None]
    threads: str = "AUTO"

    def counted(self, stamps: list[int | None]) -> "_Track":
        """Returns the same track with the time stamps of decoded frames instead of those of packets."""
        timeline = measure_timeline(stamps, self.tick, self.rates)
        # Frame threads lose further frames next to damaged ones, and not the same ones in each run.
        return self._replace(timeline=timeline, seek_table=None, is_intact=False, threads="SLICE")


class _FrameNotFoundError(Exception):
    """There is no frame with an expected time stamp."""


def _probe(source: VideoSource) -> _Track:
    """Counts the displayed packets and reads their times, without decoding."""
    with open_video(source) as (container, stream):
        is_seekable = container.format.name.startswith(_SEEKABLE_FORMATS) and _codec_of(stream) in _SEEKABLE_CODECS
        hidden, stamps, keys, is_intact, latest, last = 0, [], [], True, None, None
        width = _length_bytes(stream)
        for packet in _packets(container, stream):
            if packet is None:
                continue
            is_intact = is_intact and not packet.is_corrupt and (not width or _has_valid_lengths(packet, width))
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if packet.is_discard:
                # Packets before a cut in an edited MP4 are decoded but not displayed.
                hidden += 1
                continue
            stamps.append(packet.pts)
            if packet.pts is not None and (latest is None or packet.pts > latest):
                latest, last = packet.pts, packet.duration
        rates, context = [stream.average_rate, stream.guessed_rate], stream.codec_context
        expected = max(len(stamps), stream.frames - hidden)
        timeline = measure_timeline(stamps, stream.time_base, rates, last)
        times = sorted(stamps) if None not in stamps else []
        is_seekable = (
            is_seekable and bool(times and keys) and all(a < b for a, b in zip(times, times[1:], strict=False))
        )
        return _Track(
            timeline,
            expected,
            seek_table=_SeekTable(times, sorted(keys)) if is_seekable else None,
            is_intact=is_intact and len(stamps) == expected,
            pixels=context.width * context.height,
            start=times[0] if times else None,
            tick=stream.time_base,
            rates=rates,
        )


def _checked_probe(source: VideoSource, is_sampled: bool) -> _Track:
    """Counts the frames of a video and reads their times, by decoding them where packets are not reliable."""
    track = _probe(source)
    # Short videos are simply decoded twice. Without a seek table, the last frames are found only by decoding everything, which
    # is too slow if all frames of a long video are requested.
    is_long = track.timeline.num_frames * track.pixels > _MAX_CHECKED_PIXELS
    if track.is_intact and is_long and (track.seek_table or not is_sampled) and _first_and_last_decode(source, track):
        return track
    stamps = [frame.pts for frame in _frames(source, track.threads)]
    while len(stamps) != track.timeline.num_frames:
        track = track.counted(stamps)
        stamps = [frame.pts for frame in _frames(source, track.threads)]
    _warn_about_damage(source, track)
    return track


def _first_and_last_decode(source: VideoSource, track: _Track) -> bool:
    """Returns whether the first frame and those from the last keyframe on can be decoded, with the expected time stamps."""
    with open_video(source) as (container, stream):
        first = next(_decoded(container, stream), None)
        if first is None or first.pts != track.start:
            return False
        if track.seek_table is None:
            return True
        times, key = track.seek_table.times, track.seek_table.keys[-1]
        tail = times[bisect_left(times, key) :]
        # From the previous keyframe, as some keyframes are not complete pictures.
        begin = track.seek_table.keys[-2:][0]
        if (len(times) - bisect_left(times, begin)) * track.pixels > _MAX_CHECKED_PIXELS:
            return True
        try:
            container.seek(begin, stream=stream)
        except FFmpegError:
            return False
        return [frame.pts for frame in _decoded(container, stream) if frame.pts is None or frame.pts >= key] == tail


def _length_bytes(stream: Any) -> int:
    """Returns the number of bytes of the length of each NAL unit in an H.264 or HEVC packet; 0 if there is none."""
    header, place = stream.codec_context.extradata or b"", {"h264": 4, "hevc": 21}.get(_codec_of(stream))
    return (header[place] & 3) + 1 if place and len(header) > place and header[0] == 1 else 0


def _has_valid_lengths(packet: Any, width: int) -> bool:
    """Returns whether the NAL units of an H.264 or HEVC packet fill it exactly, which overwritten data hardly ever does."""
    data, start = memoryview(packet), 0
    while start + width < len(data):
        length = int.from_bytes(data[start : start + width], "big")
        if not length or data[start + width] & 0x80:
            return False
        start += width + length
    return start == len(data)


def _codec_of(stream: Any) -> str:
    """Returns the codec of a stream, not the name of the decoder, of which AV1 has several."""
    context = stream.codec_context
    return getattr(context.codec, "canonical_name", context.name)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yields the packets of a stream as far as they can be read, then `None`, which flushes the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except FFmpegError:
        pass
    yield None


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decodes frames from the container's current position, as far as possible."""
    for packet in _packets(container, stream):
        try:
            decoded = stream.decode(packet)
        except FFmpegError:
            continue
        yield from decoded


def _frames(source: VideoSource, threads: str) -> Iterator[Any]:
    """Decodes a video as far as possible; all frames must have one size."""
    size = None
    with open_video(source, threads) as (container, stream):
        for count, frame in enumerate(_decoded(container, stream)):
            own = display_size(frame)
            if size not in (None, own):
                raise ValueError(
                    f"`source` {source.name}: frame {count} is {own[0]}x{own[1]} pixels, those before are "
                    f"{size[0]}x{size[1]}; give a video whose frames have one size"
                )
            size = own
            yield frame


def _is_seeking_faster(indices: Sequence[int], seek_table: _SeekTable | None) -> bool:
    """Returns whether keyframes between sampled frames allow to skip enough frames."""
    if seek_table is None:
        return False
    return any(
        index - before > _MIN_SKIPPED and seek_table.key_before(index)[1] - (before + 1) >= _MIN_SKIPPED
        for before, index in zip(chain([-1], indices), indices, strict=False)
    )


def _decode_by_seeking(source: VideoSource, indices: Sequence[int], seek_table: _SeekTable) -> Iterator[Any]:
    """
    Decodes sampled frames, by seeking to the keyframe before each if that skips enough frames.

    Frames are identified by their time stamps. If one is missing, because the stream is damaged or a keyframe is not a
    complete picture, or if the size changes, `_FrameNotFoundError` is raised before a wrong frame is returned.
    """
    size, count, key = None, 0, None
    with open_video(source) as (container, stream):
        frames = _decoded(container, stream)
        for index in indices:
            time, first = seek_table.key_before(index)
            if first - count >= _MIN_SKIPPED:
                key = time
                try:
                    container.seek(time, stream=stream)
                except FFmpegError as error:
                    raise _FrameNotFoundError from error
                frames = _decoded(container, stream)
            for frame in frames:
                if frame.pts is None or frame.pts > seek_table.times[index]:
                    raise _FrameNotFoundError
                if size not in (None, display_size(frame)):
                    raise _FrameNotFoundError
                if key is not None and frame.pts >= key:
                    # Streams with gradual refresh mark frames as keyframes that are not complete pictures.
                    if frame.pts > key or int(frame.pict_type) != _INTRA_PICTURE:
                        raise _FrameNotFoundError
                    key = None
                size = display_size(frame)
                if frame.pts == seek_table.times[index]:
                    break
            else:
                raise _FrameNotFoundError
            yield frame
            count = index + 1


def _decode(source: VideoSource, indices: Sequence[int], threads: str) -> tuple[np.ndarray | None, list[int | None]]:
    """Decodes all frames and converts those at `indices`; also returns the time stamps of all frames."""
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
    """Converts at most `count` frames to one array; `None` if there is none."""
    reformatter, pixels, taken = VideoReformatter(), None, 0
    for taken, frame in enumerate(frames, 1):
        rgb = _to_rgb(frame, reformatter)
        if pixels is None:
            # Not by numpy, which asks for huge pages: clearing them can take as long as decoding.
            pixels = torch.empty((count, *rgb.shape), dtype=torch.uint8).numpy()
        pixels[taken - 1] = rgb
    return pixels if pixels is None else pixels[:taken]


def _warn_about_damage(source: VideoSource, track: _Track, count: int | None = None):
    count = track.timeline.num_frames if count is None else count
    if count < track.expected:
        warnings.warn(
            f"{source.name} is damaged or cut off: {count} of its {track.expected} frames could be decoded",
            UserWarning,
            stacklevel=3,
        )
