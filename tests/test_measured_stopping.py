import pytest
import torch
from test_generation import assert_same_gaze

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    CompositeReconstruction,
    GazeCache,
    GazeOutput,
)
from transformers_autogaze.composite_autogaze import mse_to_task_loss
from transformers_autogaze.measured_stopping_autogaze import FrameLossTracker


THRESHOLD = 0.9  # 22 dB


@pytest.fixture(scope="module")
def model(tiny) -> AutoGazeModel:
    model = tiny.model()
    model.config.stopping = "measured"
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Clips that differ in how many patches they need: coarse noise of different strength, which changes half-way."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 6, 3, 8, 8, generator=generator).double() - 0.5
    noise[:, 1:3], noise[:, 4:] = noise[:, :1], noise[:, 3:4]
    noise = noise.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return 0.5 + noise * torch.tensor([0.3, 0.6, 1.0])[:, None, None, None, None]


@pytest.fixture(scope="module")
def video(pixels) -> torch.Tensor:
    return AutoGazeProcessor().video_processor.to_pixel_values(pixels * 255).double()


def test_every_frame_meets_its_threshold_with_the_patch_that_does_or_uses_its_budget(model, video, pixels):
    gaze = model.generate(video, gazing_ratio=0.9, task_loss_requirement=THRESHOLD)
    composite, budget = CompositeReconstruction(model.config.grid), int(0.9 * 21)
    assert len(set(gaze.num_real_each_frame.flatten().tolist())) > 3
    loss, after = composite(pixels, gaze).loss, mse_to_task_loss(composite.measure(pixels, gaze))
    is_full = gaze.num_real_each_frame == budget
    assert ((loss <= THRESHOLD) | is_full).all() and (loss <= THRESHOLD).float().mean() > 0.8
    for clip in range(3):
        for frame in range(6):
            slots = (gaze.frame_of_slot == frame) & ~gaze.if_padded_gazing[clip]
            # No patch was taken after the loss was met.
            assert (after[clip, slots][:-1] > THRESHOLD).all()


def test_ids_are_those_without_a_threshold_cut_short(model, video):
    whole = model.generate(video[:, :1], gazing_ratio=0.9)
    short = model.generate(video[:, :1], gazing_ratio=0.9, task_loss_requirement=THRESHOLD)
    for clip in range(3):
        count = int(short.num_real[clip])
        assert torch.equal(short.gazing_pos[clip, :count], whole.gazing_pos[clip, :count])
        assert short.if_padded_gazing[clip, count:].all()


def test_a_loose_threshold_keeps_one_patch_and_an_impossible_one_the_budget(model, video):
    assert (model.generate(video, task_loss_requirement=5.0).num_real_each_frame == 1).all()
    assert (model.generate(video, gazing_ratio=0.5, task_loss_requirement=-9.0).num_real_each_frame == 10).all()


def test_a_clip_gets_in_a_batch_what_it_gets_alone(model, video):
    batch = model.generate(video, gazing_ratio=0.9, task_loss_requirement=THRESHOLD)
    for clip in range(3):
        alone = model.generate(video[clip : clip + 1], gazing_ratio=0.9, task_loss_requirement=THRESHOLD)
        assert_same_gaze(batch.select(clip), alone)


def test_a_stream_equals_the_whole_clip_also_where_frames_without_a_threshold_are_between(model, video):
    cache, call = GazeCache(), {"gazing_ratio": 0.9, "task_loss_requirement": THRESHOLD}
    parts = [model.generate(part, **call, past_key_values=cache) for part in video.split([1, 2, 3], 1)]
    assert_same_gaze(GazeOutput.concatenate(parts), model.generate(video, **call))
    thresholds = [-9.0, -9.0, *[THRESHOLD] * 4]
    expected = model.generate(video, gazing_ratio=0.3, task_loss_requirement=thresholds)
    cache.reset()
    first = model.generate(video[:, :2], gazing_ratio=0.3, past_key_values=cache)
    second = model.generate(video[:, 2:], gazing_ratio=0.3, task_loss_requirement=THRESHOLD, past_key_values=cache)
    assert torch.equal(
        torch.cat(GazeOutput.concatenate([first, second]).gazing_mask, -1), torch.cat(expected.gazing_mask, -1)
    )


def test_steps_on_fixed_memory_stop_alike(model, video, monkeypatch):
    call = {"gazing_ratio": 0.9, "task_loss_requirement": THRESHOLD}
    plain = model.generate(video, **call)
    monkeypatch.setattr(AutoGazeModel, "_replays_steps", lambda self: True)
    assert_same_gaze(model.generate(video, **call), plain)


def test_tracked_losses_are_those_of_the_reconstruction(model, pixels):
    composite = CompositeReconstruction(model.config.grid)
    ids = torch.tensor([[20, 0, 3, 5], [1, 5, 2, 20], [9, 8, 7, 6]])
    tracker = FrameLossTracker(composite, pixels)
    tracker.begin_frame()
    first, second = (tracker.add_patches([0, 1, 2], part) for part in ids.split([3, 1], dim=1))
    losses = torch.cat([first, second[:, 1:]], dim=1)
    gaze = GazeOutput.from_ids(ids, torch.zeros_like(ids, dtype=torch.bool), torch.tensor([4]), composite.grid)
    after = mse_to_task_loss(composite.measure(pixels[:, :1], gaze))
    torch.testing.assert_close(losses[:, 1:], after, rtol=0, atol=1e-6)
    before = mse_to_task_loss((pixels[:, 0] - 0.5).square().mean((1, 2, 3)))
    torch.testing.assert_close(losses[:, 0], before, rtol=0, atol=1e-6)
    tracker.end_frame(ids)
    torch.testing.assert_close(tracker.reconstruction, composite.reconstruct(pixels[:, :1], gaze)[:, 0])


def test_it_is_saved_and_checked(model, tmp_path):
    AutoGazeConfig(stopping="measured", image_mean=[0.5] * 3).save_pretrained(tmp_path)
    loaded = AutoGazeConfig.from_pretrained(tmp_path)
    assert loaded.stopping == "measured" and loaded.image_mean == [0.5] * 3
    assert AutoGazeConfig().stopping == "predicted"
    with pytest.raises(ValueError, match="`stopping` must be one of .*, got 'never'"):
        AutoGazeConfig(stopping="never")
    with pytest.raises(ValueError, match="`image_std` must be positive"):
        AutoGazeConfig(image_std=[0.0, 1.0, 1.0])
