import functools
import http.server
import io
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import transformers
from packaging.version import Version
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from transformers_autogaze import frame_decoding_autogaze
from transformers_autogaze.frame_decoding_autogaze import read_video, sample_indices, stream_video
from transformers_autogaze.video import write_video


CASES = Path(__file__).parent / "fixtures" / "videos"


def grey_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `i` is grey of level `6 * i`, so a decoded frame tells its index."""
    return (
        np.arange(0, 6 * count, 6, dtype=np.uint8)[:, None, None, None].repeat(height, 1).repeat(width, 2).repeat(3, 3)
    )


def indices_of(frames: np.ndarray) -> list[int]:
    return np.round(frames.mean((1, 2, 3)) / 6).astype(int).tolist()


def encode(path, sizes, codec: str = "libx264", rotation: int = 0, **options) -> bytes:
    """Encodes one grey frame for each `(height, width)`, with any codec, container and muxer options."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *sizes[0], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in grey_frames(len(sizes), *sizes[0]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", grey_frames(40), fps=20)


def test_all_frames_come_out_in_order_with_their_metadata(clip):
    frames, metadata = read_video(clip)
    assert frames.shape == (40, 48, 64, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - grey_frames(40)).max() <= 3
    assert metadata == VideoMetadata(
        total_num_frames=40,
        fps=20.0,
        width=64,
        height=48,
        duration=2.0,
        video_backend="pyav",
        frames_indices=list(range(40)),
    )


@pytest.mark.parametrize("sampling", [{"num_frames": 5}, {"fps": 2.5}])
def test_chosen_frames_are_spread_evenly(clip, sampling):
    frames, metadata = read_video(clip, **sampling)
    assert indices_of(frames) == metadata.frames_indices == [0, 8, 16, 24, 32]
    assert metadata.total_num_frames == 40 and metadata.duration == 2.0


def test_only_chosen_frames_are_converted(clip, monkeypatch):
    converted = []

    class Counting:
        def __init__(self, reformatter=frame_decoding_autogaze.VideoReformatter):
            self.reformatter = reformatter()

        def reformat(self, frame, **kwargs):
            converted.append(frame.pts)
            return self.reformatter.reformat(frame, **kwargs)

    monkeypatch.setattr(frame_decoding_autogaze, "VideoReformatter", Counting)
    read_video(clip, num_frames=3)
    assert len(converted) == 3


@pytest.mark.parametrize("sampling", [{}, {"num_frames": 5}, {"fps": 2.5}])
def test_a_stream_gives_the_same_frames_one_by_one(clip, sampling, monkeypatch):
    converted = []
    to_rgb = frame_decoding_autogaze._to_rgb
    monkeypatch.setattr(frame_decoding_autogaze, "_to_rgb", lambda *a: converted.append(1) or to_rgb(*a))
    metadata, stream = stream_video(clip, **sampling)
    assert len(converted) == 1  # the first, which tells the size
    streamed = list(stream)
    frames, expected = read_video(clip, **sampling)
    assert metadata == expected
    assert np.array_equal(np.stack(streamed), frames)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.22"), reason="chose otherwise before")
def test_sampling_agrees_with_transformers():
    for total in (1, 7, 64, 300):
        metadata = VideoMetadata(total_num_frames=total, fps=25.0)
        for choice in ({"num_frames": 1}, {"num_frames": min(total, 7)}, {"fps": 1.5}, {"fps": 25}, {}):
            theirs = default_sample_indices_fn(metadata, **choice)
            assert sample_indices(total, 25.0, **choice) == list(theirs), (total, choice)


def test_thirty_frames_per_second_can_be_asked_of_television_rates():
    assert sample_indices(3000, 30000 / 1001, fps=30) == list(range(3000))


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"num_frames": 41}, "`num_frames` must be at most 40, the video's frames, got 41"),
        ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number of at least 1, got 2.5"),
        ({"fps": 30}, "`fps` must be at most 20, the video's own frames per second, got 30"),
        ({"fps": -1}, "`fps` must be above 0 frames per second, got -1"),
        ({"num_frames": 4, "fps": 2}, "give one of `num_frames` and `fps`, not both; got 4 and 2"),
    ],
)
def test_impossible_samplings_say_what_would_be_right(clip, choice, message):
    with pytest.raises(ValueError, match=message):
        read_video(clip, **choice)


