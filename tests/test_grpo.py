import math

import pytest
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    AutoGazeVideoProcessor,
    CompositeReconstruction,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    mse_to_task_loss,
)
from transformers_autogaze.cli import main
from transformers_autogaze.composite_autogaze import ReconstructionOutput
from transformers_autogaze.training.data import GazeClipDataset
from transformers_autogaze.training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer, slot_advantages
from transformers_autogaze.training.task import GazeTask
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


def exactly(ratio: float) -> dict[str, float]:
    """Arguments for frames that all keep the same share of patches."""
    return {"ratio_min": ratio, "ratio_max": ratio, "threshold_share": 0.0}


def small_model(seed: int = 0, step_size: int = 2, frames_per_token: int = 1) -> AutoGazeModel:
    set_seed(seed)
    sizes = {"hidden_size": 32, "initializer_range": 0.1}
    model = AutoGazeModel(
        AutoGazeConfig(
            scales=[32, 64],
            image_size=64,
            initializer_range=0.1,
            vision_config={"output_size": 32, "temporal_patch_size": frames_per_token, **sizes},
            decoder_config={
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_multi_token_pred": step_size,
                **sizes,
            },
        )
    )
    # Predicted losses differ between patches, on both sides of the thresholds.
    torch.manual_seed(seed + 10)
    nn.init.normal_(model.gaze_decoder.task_loss_prediction_head.weight, mean=0.1, std=0.2)
    return model


