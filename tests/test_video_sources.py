"""Where videos come from: what is opened, what is refused, and that nothing else is read."""

import base64
import enum
import functools
import http.server
import io
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from transformers_autogaze import (
    AutoGazeVideoProcessor,
    GreedyGazeSelector,
    prune_video,
    read_video,
    stream_gaze,
    stream_video,
)
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip
from transformers_autogaze.video_sources_autogaze import _best_stream


CASES = Path(__file__).parent / "fixtures" / "videos"


def grey_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.repeat(np.arange(count, dtype=np.uint8) * 10, 3 * height * width).reshape(count, height, width, 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", grey_frames(12), fps=10)


@contextmanager
def serving(handler) -> str:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers with a body and a length of its class, the body as often as `times` says."""

    body, length, times, location = b"", None, 1, None

    def do_GET(self):
        self.send_response(302 if self.location else 200)
        if self.location:
            self.send_header("Location", self.location)
        if self.length is not None:
            self.send_header("Content-Length", str(self.length))
        self.end_headers()
        try:
            for _ in range(self.times):
                self.wfile.write(self.body)
        except OSError:
            pass  # The client has had enough.

    def log_message(self, *args):
        pass


def answering(**answer):
    return serving(type("Handler", (Answer,), answer))


LISTS = {
    "ffconcat": b"ffconcat version 1.0\nfile base.ts\n",
    "hls": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nbase.ts\n#EXT-X-ENDLIST\n",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_files_are_not_followed(tmp_path, monkeypatch, clip, kind):
    write_video(tmp_path / "base.ts", grey_frames(5))
    monkeypatch.chdir(tmp_path)
    for name in ("list.mp4", "list.m3u8", "list.sdp"):
        (tmp_path / name).write_bytes(LISTS[kind])
    with (tmp_path / "list.mp4").open("rb") as file, answering(body=LISTS[kind]) as url:
        for source in ("list.mp4", "list.m3u8", "list.sdp", LISTS[kind], file, f"{url}/list.mp4", f"{url}/list.m3u8"):
            with pytest.raises(ValueError, match="is not a video that FFmpeg can open|has no video stream, only text"):
                read_video(source)


def test_a_picture_is_no_pattern_of_many(tmp_path):
    for index in range(3):
        Image.new("RGB", (8, 6), (50 * index, 0, 0)).save(tmp_path / f"p{index}.png")
    Image.new("RGB", (8, 6), (0, 200, 0)).save(tmp_path / "p%01d.png")
    for path in (tmp_path / "p%01d.png", str(tmp_path / "p%01d.png")):
        frames, _ = read_video(path)
        assert len(frames) == 1 and frames[0, 0, 0, 1] == 200
    with (tmp_path / "p%01d.png").open("rb") as file:
        assert read_video(file)[0][0, 0, 0, 1] == 200


def test_the_shared_case_is_refused():
    with pytest.raises(ValueError, match="playlists and other lists of files are not followed"):
        read_video(CASES / "ffconcat_as.mp4")


def test_answers_are_bounded(monkeypatch, clip):
    whole = clip.read_bytes()
    monkeypatch.setenv("AUTOGAZE_MAX_DOWNLOAD_BYTES", str(2**20))
    message = r"larger than 1048576 bytes; set the environment variable AUTOGAZE_MAX_DOWNLOAD_BYTES"
    with answering(body=bytes(2**16), times=10**6) as url, pytest.raises(ValueError, match=message):
        read_video(f"{url}/endless.mp4")
    with answering(length=2**40) as url, pytest.raises(ValueError, match=message):
        read_video(f"{url}/announced.mp4")
    with answering(body=whole[:500], length=len(whole)) as url:
        with pytest.raises(ValueError, match=rf"it ended after 500 of {len(whole)} bytes"):
            read_video(f"{url}/cut.mp4")
    endless = SimpleNamespace(read=lambda size: bytes(size))
    with pytest.raises(ValueError, match=message):
        read_video(endless)
    with answering(body=whole, length=len(whole)) as url:
        assert len(read_video(f"{url}/clip.mp4")[0]) == 12
        monkeypatch.setenv("AUTOGAZE_MAX_DOWNLOAD_BYTES", "many")
        with pytest.raises(ValueError, match="must be a number of bytes, got 'many'"):
            read_video(f"{url}/clip.mp4")


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/clip.mp4", "file:///etc/passwd"])
def test_redirections_stay_with_http(location):
    with answering(location=location) as url, pytest.raises(ValueError, match="could not be downloaded"):
        read_video(f"{url}/clip.mp4")


def test_urls_may_have_spaces_and_any_letters(tmp_path, clip):
    (tmp_path / "mein Vidéo.mp4").write_bytes(clip.read_bytes())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with serving(functools.partial(Quiet, directory=str(tmp_path))) as url:
        for name in ("mein Vidéo.mp4", "mein%20Vid%C3%A9o.mp4", "mein Vidéo.mp4?a=ü b#part"):
            assert len(read_video(f"{url}/{name}")[0]) == 12


def test_names_with_colons_are_read_and_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_video("run:1.mp4", grey_frames(3)).exists()
    for name in ("2024-05-01T12:30:05.mp4", "data:1.mp4", "concat:a.mp4"):
        Path(name).write_bytes(Path("run:1.mp4").read_bytes())
        assert len(read_video(name)[0]) == 3


def test_file_and_data_urls_are_read(clip):
    encoded = base64.b64encode(clip.read_bytes()).decode()
    for url in (clip.as_uri(), f"data:video/mp4;base64,{encoded}", f"file://localhost{clip}"):
        assert len(read_video(url)[0]) == 12
    with pytest.raises(ValueError) as error:
        read_video(f"data:video/mp4;base64,{encoded[:-2]}!" + "A" * 10**6)
    assert len(str(error.value)) < 500 and "data URL" in str(error.value)
    for address in ("file:///none.mp4", "A" * 10**6):
        with pytest.raises(FileNotFoundError) as error:
            read_video(address)
        assert len(str(error.value)) < 500
    for address, message in (("rtsp://host/x.mp4", "rtsp is not opened"), ("file://host/x.mp4", "on this machine")):
        with pytest.raises(ValueError, match=message):
            read_video(address)


@pytest.mark.parametrize("size", [2**10, 2**24])
def test_uploads_are_read_in_memory_and_on_disk(clip, size):
    with tempfile.SpooledTemporaryFile(max_size=size) as upload:
        upload.write(clip.read_bytes())
        assert len(read_video(upload)[0]) == 12
        metadata, frames = stream_video(upload, num_frames=3)
        assert len(list(frames)) == 3
        assert not upload.closed


def test_uploads_that_wait_say_what_to_give():
    class Upload:
        async def read(self, size: int = -1) -> bytes:
            return b""

    with pytest.raises(ValueError, match="`.file` if it is an upload"):
        read_video(Upload())


def test_rows_of_a_dataset_are_read(clip):
    path, contents = str(clip), clip.read_bytes()
    decoded = SimpleNamespace(_hf_encoded={"path": path, "bytes": None})
    processor = AutoGazeVideoProcessor(num_frames=4)
    expected = processor(path)["pixel_values_videos"][0]
    for row in ({"path": path, "bytes": None}, {"path": None, "bytes": contents}, {"path": path}, decoded):
        assert len(read_video(row, num_frames=5)[0]) == 5
        assert torch.equal(processor(row)["pixel_values_videos"][0], expected)
        assert len(processor([row, row])["pixel_values_videos"]) == 2
    with pytest.raises(ValueError, match="`path` or `bytes`, but both are None"):
        read_video({"path": None, "bytes": None})


class TorchcodecLike:
    def __init__(self, frames, rate):
        self.frames, self.metadata = torch.from_numpy(frames).permute(0, 3, 1, 2), SimpleNamespace(average_fps=rate)

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        return SimpleNamespace(data=self.frames[indices])


class DecordLike:
    def __init__(self, frames, rate):
        self.frames, self.rate = frames, rate

    def __len__(self):
        return len(self.frames)

    def get_batch(self, indices):
        return SimpleNamespace(asnumpy=lambda: self.frames[indices])

    def get_avg_fps(self):
        return self.rate


def as_load_video_gives(frames, rate):
    count = len(frames)
    return frames, VideoMetadata(total_num_frames=count, fps=rate, frames_indices=list(range(count)))


@pytest.mark.parametrize("kind", [TorchcodecLike, DecordLike, as_load_video_gives])
def test_decoders_and_loaded_videos_are_sampled_by_their_rate(kind):
    frames = grey_frames(20)
    video, processor = kind(frames, 10.0), AutoGazeVideoProcessor(do_resize=False)
    out = processor(video, fps=2, return_metadata=True)
    expected = processor(frames[::5])["pixel_values_videos"][0]
    assert torch.equal(out["pixel_values_videos"][0], expected)
    assert out["video_metadata"][0].frames_indices == [0, 5, 10, 15] and out["video_metadata"][0].fps == 10
    assert len(processor([video, video])["pixel_values_videos"]) == 2
    (chunk,) = stream_gaze(GreedyGazeSelector(), video, fps=2, tokens_per_second=100)
    assert chunk.frame_indices == [0, 5, 10, 15] and np.array_equal(chunk.frames, frames[::5])


@pytest.fixture
def torchcodec():
    try:
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:  # the package, or the FFmpeg or CUDA that it is built for
        pytest.skip(f"torchcodec cannot be loaded: {error}")
    return torchcodec.decoders


def test_frames_of_torchcodec_equal_those_of_pyav(torchcodec, tmp_path):
    path = write_video(tmp_path / "clip.mp4", render_demo_clip(20, 48, 64), fps=10)
    expected, _ = read_video(path, fps=2)
    (chunk,) = stream_gaze(GreedyGazeSelector(), torchcodec.VideoDecoder(str(path)), fps=2)
    assert chunk.frame_indices == [0, 5, 10, 15] and np.array_equal(chunk.frames, expected)
    pruning = prune_video(torchcodec.VideoDecoder(str(path)), GreedyGazeSelector(), fps=2, task_loss_requirement=0.7)
    records = list(prune_video(path, GreedyGazeSelector(), fps=2, task_loss_requirement=0.7).records())
    assert list(pruning.records()) == records and pruning.frame_times == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("codec, ending", [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("libx264", "mkv")])
@pytest.mark.parametrize("kind", ["even", "uneven", "rotated"])
def test_frames_and_times_of_torchcodec_equal_those_of_pyav(torchcodec, tmp_path, codec, ending, kind):
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        if kind == "rotated":
            stream.set_display_rotation(90)
        for number, pixels in enumerate(render_demo_clip(12, 48, 80)):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = number * (number + 1) // 2 if kind == "uneven" else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, metadata = read_video(path)
    found = torchcodec.VideoDecoder(path, dimension_order="NHWC").get_frames_in_range(0, 12)
    assert np.array_equal(found.data.numpy(), frames)
    times = found.pts_seconds.numpy()
    assert times - times[0] == pytest.approx(metadata.timestamps, abs=1e-3)


def test_a_file_that_is_cut_off_is_refused_by_torchcodec_and_read_by_pyav(torchcodec):
    with pytest.raises(ValueError, match="`source` VideoDecoder cannot decode all of the frames .*; give the path"):
        prune_video(torchcodec.VideoDecoder(CASES / "ftrunc_25.mp4"), GreedyGazeSelector()).gaze  # noqa: B018
    with pytest.warns(UserWarning, match="12 of its 50 frames could be decoded"):
        assert len(read_video(CASES / "ftrunc_25.mp4")[0]) == 12


def test_pictures_are_one_video(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path, frame in zip(paths, pixels, strict=True):
        Image.fromarray(frame).save(path)
    frames, metadata = read_video(paths, num_frames=3)
    assert np.array_equal(frames, pixels[::2]) and metadata.frames_indices == [0, 2, 4] and metadata.fps is None
    assert np.array_equal(np.stack(list(stream_video(paths, num_frames=3, start_frame=1)[1])), pixels[2::2])
    processor = AutoGazeVideoProcessor(do_resize=False)
    values = processor([str(path) for path in paths])["pixel_values_videos"]
    assert len(values) == 1 and torch.equal(values[0], processor(pixels)["pixel_values_videos"][0])
    assert len(processor([paths, paths[:2]])["pixel_values_videos"]) == 2
    (chunk,) = stream_gaze(GreedyGazeSelector(), paths)
    assert np.array_equal(chunk.frames, pixels)
    with pytest.raises(ValueError, match="list of 6 pictures: `fps` is 2, but .* is unknown"):
        read_video(paths, fps=2)
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_video([*paths, tmp_path / "none.png"])
    Image.new("RGB", (9, 9)).save(paths[3])
    with pytest.raises(ValueError, match=r"3.png' has 9x9 pixels, those before have 30x20"):
        read_video(paths)


def test_pictures_come_out_as_their_cameras_were_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert read_video([tmp_path / "phone.jpg"])[0].shape == (1, 30, 20, 3)


@pytest.mark.parametrize(
    "first, default, taken", [(False, None, 96), (True, None, 96), (False, 0, 48), (False, 1, 96)]
)
def test_the_stream_that_the_command_line_takes_is_taken(tmp_path, first, default, taken):
    """The largest, the default one before others of up to 5 million pixels more."""
    path = tmp_path / "two.mkv"
    sizes = [(64, 96), (32, 48)] if first else [(32, 48), (64, 96)]
    with av.open(str(path), "w") as container:
        streams = []
        for index, (height, width) in enumerate(sizes):
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            if not hasattr(stream, "disposition"):
                pytest.skip("this PyAV does not tell dispositions")
            stream.disposition = type(stream.disposition)(1 if index == default else 0)
            streams.append(stream)
        for stream, (height, width) in zip(streams, sizes, strict=True):
            for frame in grey_frames(3, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert read_video(path)[1].width == taken


@pytest.mark.parametrize("kind", [enum.Flag, enum.IntFlag])
def test_a_cover_picture_is_no_video_whatever_kind_of_flags_pyav_gives(tmp_path, monkeypatch, kind):
    """Releases before 16 have flags that are no numbers."""
    flags = kind("Disposition", {"none": 0, "default": 1, "attached_pic": 0x400})

    def stream(disposition, size):
        return SimpleNamespace(disposition=disposition, codec_context=SimpleNamespace(width=size, height=size))

    video = [stream(flags.attached_pic, 90), stream(flags.default, 30), stream(flags.none, 40)]
    container = SimpleNamespace(streams=SimpleNamespace(video=video), format=SimpleNamespace(name="mp4"))
    assert _best_stream(container, "name") is video[1]


def test_text_files_are_refused_whatever_they_are_read_from():
    with pytest.raises(ValueError, match="got <class '_io.StringIO'>"):
        read_video(io.StringIO("text"))


def test_a_stream_of_an_unknown_codec_is_named(tmp_path):
    data = write_video(tmp_path / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8)).read_bytes()
    head = data.index(b"stsd")
    with pytest.raises(ValueError, match="has a video stream of a codec that FFmpeg does not know"):
        read_video(data[:head] + data[head:].replace(b"avc1", b"zzzz"))