def test_rate_unknown_is_said_when_sampling_by_it():
    with pytest.raises(ValueError, match="`fps` is 2, but how many frames per second the video itself has is unknown"):
        sample_indices(10, None, fps=2)


def test_every_kind_of_source_gives_the_same_frames(clip):
    expected, _ = read_video(str(clip), num_frames=4)

    class Pipe(io.RawIOBase):
        """A stream that cannot be rewound, such as the answer to a request."""

        read = io.BytesIO(clip.read_bytes()).read

    with clip.open("rb") as file:
        file.read(100)
        for source in (
            clip,
            clip.read_bytes(),
            bytearray(clip.read_bytes()),
            io.BytesIO(clip.read_bytes()),
            file,
            Pipe(),
        ):
            frames, _ = read_video(source, num_frames=4)
            assert np.array_equal(frames, expected), type(source)
        assert not file.closed


def test_urls_are_read_and_refused_by_name(clip):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        frames, metadata = read_video(f"{url}/clip.mp4", num_frames=4)
        with pytest.raises(ValueError, match=rf"`source` '{url}/none.mp4' could not be downloaded: .*404"):
            read_video(f"{url}/none.mp4")
        server.shutdown()
    assert metadata.frames_indices == indices_of(frames) == [0, 10, 20, 30]


def test_what_is_no_video_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no video\n" * 200)
    (tmp_path / "junk.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(FileNotFoundError, match="there is no .*none.mp4"):
        read_video(tmp_path / "none.mp4")
    for source, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "notes.txt", "notes.txt' has no video stream, only text"),
        (tmp_path / "junk.mp4", "junk.mp4' is not a video that FFmpeg can open"),
        (b"", "of 0 bytes is not a video"),
        (io.StringIO("text"), "must be a path, an http"),
        (7, "must be a path, an http"),
    ):
        with pytest.raises(ValueError, match=message):
            read_video(source)


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="sound.wav' has no video stream, only audio"):
        read_video(tmp_path / "sound.wav")


def test_frames_are_counted_where_the_container_does_not_say(tmp_path):
    encode(tmp_path / "clip.webm", [(32, 32)] * 20, codec="libvpx-vp9")
    with av.open(str(tmp_path / "clip.webm")) as container:
        assert container.streams.video[0].frames == 0
    frames, metadata = read_video(tmp_path / "clip.webm", num_frames=4)
    assert metadata.total_num_frames == 20
    assert indices_of(frames) == metadata.frames_indices == [0, 5, 10, 15]