def clips_with_bright_patches(num_clips: int, num_frames: int, size: int = 64) -> torch.Tensor:
    """Grey, slightly noisy clips; in every frame two finest patches, anywhere, are white."""
    generator = torch.Generator().manual_seed(0)
    levels = 128 + 10 * torch.randn(num_clips, num_frames, 3, size, size, generator=generator)
    patches = levels.unfold(3, size // 4, size // 4).unfold(4, size // 4, size // 4)
    for frame in patches.flatten(0, 1):
        for place in torch.randperm(16, generator=generator)[:2].tolist():
            frame[:, place // 4, place % 4] = 255
    return AutoGazeVideoProcessor().to_pixel_values(levels.clamp(0, 255).byte())


def items(clips: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values_videos": clip} for clip in clips]


def make_trainer(folder, model=None, clips=None, reconstruction=None, processing_class=None, **arguments):
    defaults = {
        "group_size": 3,
        "ratio_min": 0.3,
        "ratio_max": 0.3,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    clips = clips_with_bright_patches(4, 4) if clips is None else clips
    return AutoGazeGRPOTrainer(
        small_model() if model is None else model,
        AutoGazeGRPOConfig(str(folder), **{**defaults, **arguments}),
        reconstruction=reconstruction,
        processing_class=processing_class,
        train_dataset=items(clips),
        eval_dataset=items(clips),
    )


def random_gaze(batch_size: int, counts: list[int], generator: torch.Generator) -> GazeOutput:
    """Ids that mean nothing, with padding anywhere but in the first slot of a frame."""
    num_slots, grid = sum(counts), GazeGrid([32, 64], 16)
    padding = torch.rand(batch_size, num_slots, generator=generator) < 0.4
    frame = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    padding[:, [sum(counts[:t]) for t in range(len(counts))]] = False
    ids = torch.cat([torch.randperm(20, generator=generator)[:count] for count in counts]) + 20 * frame
    return GazeOutput.from_ids(ids.repeat(batch_size, 1), padding, torch.tensor(counts), grid)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"group_size": 1}, "`group_size` must be a whole number of at least 2.*got 1"),
        ({"group_size": 2.5}, "`group_size` must be a whole number.*got 2.5"),
        ({"discount": 0}, "`discount` must lie above 0 and not above 1, got 0"),
        ({"discount": 1.01}, "`discount` must lie above 0 and not above 1, got 1.01"),
        ({"rewarded_share": math.nan}, "`rewarded_share` must lie above 0 and not above 1, got nan"),
        ({"temperature_start": -1}, "`temperature_start` must be a positive number, got -1"),
        ({"temperature_end": 0}, "`temperature_end` must be a positive number, got 0"),
        ({"ratio_max": 1.5}, "`ratio_min` and `ratio_max` must lie in 0..1 in this order, got 1.0 and 1.5"),
        ({"threshold_share": -0.1}, "`threshold_share` must lie in 0..1.*got -0.1"),
        ({"threshold_min": 1.1}, "`threshold_min` and `threshold_max` must be .* in this order, got 1.1 and 1.0"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        AutoGazeGRPOConfig(str(tmp_path), report_to="none", **wrong)


def test_published_settings_are_the_defaults(tmp_path):
    config = AutoGazeGRPOConfig(str(tmp_path), report_to="none")
    assert (config.group_size, config.discount, config.rewarded_share) == (12, 0.995, 1 / 8)
    assert (config.temperature_start, config.temperature_end) == (3.0, 0.3)
    assert (config.threshold_share, config.threshold_min, config.threshold_max) == (1, 0.5, 1.0)
    assert (config.learning_rate, config.num_train_epochs) == (5e-4, 1)


def test_the_trainer_names_invalid_arguments(tmp_path):
    with pytest.raises(ValueError, match="`args` must be an AutoGazeGRPOConfig, got TrainingArguments"):
        AutoGazeGRPOTrainer(small_model(), TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(ValueError, match="`reconstruction` must be callable, got str"):
        make_trainer(tmp_path, reconstruction="composite")


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_advantages_equal_a_plain_loop(discount):
    generator = torch.Generator().manual_seed(1)
    counts, rewarded, group_size, num_clips = [5, 1, 4, 3], [0, 2, 3], 4, 3
    gaze = random_gaze(num_clips * group_size, counts, generator)
    rewards = torch.randn(num_clips * group_size, len(rewarded), generator=generator, dtype=torch.float64)

    expected = torch.zeros(num_clips * group_size, sum(counts), dtype=torch.float64)
    for clip in range(num_clips):
        group = range(clip * group_size, (clip + 1) * group_size)
        for index, frame in enumerate(rewarded):
            mean = sum(rewards[sample, index].item() for sample in group) / group_size
            end = sum(counts[: frame + 1])
            for sample in group:
                weight = 1.0
                for slot in reversed(range(end)):
                    if not gaze.if_padded_gazing[sample, slot]:
                        expected[sample, slot] += weight * (rewards[sample, index].item() - mean)
                        weight *= discount
    given = slot_advantages(rewards, rewarded, gaze, group_size, discount)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


def test_padding_and_slots_after_the_last_reward_have_no_advantage():
    generator = torch.Generator().manual_seed(2)
    gaze = random_gaze(4, [4, 4, 4], generator)
    advantages = slot_advantages(torch.randn(4, 1, generator=generator), [1], gaze, 2, 0.995)
    assert (advantages[gaze.if_padded_gazing] == 0).all()
    assert (advantages[:, 8:] == 0).all()
    assert (advantages[:, :8][~gaze.if_padded_gazing[:, :8]] != 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_two_slots_equals_a_derivation_by_hand(tmp_path, temperature):
    model = small_model().double()
    trainer = make_trainer(
        tmp_path,
        model,
        group_size=2,
        discount=0.5,
        temperature_start=temperature,
        temperature_end=temperature,
        **exactly(0.1),
    )
    # The contrast of the noise rises from left to right and top to bottom, so patches have different losses.
    contrast = torch.arange(16).view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1) * 8
    levels = 128 + contrast * (2 * torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1)
    clip = AutoGazeVideoProcessor().to_pixel_values(levels)
    outputs = []
    hook = model.gaze_decoder.model.norm.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    loss = trainer.compute_loss(model, {"pixel_values_videos": clip})
    hook.remove()
    loss.backward()
    last_hidden = outputs[-1]
    trainer._generator_step = None  # repeats the rollout
    rollout = trainer.roll_out(clip, trainer.step_generator())
    ids, losses = rollout.gaze.gazing_pos, rollout.loss[:, 0].double()
    assert ids.shape == (2, 2) and (losses[0] - losses[1]).abs() > 0.004

    # Both slots of both gazes are predicted from the last vision token, so all four share one hidden state h. Row i scores slot
    # i: d log p / d W_i = (onehot - p) h, except for the 1e-8 that is added to p. The first slot is one patch further from the
    # reward.
    hidden = last_hidden[0, model.config.num_vision_tokens - 1]
    rows = model.gaze_decoder.lm_head.weight.detach().view(2, 21, 32)
    expected = torch.zeros_like(rows)
    for sample in range(2):
        advantage = -(losses[sample] - losses.mean())
        for slot, credit in enumerate([0.5 * advantage, advantage]):
            scores = (rows[slot] @ hidden).exp()
            toward = -scores / scores.sum()
            toward[ids[sample, slot]] += 1
            expected[slot] -= credit * toward[:, None] * hidden / 2
    torch.testing.assert_close(model.gaze_decoder.lm_head.weight.grad.view(2, 21, 32), expected, rtol=1e-5, atol=3e-7)

    # The loss after both slots is row 0 of the token that would predict a third one, which is the second patch.
    after = last_hidden[:, model.config.num_vision_tokens + 1]
    head = model.gaze_decoder.task_loss_prediction_head.weight
    error = after @ head[0].detach() - losses
    torch.testing.assert_close(head.grad[0], (2 * error[:, None] * after).mean(0), rtol=1e-5, atol=1e-8)
    assert not head.grad[1].any()
    torch.testing.assert_close(loss.detach(), error.square().mean(), rtol=1e-5, atol=1e-5)


def test_a_rollout_has_groups_up_to_the_last_rewarded_frame(tmp_path):
    clips = clips_with_bright_patches(2, 8)
    trainer = make_trainer(tmp_path, group_size=3, rewarded_share=0.25, ratio_max=0.5, threshold_min=0.0)
    lasts, lengths, thresholds = set(), set(), set()
    for seed in range(6):
        rollout = trainer.roll_out(clips, torch.Generator().manual_seed(seed))
        gaze = rollout.gaze
        assert len(rollout.rewarded) == 2 and rollout.rewarded == sorted(set(rollout.rewarded))
        lasts.add(rollout.rewarded[-1])
        lengths.update(gaze.num_real_each_frame.flatten().tolist())
        assert gaze.num_frames == rollout.rewarded[-1] + 1
        assert torch.equal(rollout.pixel_values_videos, clips[[0, 0, 0, 1, 1, 1], : gaze.num_frames])
        thresholds.update(gaze.task_loss_requirement.flatten().tolist())
        pixels = AutoGazeVideoProcessor().to_pixels(rollout.pixel_values_videos).clamp(0, 1)
        error = (CompositeReconstruction(gaze.grid).reconstruct(pixels, gaze) - pixels).square().mean((2, 3, 4))
        torch.testing.assert_close(rollout.loss, mse_to_task_loss(error)[:, rollout.rewarded])
    assert len(lasts) > 1 and len(lengths) > 2
    assert len(thresholds) == 6 and 0 <= min(thresholds) and max(thresholds) <= 1
    first = [ids.tolist() for ids in gaze.ids_each_frame(0)]
    assert any(first != [ids.tolist() for ids in gaze.ids_each_frame(other)] for other in (1, 2))


def test_rewards_by_features_are_the_losses_of_the_gazes(tmp_path):
    set_seed(3)
    settings = {"hidden_sizes": [8, 8, 8], "depths": [1, 1, 1], "scale_factors": [0.5, 1], "feature_size": 4}
    task = GazeTask(
        GazeGrid([32, 64]), FeatureGazeModel(FeatureGazeConfig(**settings, feature_variance=20, initializer_range=0.5))
    )
    trainer = make_trainer(tmp_path, reconstruction=task, rewarded_share=1.0)
    rollout = trainer.roll_out(clips_with_bright_patches(2, 3))
    pixels = AutoGazeVideoProcessor().to_pixels(rollout.pixel_values_videos).clamp(0, 1)
    torch.testing.assert_close(rollout.loss, task(pixels, rollout.gaze).loss, rtol=0, atol=1e-5)
    assert 0 <= float(rollout.loss.min()) < float(rollout.loss.max()) <= 1
    assert trainer.train().global_step == 4 and trainer.evaluate()["eval_loss"] <= 1


def test_without_thresholds_every_frame_uses_its_budget(tmp_path):
    trainer = make_trainer(tmp_path, rewarded_share=1.0, **exactly(0.15))
    gaze = trainer.roll_out(clips_with_bright_patches(2, 3)).gaze
    assert gaze.num_real_each_frame.tolist() == [[3, 3, 3]] * 6
    assert gaze.task_loss_requirement is None


def test_rewards_of_other_frame_sizes_and_rates_are_at_the_models_own(tmp_path):
    model = small_model(frames_per_token=2)
    trainer = make_trainer(tmp_path, model, clips_with_bright_patches(2, 4, size=96), rewarded_share=1.0)
    rollout = trainer.roll_out(clips_with_bright_patches(2, 4, size=96))
    assert rollout.rewarded == [0, 1] and rollout.loss.shape == (6, 2)
    assert trainer.train().global_step == 4


def test_temperature_falls_exponentially_from_first_to_last_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.train()
    temperatures = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    assert temperatures == pytest.approx([3 * 0.1 ** (step / 4) for step in range(5)])


def test_logs_have_reward_length_entropy_and_prediction_error(tmp_path):
    clips = clips_with_bright_patches(1, 8)
    # The learning rate is zero, so that the step can be repeated.
    trainer = make_trainer(
        tmp_path, clips=clips, learning_rate=0.0, max_steps=1, per_device_train_batch_size=1, rewarded_share=0.25
    )
    trainer.train()
    entry, summary = trainer.state.log_history
    assert "reward" not in summary
    trainer.state.global_step, trainer._generator_step = 0, None
    rollout = trainer.roll_out(clips, trainer.step_generator())
    gaze = rollout.gaze
    with torch.no_grad():
        scores = trainer.model(clips.repeat(3, 1, 1, 1, 1)[:, : gaze.num_frames], **slots_of(gaze), output_logits=True)
    real = ~gaze.if_padded_gazing
    assert not real.all()
    assert entry["reward"] == pytest.approx(-rollout.loss.mean().item())
    assert entry["length"] == pytest.approx(real.sum().item() / (3 * gaze.num_frames))
    entropy = torch.distributions.Categorical(logits=scores.logits).entropy()
    assert entry["entropy"] == pytest.approx(entropy[real].mean().item(), rel=1e-5)
    errors = []
    for sample in range(3):
        for index, frame in enumerate(rollout.rewarded):
            last = max(slot for slot in real[sample].nonzero().flatten().tolist() if gaze.frame_of_slot[slot] == frame)
            errors.append(abs(scores.task_loss_prediction[sample, last] - rollout.loss[sample, index]).item())
    assert entry["task_loss_prediction_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def slots_of(gaze: GazeOutput) -> dict[str, torch.Tensor]:
    return {key: gaze[key] for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")}


def test_a_run_repeats_and_a_resumed_one_continues_it(tmp_path):
    def train(name, resume=None, **arguments):
        trainer = make_trainer(
            tmp_path / name,
            model=small_model(),
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            **arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), [log["reward"] for log in trainer.state.log_history if "reward" in log]

    weights, rewards = train("whole")
    # Other random draws in between have no effect.
    torch.rand(7)
    again, same_rewards = train("again")
    resumed, later_rewards = train("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert rewards == same_rewards == later_rewards and len(rewards) == 4
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]) and torch.equal(weight, resumed[name]), name
    _, other_rewards = train("other", seed=7)
    assert other_rewards != rewards


def test_a_checkpoint_gazes_by_itself(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, processing_class=AutoGazeProcessor())
    trainer.train()
    trainer.save_model()
    model = AutoGazeModel.from_pretrained(tmp_path).eval()
    processor = AutoGazeVideoProcessor.from_pretrained(tmp_path)
    assert processor.to_dict()["image_mean"] == AutoGazeVideoProcessor().to_dict()["image_mean"]
    clips = clips_with_bright_patches(1, 2)
    trained = trainer.model.eval().generate(clips, gazing_ratio=0.5)
    assert torch.equal(model.generate(clips, gazing_ratio=0.5).gazing_pos, trained.gazing_pos)


class LikesPatches(nn.Module):
    """Rewards a gaze with the share of some patches that it kept, however the frames look."""

    def __init__(self, wanted: list[int]):
        super().__init__()
        self.register_buffer("wanted", torch.tensor(wanted))

    def forward(self, pixels: torch.Tensor, gaze: GazeOutput, frames: list[int]) -> ReconstructionOutput:
        assert not torch.is_grad_enabled() and not self.training
        assert pixels.shape[2:] == (3, 64, 64) and 0 <= pixels.min() and pixels.max() <= 1
        kept = torch.cat(gaze.gazing_mask, dim=-1)[:, frames][..., self.wanted]
        return ReconstructionOutput(reconstruction=pixels[:, frames], loss=-kept.double().mean(-1))


def test_rewards_come_from_any_reconstruction(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reconstruction=LikesPatches([3, 11]),
        group_size=8,
        max_steps=40,
        learning_rate=3e-3,
        temperature_start=1.0,
        rewarded_share=1.0,
        **exactly(0.1),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 0.4 and sum(rewards[-5:]) / 5 > 0.8
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-1, abs=0.05)


def test_evaluation_measures_the_likeliest_gazes(tmp_path):
    clips = clips_with_bright_patches(4, 3)
    trainer = make_trainer(tmp_path, clips=clips, per_device_eval_batch_size=2, **exactly(0.2))
    pixels = AutoGazeVideoProcessor().to_pixels(clips).clamp(0, 1)
    gaze = trainer.model.eval().generate(clips, gazing_ratio=0.2)
    expected = CompositeReconstruction(gaze.grid)(pixels, gaze).loss.mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_trains_in_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert trainer.model.dtype == torch.float32


def test_command_line_trains_a_checkpoint_further(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for seed in range(2):
        write_video(tmp_path / "videos" / f"{seed}.mp4", render_demo_clip(8, 64, 64, seed), fps=8)
    model = small_model()
    model.save_pretrained(tmp_path / "start")
    AutoGazeVideoProcessor().save_pretrained(tmp_path / "start")
    arguments = ["--output_dir", str(tmp_path / "out"), "--group_size", "3", "--max_steps", "2", "--num-frames", "4"]
    arguments += ["--use_cpu", "--report_to", "none", "--rewarded_share", "0.5", "--ratio_max", "0.2"]
    arguments += [
        "--ratio_min",
        "0.2",
        "--per_device_train_batch_size",
        "1",
        "--logging_steps",
        "1",
        "--min_crop",
        "1",
    ]
    start = ["train-grpo", str(tmp_path / "videos"), *arguments]
    assert main([*start, "--model", str(tmp_path / "start")]) == 0
    trained = AutoGazeModel.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.gaze_decoder.lm_head.weight, model.gaze_decoder.lm_head.weight)
    assert "reward" in (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text()

    assert main(start) == 2 and "`--model` must name a checkpoint" in capsys.readouterr().err
    assert main([*start, "--model", str(tmp_path / "start"), "--group_size", "1"]) == 2
    assert "`group_size` must be a whole number of at least 2" in capsys.readouterr().err


def test_every_epoch_has_new_clips(tmp_path):
    model = small_model()
    dataset = GazeClipDataset([render_demo_clip(8, 64, 64, seed) for seed in range(2)], model.config, num_frames=2)
    arguments = {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 1}
    trainer = make_trainer(tmp_path, model, **arguments)
    trainer.train_dataset = dataset
    seen = []
    trainer.roll_out = lambda clips, generator: seen.append(clips) or type(trainer).roll_out(trainer, clips, generator)
    trainer.train()
    assert len(seen) == 4
    expected = torch.stack([dataset[index]["pixel_values_videos"] for index in range(4)])
    assert {clip.sum().item() for clip in torch.cat(seen)} == {clip.sum().item() for clip in expected}


@pytest.mark.slow
def test_the_model_learns_from_rewards(tmp_path):
    """
    200 steps raise the reward of unsampled gazes by at least 0.4, which is 8 dB, and close at least 3/4 of the gap
    between random and greedy gazes.
    """
    clips = clips_with_bright_patches(16, 1)
    trainer = make_trainer(
        tmp_path,
        clips=clips,
        group_size=12,
        max_steps=200,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        logging_steps=20,
        **exactly(0.1),
    )
    pixels = AutoGazeVideoProcessor().to_pixels(clips).clamp(0, 1)
    greedy = -mse_to_task_loss(trainer.reconstruction.search(pixels, [2]).mse[..., -1]).mean().item()
    generator = torch.Generator().manual_seed(0)
    chance = trainer.model.eval().generate(clips, 0.1, do_sample=True, temperature=1e6, generator=generator)
    random = -trainer.reconstruction(pixels, chance).loss.mean().item()
    before = -trainer.evaluate()["eval_loss"]
    trainer.train()
    after = -trainer.evaluate()["eval_loss"]
    assert after - before >= 0.4
    assert (after - random) / (greedy - random) >= 0.75
    sampled = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sampled[-1] - sampled[0] >= 0.4
