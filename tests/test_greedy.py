import pytest
import torch
from published import SHARED
from transformers import AutoModel

from transformers_autogaze import (
    GREEDY_SELECTOR,
    AutoGazeModel,
    AutoGazeProcessor,
    GazeOutput,
    GreedyGazeCache,
    GreedyGazeConfig,
    GreedyGazeSelector,
    task_loss_to_mse,
)


@pytest.fixture(scope="module")
def selector() -> GreedyGazeSelector:
    return GreedyGazeSelector(GreedyGazeConfig(scales=[16, 32, 64]))


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    """Three clips that calm down over time, each in its own way, normalised."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 6, 3, 8, 8, generator=generator)
    for frame in range(1, 6):
        share = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1) / frame
        coarse[:, frame] = share * coarse[:, frame] + (1 - share) * coarse[:, frame - 1]
    frames = torch.nn.functional.interpolate(coarse.flatten(0, 1), 64, mode="bilinear").view(3, 6, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (2 * frames - 1 - mean[:, None, None]) / std[:, None, None]


def measured_mse(selector: GreedyGazeSelector, video: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
    pixels = selector.to_pixels(video)
    return (selector.composite.reconstruct(pixels, gaze) - pixels).square().mean((2, 3, 4))


def test_a_ratio_alone_keeps_exactly_the_budget(selector, video):
    gaze = selector.generate(video, gazing_ratio=[0.5, 0, 0.1, 0.2, 0.3, 1])
    assert gaze.num_gazing_each_frame.tolist() == [10, 1, 2, 4, 6, 21]
    assert not gaze.if_padded_gazing.any()


def test_every_frame_meets_the_threshold_or_uses_its_budget(selector, video):
    gaze = selector.generate(video, gazing_ratio=0.4, task_loss_requirement=-0.3)
    meets = measured_mse(selector, video, gaze) <= task_loss_to_mse(torch.tensor(-0.3)) * (1 + 1e-5)
    used_up = gaze.num_real_each_frame == int(0.4 * 21)
    assert (meets | used_up).all()
    assert (meets & ~used_up).any() and (used_up & ~meets).any()


def test_the_predicted_loss_is_the_measured_one(selector, video):
    gaze = selector.generate(video, gazing_ratio=0.4)
    last = gaze.num_gazing_each_frame.cumsum(0) - 1
    predicted = task_loss_to_mse(gaze.task_loss_prediction[:, last])
    torch.testing.assert_close(
        predicted, measured_mse(selector, video, gaze).to(predicted.dtype), rtol=1e-4, atol=1e-9
    )


def test_a_batch_gives_each_clip_what_it_gets_alone(selector, video):
    call = {"gazing_ratio": 0.8, "task_loss_requirement": torch.tensor([-0.3, 0.0, 0.2])}
    batch = selector.generate(video, **call)
    assert (batch.clip_num_gazing_each_frame.amax(0) != batch.clip_num_gazing_each_frame.amin(0)).any()
    for clip in range(3):
        call["task_loss_requirement"] = [-0.3, 0.0, 0.2][clip]
        alone = selector.generate(video[clip : clip + 1], **call)
        picked = batch.select(clip)
        for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "task_loss_prediction"):
            assert torch.equal(picked[key], alone[key]), key


def test_a_stream_equals_the_whole_clip(selector, video):
    call = {"gazing_ratio": 0.5, "task_loss_requirement": 0.0}
    whole = selector.generate(video, **call)
    cache = GreedyGazeCache()
    parts = [
        selector.generate(part, **call, past_key_values=cache, use_cache=True) for part in video.split([1, 2, 3], 1)
    ]
    assert torch.equal(GazeOutput.concatenate(parts).gazing_pos, whole.gazing_pos)
    with pytest.raises(ValueError, match="`past_key_values` holds 3 clips, but 1 are given now"):
        selector.generate(video[:1], **call, past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` must be a GreedyGazeCache, got int"):
        selector.generate(video, **call, past_key_values=3)
    cache.reset()
    assert torch.equal(selector.generate(video, **call, past_key_values=cache).gazing_pos, whole.gazing_pos)


def test_it_chooses_among_the_patches_of_any_grid(selector, video):
    frames = torch.nn.functional.interpolate(video.flatten(0, 1), 112, mode="bilinear").view(3, 6, 3, 112, 112)
    target = {"target_scales": [28, 56, 112], "target_patch_size": 14}
    gaze = selector.generate(frames, gazing_ratio=0.5, **target)
    own = GreedyGazeSelector(GreedyGazeConfig(scales=[28, 56, 112], patch_size=14))
    assert torch.equal(gaze.gazing_pos, own.generate(frames, gazing_ratio=0.5).gazing_pos)
    assert (gaze.num_real_each_frame == int(0.5 * (4 + 16 + 64))).all()
    whole = selector.generate(frames[..., :56], gazing_ratio=0.5, target_scales=[(112, 56)], target_patch_size=14)
    assert whole.grid.grids == ((8, 4),) and (whole.num_real_each_frame == 16).all()


def test_the_configuration_decides_when_nothing_is_given(selector, video):
    gaze = selector.generate(video)
    expected = selector.generate(video, gazing_ratio=0.75, task_loss_requirement=0.7)
    assert torch.equal(gaze.gazing_pos, expected.gazing_pos)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_is_taken(selector, video, dtype):
    assert selector.generate(video.to(dtype), gazing_ratio=0.5).num_real.tolist() == [60] * 3


def test_pixels_are_those_that_the_processor_saw():
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    processed = AutoGazeProcessor()(videos=frames, input_data_format="channels_last", return_tensors="pt")
    pixels = GreedyGazeSelector().to_pixels(processed["pixel_values_videos"])
    torch.testing.assert_close(pixels[0], frames.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-6)


def test_the_shipped_folder_has_the_defaults_of_the_classes():
    default = AutoModel.from_pretrained(GREEDY_SELECTOR)
    assert type(default) is GreedyGazeSelector
    own = GreedyGazeConfig()
    for key in ("scales", "patch_size", "gazing_ratio", "task_loss_requirement", "image_mean", "image_std"):
        assert getattr(default.config, key) == getattr(own, key), key
    shipped, fresh = AutoGazeProcessor.from_pretrained(GREEDY_SELECTOR), AutoGazeProcessor()
    for key in ("size", "rescale_factor", "offset", "image_mean", "image_std", "resample"):
        one, other = getattr(shipped.video_processor, key), getattr(fresh.video_processor, key)
        assert one == other or list(one) == list(other), key


def test_saving_and_loading_keeps_the_configuration(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    assert GreedyGazeSelector.from_pretrained(tmp_path).config.scales == [16, 32, 64]
    assert AutoModel.from_pretrained(tmp_path).config.scales == [16, 32, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gazing_ratio": 1.2}, "`gazing_ratio` must lie in 0..1, got 1.2"),
        ({"gazing_ratio": "0.5"}, "`gazing_ratio` must be a finite number, got '0.5'"),
        ({"task_loss_requirement": float("nan")}, "`task_loss_requirement` must be a number, got nan"),
        ({"task_loss_requirement": None}, "`task_loss_requirement` must be a number, got None"),
        ({"image_std": [1, 0, 1]}, "three values of `image_std` must be positive"),
        ({"scales": [10]}, r"`scales\[0\]`"),
    ],
)
def test_bad_configurations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GreedyGazeConfig(**arguments)


@pytest.mark.skipif(not (SHARED / "videos").exists(), reason="the real clips are not here")
def test_the_example_clip_reaches_its_quality():
    processor, selector = AutoGazeProcessor(), GreedyGazeSelector()
    inputs = processor(videos=SHARED / "videos" / "example_input.mp4", return_tensors="pt")
    clips = inputs["pixel_values_videos"].view(4, 16, 3, 224, 224)
    for patches, least in ((26, [32.5, 30.8, 31.1, 30.1]), (66, [39.5, 38.0, 38.0, 36.5])):
        gaze = selector.generate(clips, gazing_ratio=patches / 265)
        assert (gaze.num_real_each_frame == patches).all()
        psnr = -10 * measured_mse(selector, clips, gaze).mean(1).log10()
        assert (psnr >= torch.tensor(least)).all()
    gaze = selector.generate(clips, gazing_ratio=0.75, task_loss_requirement=0.7)
    psnr = -10 * measured_mse(selector, clips, gaze).log10()
    assert (psnr[gaze.num_real_each_frame < 198] >= 26 - 1e-4).all()


def test_the_model_and_the_greedy_selector_share_their_interface():
    assert AutoGazeModel.generate is GreedyGazeSelector.generate
