import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from transformers_autogaze import video_processing_autogaze
from transformers_autogaze.video import write_video
from transformers_autogaze.video_processing_autogaze import AutoGazeVideoProcessor


SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "processor"
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
PUBLISHED = """{"do_resize": true, "size": {"shortest_edge": 224}, "do_center_crop": false, "do_rescale": true,
"rescale_factor": 0.00784313725490196, "offset": true, "do_normalize": true, "image_mean": [0.485, 0.456, 0.406],
"image_std": [0.229, 0.224, 0.225], "image_processor_type": "AutoGazeImageProcessor", "resample": 2,
"crop_size": {"height": 224, "width": 224}}"""


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def picture(height: int, width: int) -> np.ndarray:
    """A frame with slopes, edges and noise, of shape `(height, width, 3)`."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x / width, 255 * y / height, 255 * ((x // 8 + y // 8) % 2)], -1)
    return (0.8 * slopes + 0.2 * noise(height, width, 3)).astype(np.uint8)


def levels(processor: AutoGazeVideoProcessor, *args, **kwargs) -> torch.Tensor:
    """What the processor made of one video, back in levels: `(frames, 3, height, width)`."""
    return 255 * processor.to_pixels(processor(*args, **kwargs)["pixel_values_videos"][0])


@pytest.fixture(scope="module")
def processor():
    return AutoGazeVideoProcessor()


@pytest.fixture(scope="module")
def plain():
    """Changes nothing but the scale, so that what comes in can be compared with what goes out."""
    return AutoGazeVideoProcessor(do_resize=False)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared fixtures")
@pytest.mark.parametrize("clip", ["bunny_7", "example_input"])
def test_published_preprocessing_is_reproduced(clip):
    expected = load_file(SHARED / "expected.safetensors")
    published = AutoGazeVideoProcessor.from_pretrained(SHARED)
    raw = expected[f"{clip}.raw"]
    for case, size in (("shortest_edge_224", None), ("square_392", {"height": 392, "width": 392})):
        ours = published(raw, size=size, return_tensors="pt")["pixel_values_videos"]
        theirs = expected[f"{clip}.{case}"]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        deviation = 255 * (published.to_pixels(ours) - published.to_pixels(theirs)).abs()
        assert deviation.max() < 1.001 and (deviation > 0.5).float().mean() < 0.002


@pytest.mark.parametrize("height, width", [(448, 798), (300, 200), (100, 60), (7, 5), (3, 8), (1, 1), (224, 100)])
def test_resize_is_within_one_level_of_pil(processor, height, width):
    video = np.stack([picture(height, width), noise(height, width, 3)])
    for size in ({"height": 56, "width": 90}, {"shortest_edge": 64}):
        ours = levels(processor, video, size=size, input_data_format="channels_last")
        theirs = [Image.fromarray(frame).resize((ours.shape[3], ours.shape[2]), Image.BILINEAR) for frame in video]
        theirs = torch.from_numpy(np.stack([np.asarray(frame) for frame in theirs])).permute(0, 3, 1, 2)
        assert (ours - theirs).abs().max() < 1.001
        in_floats = video_processing_autogaze._resize_in_floats(
            torch.from_numpy(video).permute(0, 3, 1, 2), tuple(ours.shape[2:]), 2
        )
        assert (in_floats - theirs).abs().max() < 1.001


def test_published_values_are_rescaled_and_then_normalised_too(processor):
    video = np.full((1, 224, 224, 3), 51, np.uint8)
    expected = ((51 / 127.5 - 1) - MEAN) / STD
    ours = processor(video, return_tensors="pt")["pixel_values_videos"]
    assert ours.shape == (1, 1, 3, 224, 224) and ours.dtype == torch.float32
    torch.testing.assert_close(ours[0, 0], expected.expand(3, 224, 224))


@pytest.mark.parametrize(
    "height, width, size, expected",
    [
        (448, 798, {"shortest_edge": 224}, (224, 399)),
        (798, 448, {"shortest_edge": 224}, (399, 224)),
        (100, 301, 50, (50, 150)),
        (100, 301, {"height": 20, "width": 30}, (20, 30)),
    ],
)
def test_size_can_be_an_edge_or_both(processor, height, width, size, expected):
    video = noise(1, height, width, 3)
    assert levels(processor, video, size=size).shape[2:] == expected
    assert levels(AutoGazeVideoProcessor(size=size), video).shape[2:] == expected


def test_frames_of_the_right_size_are_not_resized(processor, monkeypatch):
    video = noise(2, 224, 300, 3)
    monkeypatch.setattr(video_processing_autogaze.F, "interpolate", None)
    expected = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(levels(processor, video), expected, atol=1e-3, rtol=0)


def test_middle_is_cropped_and_padded_with_black(plain):
    video = noise(1, 10, 7, 3)
    cropped = levels(plain, video, do_center_crop=True, crop_size={"height": 4, "width": 9})
    expected = np.zeros((4, 9, 3))
    expected[:, 1:8] = video[0, 3:7]
    torch.testing.assert_close(cropped[0], torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"offset": False, "rescale_factor": 1 / 255},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_pixels_come_back(options):
    video = noise(2, 9, 11, 3)
    processor = AutoGazeVideoProcessor(do_resize=False, **options)
    values = processor(video, return_tensors="pt")["pixel_values_videos"]
    expected = torch.from_numpy(video).permute(0, 3, 1, 2)[None] / 255
    torch.testing.assert_close(processor.to_pixels(values), expected, atol=1e-5, rtol=0)
    assert processor.to_pixels(values.double().requires_grad_()).requires_grad


def test_frames_can_be_resized_and_normalised_in_two_steps(processor):
    video = noise(3, 50, 70, 3)
    steps = processor.resize_levels(torch.from_numpy(video).permute(0, 3, 1, 2), (32, 40))
    assert steps.dtype == torch.uint8
    expected = processor(video, size={"height": 32, "width": 40}, return_tensors="pt")["pixel_values_videos"][0]
    assert torch.equal(processor.to_pixel_values(steps), expected)


FORMS = {
    "array, channels last": lambda v: v,
    "array, channels first": lambda v: v.transpose(0, 3, 1, 2),
    "tensor, channels last": lambda v: torch.from_numpy(v),
    "tensor, channels first": lambda v: torch.from_numpy(v).permute(0, 3, 1, 2),
    "batch of one, five dimensions": lambda v: v[None],
    "list of one video": lambda v: [v],
    "nested as by chat templates": lambda v: [[v]],
    "list of PIL images": lambda v: [Image.fromarray(f) for f in v],
    "list of lists of PIL images": lambda v: [[Image.fromarray(f) for f in v]],
    "list of arrays": list,
    "list of tensors": lambda v: [torch.from_numpy(f).permute(2, 0, 1) for f in v],
    "tuple of tuples": lambda v: (tuple(v),),
    "floats in 0..1": lambda v: v / 255,
    "half floats in 0..1": lambda v: torch.from_numpy(v).half() / 255,
    "floats in 0..255": lambda v: v.astype(np.float32),
    "list of arrays of floats": lambda v: list(v / 255),
    "wide integers": lambda v: v.astype(np.int64),
    "RGBA array": lambda v: np.concatenate([v, v[..., :1]], -1),
    "RGBA images": lambda v: [Image.fromarray(np.concatenate([f, f[..., :1]], -1)) for f in v],
    "read-only": lambda v: np.broadcast_to(v, v.shape),
    "mirrored view": lambda v: v[:, :, ::-1].copy()[:, :, ::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_video_gives_the_same_values(plain, form):
    video = noise(4, 5, 7, 3)
    out = plain(FORMS[form](video), num_frames=2, return_metadata=True)
    assert len(out["pixel_values_videos"]) == 1
    expected = torch.from_numpy(video[[0, 2]]).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        255 * plain.to_pixels(out["pixel_values_videos"][0]), expected.float(), atol=1e-3, rtol=0
    )
    metadata = out["video_metadata"][0]
    assert (metadata.total_num_frames, metadata.frames_indices) == (4, [0, 2])
    assert (metadata.height, metadata.width) == (5, 7)


@pytest.mark.parametrize(
    "grey",
    [
        lambda v: v[..., None],
        lambda v: v[:, None],
        list,
        lambda v: [Image.fromarray(f) for f in v],
    ],
)
def test_grey_becomes_rgb(plain, grey):
    video = noise(2, 5, 7)
    ours = levels(plain, grey(video))
    torch.testing.assert_close(ours, torch.from_numpy(video)[:, None].expand(2, 3, 5, 7).float(), atol=1e-3, rtol=0)


def test_files_are_decoded_and_sampled(plain, tmp_path):
    grey = np.arange(0, 200, 10, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    path = write_video(tmp_path / "clip.mp4", grey, fps=10)
    out = plain([str(path), path.read_bytes()], fps=2, return_metadata=True, return_tensors="pt")
    assert out["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    read = 255 * plain.to_pixels(out["pixel_values_videos"])[0].mean((1, 2, 3))
    torch.testing.assert_close(read, torch.tensor([0.0, 50, 100, 150]), atol=3, rtol=0)
    assert [m.frames_indices for m in out["video_metadata"]] == [[0, 5, 10, 15]] * 2


def test_batches_are_stacked_or_listed(processor):
    videos = [noise(3, 40, 60, 3), noise(3, 80, 120, 3)]
    stacked = processor(videos, size=32, return_tensors="pt")["pixel_values_videos"]
    assert stacked.shape == (2, 3, 3, 32, 48)
    assert isinstance(processor(videos, size=32, return_tensors="np")["pixel_values_videos"], np.ndarray)
    alone = processor(videos[1], size=32)["pixel_values_videos"]
    assert isinstance(alone, list) and torch.equal(alone[0], stacked[1])
    with pytest.raises(
        ValueError, match=r"shapes \[\(3, 3, 40, 60\), \(3, 3, 80, 120\)\].* `num_frames` and a `size`"
    ):
        processor(videos, do_resize=False, return_tensors="pt")
    assert [len(v) for v in processor([videos[0], videos[1][:2]])["pixel_values_videos"]] == [3, 2]


def test_arrays_are_sampled_by_their_metadata(plain):
    video = noise(30, 4, 4, 3)
    known = VideoMetadata(total_num_frames=30, fps=10)
    for metadata in (known, {"fps": 10}, [{"fps": 10}]):
        out = plain(video, fps=1, video_metadata=metadata, return_metadata=True)
        assert out["video_metadata"][0].frames_indices == [0, 10, 20]
    assert known.frames_indices is None
    with pytest.raises(ValueError, match="`fps` is 1, but how many frames per second the video itself has is unknown"):
        plain(video, fps=1)
    with pytest.raises(ValueError, match=r"says 300 frames, but `videos\[0\]` has 30"):
        plain(video, num_frames=3, video_metadata={"total_num_frames": 300})
    with pytest.raises(ValueError, match="`video_metadata` must have one entry per video, 1, got 2"):
        plain(video, video_metadata=[{"fps": 10}] * 2)


def test_sampling_can_be_configured_and_switched_off():
    video = noise(12, 4, 4, 3)
    processor = AutoGazeVideoProcessor(num_frames=4, do_resize=False)

    def count(**kwargs):
        return len(processor(video, **kwargs)["pixel_values_videos"][0])

    assert count() == 4
    assert count(num_frames=6) == 6
    assert count(fps=5, video_metadata={"fps": 10}) == 6
    assert count(do_sample_frames=False) == 12


def test_thin_frames_work(processor):
    assert levels(processor, noise(1, 5, 3, 3)).shape == (1, 3, 373, 224)
    assert levels(processor, noise(1, 3, 5, 3), input_data_format="channels_last").shape == (1, 3, 224, 373)
    assert levels(processor, [Image.fromarray(noise(3, 3, 3))]).shape == (1, 3, 224, 224)
    assert levels(processor, noise(6, 6, 3)).shape == (1, 3, 224, 224), "one frame alone"


@pytest.mark.parametrize(
    "height, width, expected", [(2, 1000, (224, 3584)), (900, 1, (3584, 224)), (20, 300, (224, 3360))]
)
def test_extreme_shapes_stay_small(processor, height, width, expected):
    video = noise(2, height, width, 3)
    assert levels(processor, video, input_data_format="channels_last").shape[2:] == expected


def test_ambiguous_channels_are_announced_and_can_be_settled(plain):
    video = noise(2, 3, 5, 3)
    with pytest.warns(UserWarning, match="taken as channels_last; give `input_data_format` to choose"):
        assert levels(plain, video).shape == (2, 3, 3, 5)
    with pytest.warns(UserWarning, match="taken as channels_first"):
        assert levels(plain, torch.from_numpy(video)).shape == (2, 3, 5, 3)
    assert levels(plain, video, input_data_format="channels_first").shape == (2, 3, 5, 3)


@pytest.mark.parametrize(
    "videos, kwargs, message",
    [
        ([], {}, "at least one video of at least one frame, got an empty list"),
        ([[]], {}, "at least one video of at least one frame, got an empty list"),
        (noise(0, 4, 4, 3), {}, r"`videos\[0\]` must have at least one frame"),
        (noise(0, 4, 4, 3), {"num_frames": 2}, "must have at least one frame"),
        (noise(2, 0, 4, 3), {}, "frames of at least one pixel"),
        (noise(2, 8, 8, 5), {}, r"with 1, 3 or 4 channels, got \(2, 8, 8, 5\)"),
        (noise(2, 2, 8, 8), {}, r"with 1, 3 or 4 channels, got \(2, 2, 8, 8\)"),
        (noise(2, 8, 8, 3), {"input_data_format": "channels_first"}, r"got \(2, 8, 8, 3\) as channels_first"),
        (noise(2, 8, 8, 3), {"input_data_format": "thwc"}, "`input_data_format` must be 'channels_first' or"),
        (noise(8, 8), {}, r"`videos` must be a path, .* of shape \(8, 8\)"),
        (7, {}, "`videos` must be a path"),
        ([noise(4, 4, 3), noise(5, 4, 3)], {}, r"frame 1 has the shape \(5, 4, 3\) and frame 0 \(4, 4, 3\)"),
        ([Image.new("RGB", (4, 4)), noise(4, 4, 3)], {}, r"frames of one kind, got \['Image', 'ndarray'\]"),
        (np.full((1, 4, 4, 3), 1.2), {}, "floats in 0..1 or 0..255, got torch.float64 in 1.2..1.2"),
        (np.full((1, 4, 4, 3), -0.5), {}, "in -0.5..-0.5; clamp it or undo a normalisation"),
        (np.full((1, 4, 4, 3), np.nan), {}, "in nan..nan"),
        (np.full((1, 4, 4, 3), 256), {}, "torch.int64 in 256..256"),
        (np.ones((1, 4, 4, 3), bool), {}, "got torch.bool"),
        (noise(3, 4, 4, 3), {"num_frames": 4}, "`num_frames` must be at most 3"),
        ("none.mp4", {"size": {"longest_edge": 3}}, "`size` must be a number of pixels or .*'longest_edge': 3"),
        ("none.mp4", {"size": 0}, "`size` must be a number of pixels"),
        ("none.mp4", {"resample": 1}, "`resample` must be 2"),
        ("none.mp4", {"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "`crop_size` must be a number"),
        ("none.mp4", {"image_mean": [0.5, 0.5]}, "`image_mean` must be one number or three"),
    ],
)
def test_what_cannot_be_used_is_refused(processor, videos, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(videos, **kwargs)


def test_misspelt_arguments_are_refused(processor):
    with pytest.raises(TypeError, match="AutoGazeVideoProcessor knows no argument num_frame; it takes"):
        processor(noise(2, 4, 4, 3), num_frame=2)


def test_published_and_own_configurations_load(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(PUBLISHED)
    published = AutoGazeVideoProcessor.from_pretrained(tmp_path)
    video = noise(2, 30, 40, 3)
    expected = AutoGazeVideoProcessor()(video, return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(published(video, return_tensors="pt")["pixel_values_videos"], expected)
    ours = AutoGazeVideoProcessor(size={"height": 20, "width": 24}, num_frames=1, do_normalize=False, offset=False)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoGazeVideoProcessor.from_pretrained(tmp_path / "ours")
    assert {**again.to_dict(), "auto_map": None} == {**ours.to_dict(), "auto_map": None}
    assert torch.equal(again(video)["pixel_values_videos"][0], ours(video)["pixel_values_videos"][0])
    assert AutoGazeVideoProcessor.from_pretrained(tmp_path / "ours", num_frames=2).num_frames == 2
    assert "image_processor_type" not in published.to_dict()


@pytest.mark.skipif(not is_torchvision_available(), reason="AutoVideoProcessor needs torchvision")
def test_saved_code_loads_through_the_auto_class_without_the_package(tmp_path):
    AutoGazeVideoProcessor(num_frames=2).save_pretrained(tmp_path / "saved")
    script = """
import sys
sys.modules["transformers_autogaze"] = None
import numpy as np
from transformers import AutoVideoProcessor
processor = AutoVideoProcessor.from_pretrained("saved", trust_remote_code=True)
values = processor(np.zeros((4, 32, 32, 3), np.uint8), return_tensors="pt")["pixel_values_videos"]
print(type(processor).__module__.split(".")[0], values.shape)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "transformers_modules torch.Size([1, 2, 3, 224, 224])", done.stderr[-2000:]
