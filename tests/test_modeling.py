import logging

import pytest
import torch
from published import FIXTURES
from safetensors.torch import load_file
from transformers import AutoModel

from transformers_autogaze import AutoGazeConfig, AutoGazeModel


def small_config(**kwargs) -> AutoGazeConfig:
    return AutoGazeConfig(
        scales=[16, 32],
        image_size=32,
        vision_config={"hidden_size": 16, "output_size": 16},
        decoder_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_multi_token_pred": 2,
        },
        **kwargs,
    )


@pytest.fixture
def small_model() -> AutoGazeModel:
    torch.manual_seed(0)
    return AutoGazeModel(small_config())


def scored(model: AutoGazeModel, video: torch.Tensor, gaze, **kwargs):
    return model(video, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame, **kwargs)


def test_the_default_model_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in AutoGazeModel(AutoGazeConfig()).parameters()) == 3_258_240


def test_the_published_checkpoint_loads_without_missing_keys_or_warnings(caplog):
    for name in ("transformers", "transformers.modeling_utils", "transformers.configuration_utils"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        model, info = AutoGazeModel.from_pretrained(FIXTURES / "tiny-1", output_loading_info=True)
        auto = AutoModel.from_pretrained(FIXTURES / "tiny-1")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(auto) is AutoGazeModel
    assert model.dtype == torch.float32
    published = load_file(FIXTURES / "tiny-1" / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, published[f"gazing_model.{name}"].float()), name


@pytest.mark.parametrize("cls", [AutoGazeModel, AutoModel])
def test_a_saved_model_loads_in_our_layout_with_equal_outputs(tmp_path, tiny, tiny_model, cls):
    tiny_model.save_pretrained(tmp_path)
    assert all(not name.startswith("gazing_model.") for name in load_file(tmp_path / "model.safetensors"))
    again = cls.from_pretrained(tmp_path).eval()
    assert again.dtype == torch.float64
    video = tiny.video("ratio")
    first = tiny_model.generate(video, gazing_ratio=0.3, output_scores=True)
    second = again.generate(video, gazing_ratio=0.3, output_scores=True)
    assert torch.equal(first.gazing_pos, second.gazing_pos)
    assert torch.equal(first.log_action_probs, second.log_action_probs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(tiny, implementation):
    model = tiny.model(attn_implementation=implementation)
    video = tiny.video("ratio_and_loss.clip0")
    gaze = model.generate(video, **tiny.call("ratio_and_loss.clip0"), output_scores=True)
    assert torch.equal(gaze.gazing_pos, tiny.expected["ratio_and_loss.clip0.gazing_pos"])
    expected = tiny.expected["ratio_and_loss.clip0.log_action_probs"]
    # The library's eager attention takes its softmax in float32.
    torch.testing.assert_close(
        gaze.log_action_probs, expected, rtol=0, atol=1e-4 if implementation == "eager" else 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_gazes_and_scores(tiny, dtype):
    model = tiny.model(dtype)
    gaze = model.generate(
        tiny.video("ratio").to(dtype), gazing_ratio=0.3, task_loss_requirement=-0.3, output_scores=True
    )
    assert gaze.log_action_probs.isfinite().all()
    assert gaze.task_loss_prediction.dtype == dtype
    assert (gaze.num_real_each_frame >= 1).all()


def test_losses_are_means_over_the_labels_that_count(small_model):
    video = torch.randn(2, 3, 3, 32, 32)
    gaze = small_model.generate(video, gazing_ratio=0.6)
    labels = gaze.gazing_pos.clone()
    labels[:, 1] = -100
    task_losses = torch.rand(labels.shape)
    task_losses[0, 2] = torch.nan
    output = scored(small_model, video, gaze, labels=labels, task_loss_labels=task_losses)
    counted = labels != -100
    expected = -output.log_action_probs[counted].mean()
    torch.testing.assert_close(output.next_token_loss, expected, rtol=0, atol=1e-5)
    error = (output.task_loss_prediction - task_losses).square().nanmean()
    torch.testing.assert_close(output.task_loss_error, error)
    torch.testing.assert_close(output.loss, output.next_token_loss + output.task_loss_error)
    assert scored(small_model, video, gaze).loss is None
    assert scored(small_model, video, gaze, labels=labels).task_loss_error is None


def test_logits_are_what_probabilities_are_made_of(small_model):
    video = torch.randn(2, 3, 3, 32, 32)
    gaze = small_model.eval().generate(video, gazing_ratio=0.6)
    output = scored(small_model, video, gaze, output_logits=True)
    ids = gaze.gazing_pos - gaze.frame_of_slot * gaze.num_vision_tokens_each_frame
    chosen = output.logits.softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(output.log_action_probs, (chosen + 1e-8).log())
    assert scored(small_model, video, gaze).logits is None


def test_training_on_labels_makes_the_model_choose_them(small_model):
    video = torch.randn(1, 2, 3, 32, 32)
    wanted = torch.tensor([[4, 1, 3, 5 + 2, 5 + 0, 5 + 4]])
    padding, counts = torch.zeros(1, 6, dtype=torch.bool), torch.tensor([3, 3])
    losses = torch.tensor([[0.9, 0.5, 0.1, 0.8, 0.4, 0.2]])
    optimizer = torch.optim.Adam(small_model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        small_model(video, wanted, padding, counts, labels=wanted, task_loss_labels=losses).loss.backward()
        optimizer.step()
    gaze = small_model.eval().generate(video, gazing_ratio=0.6, output_scores=True)
    assert torch.equal(gaze.gazing_pos, wanted)
    torch.testing.assert_close(gaze.task_loss_prediction, losses, rtol=0, atol=0.1)


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(small_model):
    video = torch.randn(2, 3, 3, 32, 32)
    gaze = small_model.generate(video, gazing_ratio=0.8)

    def gradients() -> list[torch.Tensor]:
        small_model.zero_grad()
        losses = torch.zeros(gaze.gazing_pos.shape)
        scored(small_model, video, gaze, labels=gaze.gazing_pos, task_loss_labels=losses).loss.backward()
        return [parameter.grad.clone() for parameter in small_model.parameters()]

    small_model.train()
    plain = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    small_model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in small_model.modules())
    for before, after in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(before, after)


def test_padding_changes_nothing_that_comes_later(tiny, tiny_model):
    video = tiny.video("ratio_and_loss.clip0")
    gaze = tiny_model.generate(video, **tiny.call("ratio_and_loss.clip0"))
    assert gaze.if_padded_gazing.any()
    other = gaze.gazing_pos.masked_fill(gaze.if_padded_gazing, 3)
    real = ~gaze.if_padded_gazing
    with torch.no_grad():
        first = scored(tiny_model, video, gaze).log_action_probs[real]
        second = scored(tiny_model, video, gaze.replace(gazing_pos=other)).log_action_probs[real]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gazing_each_frame": torch.tensor([3, 3])}, "`num_gazing_each_frame` must hold 3 positive counts"),
        ({"num_gazing_each_frame": torch.tensor([3, 3, 4])}, "add up to the 9 slots"),
        ({"num_gazing_each_frame": torch.tensor([9, 0, 0])}, "positive counts"),
        (
            {"if_padded_gazing": torch.zeros(1, 8, dtype=torch.bool)},
            r"`if_padded_gazing` must have the shape \(1, 9\)",
        ),
        ({"gazing_pos": torch.zeros(1, 9, dtype=torch.long)}, "`gazing_pos` must hold ids of frame t"),
        ({"labels": torch.zeros(1, 9, dtype=torch.long)}, "`labels` must hold ids of frame t"),
        ({"pixel_values_videos": torch.zeros(1, 3, 4, 32, 32)}, "`pixel_values_videos` must have 3 channels"),
        ({"pixel_values_videos": torch.zeros(3, 3, 32, 32)}, r"must be a tensor \(batch, frames, channels"),
    ],
)
def test_arguments_that_do_not_fit_are_named(small_model, changes, message):
    video = torch.randn(1, 3, 3, 32, 32)
    gaze = small_model.generate(video, gazing_ratio=0.6)
    arguments = {
        "pixel_values_videos": video,
        "gazing_pos": gaze.gazing_pos,
        "if_padded_gazing": gaze.if_padded_gazing,
        "num_gazing_each_frame": gaze.num_gazing_each_frame,
    }
    with pytest.raises(ValueError, match=message):
        small_model(**{**arguments, **changes})