@pytest.mark.parametrize(
    "ending, options, jumps",
    [
        ("mp4", {"g": "8", "bf": "2"}, True),
        ("mkv", {"g": "8", "bf": "3", "x264-params": "open-gop=1"}, True),
        ("mp4", {"g": "1000", "sc_threshold": "0"}, False),  # the only keyframe is the first
        ("ts", {"g": "8", "bf": "2"}, False),  # its packets need not be frames
        ("mp4", {"g": "8", "bf": "0", "intra-refresh": "1"}, None),  # its keyframes are no whole pictures
    ],
)
def test_seeking_gives_the_frames_that_scanning_gives(tmp_path, monkeypatch, ending, options, jumps):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for index in range(60):
            frame = np.roll(noise, 3 * index, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

    decoded = []
    decode = frame_decoding_autogaze._decoded

    def counting(*args):
        for frame in decode(*args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(frame_decoding_autogaze, "_decoded", counting)
    monkeypatch.setattr(frame_decoding_autogaze, "_MIN_SKIPPED", 4)
    for count in (1, 2, 3, 7, 11, 60):
        frames, metadata = read_video(path, num_frames=count)
        sought = len(decoded)
        streamed = np.stack(list(stream_video(path, num_frames=count)[1]))
        resumed = np.stack(list(stream_video(path, num_frames=count, start_frame=count // 2)[1]))
        with monkeypatch.context() as scanning:
            scanning.setattr(frame_decoding_autogaze, "_is_seeking_faster", lambda *args: False)
            expected = read_video(path, num_frames=count)
        assert np.array_equal(frames, expected[0]) and metadata == expected[1]
        assert np.array_equal(streamed, frames) and np.array_equal(resumed, frames[count // 2 :])
        if count == 3 and jumps is not None:
            assert (sought < 30) if jumps else (sought == 60)
        decoded.clear()


def test_streams_start_where_they_are_told(clip):
    metadata, stream = stream_video(clip, num_frames=5, start_frame=3)
    assert metadata.frames_indices == [0, 8, 16, 24, 32] and indices_of(np.stack(list(stream))) == [24, 32]
    for start, message in ((5, "below 5, the number of frames taken, got 5"), (-1, "at least 0, got -1")):
        with pytest.raises(ValueError, match=f"`start_frame` must be .*{message}"):
            stream_video(clip, num_frames=5, start_frame=start)


def test_file_cut_off_before_its_index_is_refused(clip):
    with pytest.raises(ValueError, match="or it is incomplete"):
        read_video(clip.read_bytes()[:-500])


def test_file_cut_off_after_its_index_gives_what_is_there_and_one_warning(tmp_path):
    whole = encode(tmp_path / "clip.mp4", [(48, 64)] * 40, options={"movflags": "faststart"})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        middle = list(container.demux())[20]
    part = whole[: middle.pos + middle.size // 2]
    with pytest.warns(UserWarning) as caught:
        frames, metadata = read_video(part)
    count = metadata.total_num_frames
    assert [str(w.message).split(": ")[1] for w in caught] == [f"{count} of its 40 frames could be decoded"]
    assert 5 < count == len(frames) < 35 and indices_of(frames)[:5] == [0, 1, 2, 3, 4]
    with pytest.warns(UserWarning, match="damaged or cut off"):
        assert 5 < len(list(stream_video(part)[1])) < 35
    with pytest.warns(UserWarning):
        frames, metadata = read_video(part, num_frames=3)
    assert metadata.frames_indices == [0, count // 3, 2 * count // 3] and len(frames) == 3
    for read in (read_video, stream_video):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = r"at most \d+, .*, got 40; the file is damaged or cut off: \d+ of its 40 frames can be decoded"
            with pytest.raises(ValueError, match=message):
                read(part, num_frames=40)


def test_a_cut_fragment_gives_what_ffmpeg_gives():
    with pytest.warns(UserWarning) as caught:
        frames, metadata = read_video(CASES / "ftrunc_25.mp4")
    assert [str(w.message).split(": ")[1] for w in caught] == ["12 of its 50 frames could be decoded"]
    # The means of the frames that FFmpeg decodes.
    expected = [123.3, 123.4, 123.7, 123.8, 124.0, 124.2, 124.2, 124.3, 124.2, 124.2, 124.3, 124.3]
    assert np.allclose(frames.mean((1, 2, 3)), expected, atol=0.1)
    assert metadata.total_num_frames == 12 and metadata.frames_indices == list(range(12))
    with pytest.warns(UserWarning) as caught:
        again, stream = stream_video(CASES / "ftrunc_25.mp4")
        assert np.array_equal(np.stack(list(stream)), frames) and again == metadata
    assert len(caught) == 1


def moving(count: int) -> list[np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    return [np.roll(noise, 3 * index, axis=1) for index in range(count)]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "flv", "ts"])
@pytest.mark.parametrize("gop", [12, 250])
@pytest.mark.parametrize("damaged", [slice(0, 20), slice(80, 95), slice(40, 50)], ids=["start", "end", "middle"])
def test_damaged_files_are_sampled_and_streamed_alike(tmp_path, ending, gop, damaged):
    """Zeros in place of packets: their number stays, but they are no frames."""
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(gop), "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving(95):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame)):
                container.mux(packet)
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    contents = bytearray(path.read_bytes())
    for place, size in packets[damaged]:
        contents[place + 8 : place + size - 8] = bytes(max(0, size - 16))
        contents[place : place + 4] = bytes(4) if ending == "mp4" else contents[place : place + 4]
    for options in ({}, {"num_frames": 7}, {"fps": 5}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if damaged.start == 0 and gop == 250:
                with pytest.raises(ValueError, match="no frame that can be decoded|has no video stream"):
                    read_video(bytes(contents), **options)
                continue
            frames, metadata = read_video(bytes(contents), **options)
            assert metadata.frames_indices[-1] < metadata.total_num_frames and len(frames) == len(
                metadata.frames_indices
            )
            streamed, stream = stream_video(bytes(contents), **options)
            rest = np.stack(list(stream))
        assert streamed == metadata and np.array_equal(rest, frames)


def test_frames_that_an_edit_cuts_off_are_neither_counted_nor_missed(tmp_path):
    path = tmp_path / "edited.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "0", "g": "40"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        packets = [p for frame in grey_frames(20) for p in stream.encode(av.VideoFrame.from_ndarray(frame))]
        for packet in packets + stream.encode():
            # Five frames before time zero are there to decode from, not to show.
            early = int(Fraction(5, 30) / packet.time_base)
            packet.pts, packet.dts = packet.pts - early, packet.dts - early
            container.mux(packet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, metadata = read_video(path, num_frames=3)
    assert metadata.total_num_frames == 15
    assert indices_of(frames) == [5, 10, 15]


def test_frames_that_change_size_are_refused(tmp_path):
    streams = [
        encode(tmp_path / f"{size[0]}.h264", [size] * 3, options={"bf": "0"}, format="h264")
        for size in ((32, 64), (48, 64))
    ]
    with pytest.raises(ValueError, match="frame 3 is 64x48 pixels, those before are 64x32"):
        read_video(b"".join(streams))
    with pytest.raises(ValueError, match="frame 3 is 64x48 pixels"):
        list(stream_video(b"".join(streams))[1])


@pytest.mark.skipif(not hasattr(av.VideoFrame, "rotation"), reason="this PyAV does not tell the rotation")
def test_rotated_videos_come_out_upright(tmp_path):
    whole = np.zeros((4, 32, 64, 3), np.uint8)
    whole[:, :, 32:] = 240
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(90)
        for frame in whole:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, metadata = read_video(path)
    assert frames.shape == (4, 64, 32, 3) and (metadata.height, metadata.width) == (64, 32)
    assert frames[:, :24].min() > 200 and frames[:, 40:].max() < 40


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (10, 3), (3, 10), (48, 64)])
def test_odd_sizes_are_written_with_their_last_row_and_column_repeated(tmp_path, height, width):
    path = write_video(tmp_path / "odd.mp4", grey_frames(2, height, width))
    frames, _ = read_video(path)
    assert frames.shape == (2, height + height % 2, width + width % 2, 3)
    assert indices_of(frames) == [0, 1]


def test_odd_sizes_are_read(tmp_path):
    with av.open(str(tmp_path / "odd.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = 7, 3, "bgr0"
        pixels = np.random.default_rng(0).integers(0, 256, (3, 7, 3, 3), np.uint8)
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "odd.avi")
    assert np.array_equal(frames, pixels)


def test_written_colours_are_read_back(tmp_path):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [128, 128, 128]], np.uint8)
    frames, metadata = read_video(
        write_video(tmp_path / "colours.mp4", colours[:, None, None].repeat(32, 1).repeat(32, 2), fps=29.97)
    )
    assert np.abs(frames.astype(int) - colours[:, None, None]).max() <= 4
    assert metadata.fps == pytest.approx(29.97, abs=1e-3)


def test_frames_are_written_one_by_one(tmp_path):
    alive = []

    def frames():
        for index in range(200):
            alive.append(index)
            yield np.full((16, 16, 3), index, np.uint8)

    write_video(tmp_path / "long.mp4", frames())
    assert len(alive) == 200 and len(read_video(tmp_path / "long.mp4")[0]) == 200


def test_bad_frames_are_refused_and_leave_no_file(tmp_path):
    good = np.zeros((16, 16, 3), np.uint8)
    for frames, message in (
        ([], "`frames` must hold at least one frame"),
        ([good.astype(np.float32)], r"`frames\[0\]` must be a uint8 array .* got float32"),
        ([good[..., 0]], r"`frames\[0\]` must be a uint8 array of shape"),
        ([good, good[:8]], r"`frames\[1\]` must have the shape \(16, 16, 3\), got \(8, 16, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "bad.mp4", frames)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`fps` must be above 0"):
        write_video(tmp_path / "bad.mp4", [good], fps=0)
    with pytest.raises(ValueError, match="`path` must be a file that can be written"):
        write_video(tmp_path / "bad.nothing", [good])
    with pytest.raises(FileNotFoundError, match="`path` must lie in a folder that exists"):
        write_video(tmp_path / "none" / "bad.mp4", [good])


@pytest.mark.filterwarnings("ignore:.*is damaged or cut off")
@pytest.mark.parametrize("start", [1, 6, 11])
def test_a_damaged_video_gives_all_that_is_left_from_any_frame_on(start):
    """However many cores decode it."""
    path = CASES / "ftrunc_25.mp4"
    whole = read_video(path)[0]
    assert np.array_equal(np.stack(list(stream_video(path, start_frame=start)[1])), whole[start:])
