"""Time stamps: sampling by seconds, rates, durations and overlays go by the stream's own."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from transformers.video_utils import VideoMetadata

from transformers_autogaze import read_video, stream_video
from transformers_autogaze.cli import main
from transformers_autogaze.frame_sampling_autogaze import TimedVideoMetadata, measure_timeline
from transformers_autogaze.video import write_video


CASES = Path(__file__).parent / "fixtures" / "videos"


def grey(level: int) -> np.ndarray:
    return np.full((32, 48, 3), level, np.uint8)


# 8 frames in the first 0.6 s, then one every 1.2 s.
UNEVEN = [0.0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.48, 0.56, 1.7, 2.9, 4.1, 5.3, 6.5, 7.7, 8.9, 9.9]


def write_uneven(path: Path, times=UNEVEN, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(15 * index), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_browser_recording_is_sampled_by_its_time_stamps():
    frames, metadata = read_video(CASES / "recorder.webm", fps=1)
    assert metadata.frames_indices == [0, 10, 19, 27, 36] and len(frames) == 5
    # Those of the frames on show at 0, 1, 2, 3 and 4 s, as ffprobe tells them.
    assert metadata.timestamps == pytest.approx([0, 0.981, 1.998, 2.83, 3.979])
    assert metadata.duration == pytest.approx(5.34, abs=0.2) and metadata.fps == pytest.approx(50 / metadata.duration)
    whole = read_video(CASES / "recorder.webm")[0]
    assert np.array_equal(frames, whole[metadata.frames_indices])
    again, stream = stream_video(CASES / "recorder.webm", fps=1)
    assert again == metadata and np.array_equal(np.stack(list(stream)), frames)


def test_a_rate_that_the_header_lies_about_is_measured():
    frames, metadata = read_video(CASES / "exo_sample.flv", fps=10)
    assert (metadata.fps, metadata.duration) == (30, 1) and type(metadata) is VideoMetadata
    assert metadata.frames_indices == list(range(0, 30, 3))


@pytest.mark.parametrize("ending", ["mkv", "mp4", "flv"])
def test_uneven_frames_are_taken_when_they_are_on_show(tmp_path, ending):
    path = write_uneven(tmp_path / f"uneven.{ending}")
    frames, metadata = read_video(path, fps=1)
    on_show = [
        max(i for i, time in enumerate(UNEVEN) if time <= second + 1e-3) for second in range(round(metadata.duration))
    ]
    assert metadata.frames_indices == sorted(set(on_show))
    assert metadata.timestamps == pytest.approx([UNEVEN[index] for index in metadata.frames_indices], abs=2e-3)
    assert np.array_equal(np.round(frames.mean((1, 2, 3)) / 15), metadata.frames_indices)
    assert 9.9 < metadata.duration < 11.5


@pytest.mark.parametrize(
    "stamps, rates, fps",
    [
        ([0, 33, 67, 100, 133, 167], [Fraction(30)], 30),  # rounded, as WebM has them
        ([5, 38, 72, 105, 138, 172], [Fraction(1000), None], 30),
        ([round(1001 * i / 24) for i in range(500)], [None], 24000 / 1001),
        ([0, 40, 85, 118, 160, 199], [Fraction(25)], 25),  # a phone's clock
        ([10, None, 20], [Fraction(12)], 12),
        ([7], [Fraction(12)], 12),
        ([0, 0, 20], [Fraction(12)], 12),
    ],
)
def test_even_frames_have_a_rate(stamps, rates, fps):
    timeline = measure_timeline(stamps[::-1], Fraction(1, 1000), rates)
    assert timeline.times is None and timeline.fps == pytest.approx(fps, rel=2e-4)
    assert timeline.duration == pytest.approx(len(stamps) / fps, rel=2e-4)


def test_the_last_frame_lasts_as_long_as_the_file_says():
    timeline = measure_timeline([0, 40, 500, 540], Fraction(1, 1000), [Fraction(25)], last=2000)
    assert timeline.duration == pytest.approx(2.54) and timeline.choose(None, 1) == [0, 3]
    metadata = timeline.metadata(grey(0), [0, 3])
    assert isinstance(metadata, TimedVideoMetadata) and metadata.timestamps == pytest.approx([0, 0.54])


def test_frames_are_written_at_times_of_their_own(tmp_path):
    path = write_video(tmp_path / "out.mp4", map(grey, range(0, 90, 15)), fps=2, times=UNEVEN[5:11])
    assert read_video(path)[1].timestamps == pytest.approx([time - UNEVEN[5] for time in UNEVEN[5:11]], abs=1e-4)
    with pytest.raises(ValueError, match="`times` must name one time for each frame, got 2"):
        write_video(tmp_path / "few.mp4", map(grey, range(3)), times=[0, 1])
    with pytest.raises(ValueError, match="`times` must ascend"):
        write_video(tmp_path / "back.mp4", map(grey, range(3)), times=[0, 2, 1])


def test_overlays_and_records_have_the_times_of_the_video(tmp_path):
    path = write_uneven(tmp_path / "uneven.mkv")
    assert main(["prune", str(path), "-o", str(tmp_path / "out")]) == 0
    gaze = json.loads((tmp_path / "out" / "gaze.json").read_text())
    assert gaze["frame_times"] == pytest.approx(UNEVEN, abs=1e-3)
    overlay = read_video(tmp_path / "out" / "overlay.mp4")[1]
    assert overlay.timestamps == pytest.approx(UNEVEN, abs=2e-3)
