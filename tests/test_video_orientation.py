"""Display matrices: frames are turned and mirrored as FFmpeg's command line does it."""

import struct
from pathlib import Path

import numpy as np
import pytest

from transformers_autogaze import read_video, stream_video
from transformers_autogaze.video import write_video


CASES = Path(__file__).parent / "fixtures" / "videos"
# What FFmpeg makes of a frame under each matrix [a b; c d].
SHOWN = {
    (1, 0, 0, 1): lambda frames: frames,
    (-1, 0, 0, 1): lambda frames: frames[:, :, ::-1],
    (1, 0, 0, -1): lambda frames: frames[:, ::-1],
    (-1, 0, 0, -1): lambda frames: np.rot90(frames, 2, axes=(1, 2)),
    (0, 1, -1, 0): lambda frames: np.rot90(frames, 3, axes=(1, 2)),
    (0, -1, 1, 0): lambda frames: np.rot90(frames, 1, axes=(1, 2)),
    (0, 1, 1, 0): lambda frames: frames.transpose(0, 2, 1, 3),
    (0, -1, -1, 0): lambda frames: frames.transpose(0, 2, 1, 3)[:, ::-1, ::-1],
    (0, 0, 0, 0): lambda frames: frames,
    (1, 0, 0, 0): lambda frames: frames,
    (2, 0, 0, 0.5): lambda frames: frames,
    (0, 3, -1, 0): lambda frames: np.rot90(frames, 3, axes=(1, 2)),
    (-0.9999, 0, 0, 0.9999): lambda frames: frames[:, :, ::-1],
    (0.9999, 0.014, -0.014, 0.9999): lambda frames: frames,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    blocks = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", blocks).read_bytes()


@pytest.mark.parametrize("matrix", SHOWN)
def test_all_orientations_are_those_of_ffmpeg(clip, matrix):
    start = clip.index(b"tkhd") + 4
    place = start + (52 if clip[start] else 40)  # of nine numbers in the header of the track
    a, b, c, d = (int(number * 65536) for number in matrix)
    turned = clip[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + clip[place + 36 :]
    expected = SHOWN[matrix](read_video(clip)[0])
    frames, metadata = read_video(turned)
    assert np.array_equal(frames, expected)
    assert (metadata.height, metadata.width) == expected.shape[1:3]
    assert np.array_equal(np.stack(list(stream_video(turned)[1])), expected)


def test_a_mirrored_video_is_mirrored():
    frames, _ = read_video(CASES / "hflip.mp4")
    # Means of four strips from left to right as FFmpeg decodes them.
    strips = [strip.mean() for strip in np.split(frames[0], 4, axis=1)]
    assert np.allclose(strips, [166.2, 112.3, 136.4, 78.2], atol=0.3)
