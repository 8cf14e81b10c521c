"""Every argument of the processor does what it says or is refused, and so is every frame that cannot be what it seems."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_autogaze import AutoGazeProcessor, GreedyGazeSelector, read_video, stream_gaze
from transformers_autogaze.video_processing_autogaze import AutoGazeVideoProcessor


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("processor", [AutoGazeVideoProcessor(), AutoGazeProcessor()])
def test_channels_can_be_put_last(frames, processor):
    first = processor(videos=frames, return_tensors="pt")["pixel_values_videos"]
    last = processor(videos=frames, data_format="channels_last", return_tensors="pt")["pixel_values_videos"]
    assert last.shape == (1, 3, 224, 298, 3) and torch.equal(last.permute(0, 1, 4, 2, 3), first)
    configured = AutoGazeVideoProcessor(data_format="channels_last")
    assert torch.equal(configured(frames, return_tensors="pt")["pixel_values_videos"], last)


def test_a_number_can_mean_a_square(frames):
    processor = AutoGazeVideoProcessor()
    for size, is_square, expected in (
        (32, True, (32, 32)),
        (32, None, (32, 42)),
        ({"shortest_edge": 32}, True, (32, 42)),
    ):
        values = processor(frames, size=size, default_to_square=is_square, return_tensors="pt")
        assert values["pixel_values_videos"].shape[-2:] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_format": "channels"}, "`data_format` must be 'channels_first' or 'channels_last', got 'channels'"),
        ({"do_pad": True}, "`do_pad` must be left out or False"),
        ({"do_convert_rgb": False}, "`do_convert_rgb` must be left out or True"),
        ({"image_std": 0.0}, "`image_std` must be numbers above 0, which pixels are divided by, got 0.0"),
        ({"image_std": [0.2, 0, 0.2]}, "`image_std` must be numbers above 0"),
        ({"image_std": float("inf")}, "`image_std` must be numbers above 0"),
        ({"image_mean": float("nan")}, "`image_mean` must be finite numbers, got nan"),
        ({"rescale_factor": 0.0}, "`rescale_factor` must be a number above 0, got 0.0"),
        ({"rescale_factor": float("nan")}, "`rescale_factor` must be a number above 0, got nan"),
    ],
)
def test_arguments_that_cannot_be_are_named(frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoGazeProcessor()(videos=frames, **arguments)
    with pytest.raises(ValueError, match=message):
        AutoGazeVideoProcessor(**arguments)(frames)


def test_metadata_may_be_nested_as_videos_are(frames):
    video, known = frames.repeat(4, 0), {"fps": 4.0, "total_num_frames": 12}
    for videos, metadata in (
        ([[video]], [[known]]),
        ([[video, video]], [[known, known]]),
        ([[video], [video]], [[known], [known]]),
    ):
        inputs = AutoGazeProcessor()(
            videos=videos, video_metadata=metadata, fps=1.0, return_metadata=True, return_tensors="pt"
        )
        assert inputs["pixel_values_videos"].shape[1] == 3
        assert [list(each.frames_indices) for each in inputs["video_metadata"]] == [[0, 4, 8]] * len(
            inputs["video_metadata"]
        )


def levels_of(videos) -> torch.Tensor:
    (clip,), _ = AutoGazeVideoProcessor().load_clips(videos)
    return clip


def test_pictures_of_sixteen_bits_and_of_numbers_keep_their_brightness():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = torch.from_numpy(grey).expand(1, 3, 16, 16)
    deep = grey.astype(np.uint16) * 257
    for picture in (
        Image.fromarray(deep),
        Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes()),
        Image.fromarray(grey.astype(np.int32)),
        Image.fromarray(grey.astype(np.float32)),
        Image.fromarray(grey.astype(np.float32) / 255),
        Image.fromarray(grey),
    ):
        assert torch.equal(levels_of([picture]), expected), picture.mode
    assert torch.equal(levels_of([Image.fromarray(grey), Image.fromarray(deep)])[1:], expected)
    for pixels in (grey.astype(np.int32) * 257, grey.astype(np.float32) * 257, np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(ValueError, match="must hold integers in 0..255, or floats in 0..1 or 0..255"):
            levels_of([Image.fromarray(pixels)])


def test_picture_files_of_sixteen_bits_keep_their_brightness(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.frombytes("I;16", (16, 16), (grey.astype("<u2") * 257).tobytes()).save(tmp_path / "deep.tiff")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "numbers.tiff")
    frames, _ = read_video([tmp_path / "deep.tiff"])
    assert np.array_equal(frames[0], grey[..., None].repeat(3, -1))
    with pytest.raises(ValueError, match="numbers.tiff' holds float32 numbers, whose range is unknown"):
        read_video([tmp_path / "numbers.tiff"])


def test_frames_that_mean_other_brightness_are_not_mixed(frames):
    floats = (frames / 255).astype(np.float32)
    for mixed in (
        [frames[0], floats[1]],
        [torch.from_numpy(frames[0]), torch.from_numpy(floats[1])],
        [Image.fromarray(frames[0, ..., 0]), Image.fromarray(floats[1, ..., 0])],
    ):
        with pytest.raises(
            ValueError, match=r"`videos\[0\]` must hold frames of one kind of numbers, but frame 1 has floats"
        ):
            AutoGazeProcessor()(videos=mixed)


def test_none_among_frames_is_an_error_and_ends_no_stream(frames):
    pictures = [Image.fromarray(frame) for frame in frames]
    for given in (list(frames), pictures, [torch.from_numpy(frame) for frame in frames]):
        with pytest.raises(ValueError, match=r"`videos` must hold videos or frames, got None in the places \[2\]"):
            AutoGazeProcessor()(videos=[*given[:2], None, given[2]])
    for given in ([*frames[:2], None, frames[2]], iter([*frames[:2], None, frames[2]])):
        with pytest.raises(ValueError, match="`source`: frame 2 must be uint8"):
            list(stream_gaze(GreedyGazeSelector(), given))
    with pytest.raises(ValueError, match="`source`: frame 1 must be uint8"):
        list(stream_gaze(GreedyGazeSelector(), iter([frames[0], None]), start_frame=1))
