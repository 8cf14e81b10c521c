"""Videos of any kind, whole or cut off: what is read is what FFmpeg decodes, or there is an error that says why not."""

import io
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from av.error import FFmpegError

from transformers_autogaze import read_video, stream_video


hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

KINDS = [
    ("mp4", "libx264"),
    ("mov", "libx264"),
    ("mp4", "mpeg4"),
    ("matroska", "libx264"),
    ("matroska", "ffv1"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("mpegts", "libx264"),
    ("mpegts", "mpeg2video"),
    ("avi", "mpeg4"),
    ("avi", "mjpeg"),
    ("flv", "flv"),
]
TURNED = ("mp4", "mov")  # containers that can say how frames are turned


def is_available(codec: str) -> bool:
    try:
        return bool(av.codec.Codec(codec, "w"))
    except (ValueError, FFmpegError):
        return False


@strategies.composite
def videos(draw) -> bytes:
    """Draws a file: container, codec, size, rate, distance of keyframes, rotation, and where it is cut off, if it is."""
    container, codec = draw(strategies.sampled_from([kind for kind in KINDS if is_available(kind[1])]))
    height, width = (2 * draw(strategies.integers(8, 24)) for _ in range(2))
    rates = [Fraction(5), Fraction(25), Fraction(30000, 1001), Fraction(60)]
    rate = draw(strategies.sampled_from(rates if codec != "mpeg2video" else rates[1:]))
    count, gap = draw(strategies.integers(1, 12)), draw(strategies.integers(1, 6))
    turns = draw(strategies.integers(0, 3)) if container in TURNED else 0
    start = draw(strategies.integers(0, 2**32 - 1))
    blocks = np.random.default_rng(start).integers(0, 256, (count, 8, 8, 3), np.uint8)
    frames = blocks.repeat(-(-height // 8), 1).repeat(-(-width // 8), 2)[:, :height, :width]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.gop_size = height, width, gap
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if turns:
            stream.set_display_rotation(90 * turns)
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode())
    # The rest of a JPEG that is cut off is what lay in memory, for FFmpeg, too.
    cut = None if codec == "mjpeg" else draw(strategies.one_of(strategies.none(), strategies.floats(0, 1)))
    return file.getvalue() if cut is None else file.getvalue()[: int(cut * len(file.getvalue()))]


def decoded(data: bytes) -> list[np.ndarray]:
    """Decodes a file with PyAV alone, on one thread, as far as that goes."""
    frames = []
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            packets = container.demux(stream)
            while (packet := next(packets, None)) is not None:
                try:
                    pictures = packet.decode()
                except FFmpegError:
                    continue
                for picture in pictures:
                    frames.append(np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90)))
    except (FFmpegError, IndexError):
        pass
    return frames


def assert_equal(frames, expected: list[np.ndarray]) -> None:
    assert len(frames) == len(expected)
    for number, (one, other) in enumerate(zip(frames, expected, strict=True)):
        assert np.array_equal(one, other), number


# The same files every time, so that whoever changes something sees what it changed.
@hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)
@hypothesis.given(videos(), strategies.integers(1, 12))
def test_what_is_read_is_what_ffmpeg_decodes_or_a_clear_error(data, num_frames):
    expected = decoded(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of damage
        try:
            frames, metadata = read_video(data)
        except ValueError as error:
            assert not expected and str(error).startswith("`source` ")
            return
        assert_equal(frames, expected)
        assert metadata.frames_indices == list(range(len(expected)))
        assert_equal(list(stream_video(data)[1]), expected)
        if num_frames > len(expected):
            with pytest.raises(ValueError, match="`num_frames`"):
                read_video(data, num_frames=num_frames)
            return
        for frames, metadata in (read_video(data, num_frames=num_frames), stream_video(data, num_frames)[::-1]):
            assert_equal(list(frames), [expected[index] for index in metadata.frames_indices])
