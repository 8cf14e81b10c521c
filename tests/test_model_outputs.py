"""What calling a model gives, as every model of the library: tuples, hidden states, attentions, programs, offloaded weights."""

import pytest
import torch
from test_modeling import scored, small_config
from test_video_mae import GRID, SMALL

from transformers_autogaze import AutoGazeModel, GazeOutput
from transformers_autogaze.reconstruction import GazeVideoMAE, GazeVideoMAEConfig


@pytest.fixture
def model() -> AutoGazeModel:
    torch.manual_seed(0)
    return AutoGazeModel(small_config(attn_implementation="eager")).eval()


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_return_dict_false_gives_a_tuple_in_a_call_and_by_the_configuration(model, video):
    gaze = model.generate(video, gazing_ratio=0.6)
    expected = scored(model, video, gaze)
    given = scored(model, video, gaze, return_dict=False)
    assert isinstance(given, tuple) and len(given) == 2
    assert torch.equal(given[0], expected.log_action_probs)
    model.config.return_dict = False
    assert isinstance(scored(model, video, gaze), tuple)
    assert torch.equal(
        model.generate(video, gazing_ratio=0.6, output_scores=True).log_action_probs, expected.log_action_probs
    )


def test_hidden_states_and_attentions_come_when_output_for_and_by_the_configuration(model, video):
    gaze = model.generate(video, gazing_ratio=0.6)
    plain = scored(model, video, gaze)
    assert plain.hidden_states is None and plain.attentions is None
    output = scored(model, video, gaze, output_hidden_states=True, output_attentions=True)
    length = video.shape[1] * model.config.num_vision_tokens + gaze.gazing_pos.shape[1]
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, length, 16)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 2, length, length)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, length))
    model.config.output_hidden_states = model.config.output_attentions = True
    by_config = scored(model, video, gaze)
    assert len(by_config.hidden_states) == 3 and len(by_config.attentions) == 2
    assert scored(model, video, gaze, output_attentions=False).attentions is None


def test_token_places_are_those_of_the_decoder_s_inputs(model, video):
    gaze = model.generate(video, gazing_ratio=0.6)
    inputs = scored(model, video, gaze, output_hidden_states=True).hidden_states[0]
    vision, slots = model.token_places(gaze.num_gazing_each_frame)
    assert torch.equal(torch.cat([vision.flatten(), slots]).sort().values, torch.arange(inputs.shape[1]))
    torch.testing.assert_close(inputs[:, vision], model.embed_video(video)[0])
    ids = gaze.gazing_pos % model.config.grid.num_patches
    ids = ids.masked_fill(gaze.if_padded_gazing, model.config.end_id)
    torch.testing.assert_close(inputs[:, slots], model.get_input_embeddings()(ids))


def test_attentions_are_refused_where_none_are_kept(video):
    model = AutoGazeModel(small_config(attn_implementation="sdpa")).eval()
    gaze = model.generate(video, gazing_ratio=0.6)
    with pytest.raises(ValueError, match="`output_attentions` must be False with sdpa attention"):
        scored(model, video, gaze, output_attentions=True)


def test_scoring_can_be_exported(model, video):
    gaze = model.generate(video, gazing_ratio=0.6)
    inputs = (video, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        other = model.generate(video.flip(0), gazing_ratio=[0.4, 0.8, 0.6])
        inputs = (video.flip(0), other.gazing_pos, other.if_padded_gazing, other.num_gazing_each_frame)
        torch.testing.assert_close(program.module()(*inputs).log_action_probs, model(*inputs).log_action_probs)


@pytest.mark.parametrize("on_disk", [["gaze_decoder"], ["gaze_decoder", "vision_model"]])
def test_offloaded_weights_gaze_and_score(model, video, tmp_path, on_disk):
    model.save_pretrained(tmp_path)
    expected = model.generate(video, gazing_ratio=0.6, task_loss_requirement=-0.1, output_scores=True)
    parts = ["gaze_decoder", "vision_model", "connector"]
    device_map = {name: "disk" if name in on_disk else "cpu" for name in parts}
    offloaded = AutoGazeModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "disk"))
    assert any(weight.is_meta for weight in offloaded.parameters())
    gaze = offloaded.eval().generate(video, gazing_ratio=0.6, task_loss_requirement=-0.1, output_scores=True)
    assert torch.equal(gaze.gazing_pos, expected.gazing_pos)
    torch.testing.assert_close(gaze.log_action_probs, expected.log_action_probs)


def test_the_learned_reconstruction_gives_the_same(video):
    torch.manual_seed(0)
    reconstruction = GazeVideoMAE(GazeVideoMAEConfig(**SMALL, attn_implementation="eager")).eval()
    gaze, pixels = GazeOutput.full(GRID, 2, 3), video.sigmoid()
    plain = reconstruction(pixels, gaze)
    assert plain.hidden_states is None and plain.attentions is None
    given = reconstruction(pixels, gaze, return_dict=False)
    assert (
        isinstance(given, tuple) and torch.equal(given[0], plain.reconstruction) and torch.equal(given[1], plain.loss)
    )
    output = reconstruction(pixels, gaze, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 16, 16)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 2, 16, 16)] * 2
    reconstruction.config.output_hidden_states = reconstruction.config.output_attentions = True
    by_config = reconstruction(pixels, gaze)
    assert len(by_config.hidden_states) == 3 and len(by_config.attentions) == 2
    reconstruction.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="`output_attentions` must be False with sdpa attention"):
        reconstruction(pixels, gaze)
