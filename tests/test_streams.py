"""Streams without end: nothing about a frame depends on how many went before it."""

import copy

import pytest
import torch

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GazeCache, GazeOutput, GreedyGazeSelector


DAY = 24 * 3600 * 30  # frames


@pytest.fixture(scope="module")
def model() -> AutoGazeModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = AutoGazeConfig(
        scales=[32, 64],
        image_size=64,
        vision_config={"hidden_size": 16, "output_size": 32},
        decoder_config={**sizes, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3},
    )
    return AutoGazeModel(config).eval()


@pytest.fixture(scope="module")
def frames() -> list[torch.Tensor]:
    return list(torch.randn(12, 2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def stream(model: AutoGazeModel, frames: list[torch.Tensor], cache: GazeCache) -> list[list[int]]:
    chosen = []
    for frame in frames:
        gaze = model.generate(frame, gazing_ratio=0.6, past_key_values=cache)
        chosen.append(gaze.gazing_pos.tolist())
        cache.crop(3)
    return chosen


def days_later(model: AutoGazeModel, cache: GazeCache) -> GazeCache:
    """Gives the state of a stream that has the same frames at positions of a day later, whose keys are turned further."""
    late, shift = copy.deepcopy(cache), DAY * 20
    angles = shift * model.gaze_decoder.model.rotary_emb.inv_freq.double()
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.complex(*late.keys.double().chunk(2, dim=-1)) * turn
    late.keys = torch.cat([pairs.real, pairs.imag], dim=-1).float()
    late.next_positions = [position + shift for position in late.next_positions]
    return late


def test_a_cropped_stream_chooses_after_a_day_what_it_chooses_at_the_start(model, frames):
    cache = GazeCache()
    stream(model, frames[:4], cache)
    late = days_later(model, cache)
    assert stream(model, frames[4:], late) == stream(model, frames[4:], cache)


def test_frames_of_a_cropped_stream_cost_the_same_however_many_went_before(model, frames, monkeypatch):
    calls, capacities = [], []
    rotary = model.gaze_decoder.model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs["position_ids"].numel(), int(kwargs["position_ids"].max()))),
        with_kwargs=True,
    )
    cache = GazeCache()
    for frame in frames * 4:
        stream(model, [frame], cache)
        capacities.append(cache.keys.shape[3])
    hook.remove()
    assert len(calls) == len(frames) * 4 and calls[8:] == calls[8:9] * len(calls[8:])
    assert capacities[8:] == capacities[8:9] * len(capacities[8:])


def test_a_cropped_cache_is_as_if_its_frames_came_first(model, frames):
    """Keys of the first layer depend on nothing but their own token and its position."""
    cropped, fresh = GazeCache(), GazeCache()
    stream(model, frames[:8], cropped)
    stream(model, frames[5:8], fresh)
    cropped.count_from_first()
    assert cropped.next_positions == cropped.lengths
    assert cropped.frame_starts == fresh.frame_starts
    # The convolutions remember two frames, which a stream that begins has not seen, so the last of three is compared.
    start = cropped.frame_starts[-1][0]
    tokens = slice(start, start + model.config.num_vision_tokens)
    torch.testing.assert_close(cropped.keys[0, :, :, tokens], fresh.keys[0, :, :, tokens], rtol=0, atol=1e-5)


def test_the_greedy_selector_holds_no_more_after_many_frames(frames):
    selector = GreedyGazeSelector()
    selector = selector.for_grid(AutoGazeConfig(scales=[32, 64], image_size=64).grid)
    cache, chosen, held = selector.cache_class(), [], []
    for frame in frames * 3:
        gaze = selector.generate(frame, tokens_per_second=40, frame_rate=10, past_key_values=cache, use_cache=True)
        chosen.append(gaze.num_real.tolist())
        held.append(sum(part.numel() for part in (*cache.canvas, cache.rate_control.recent, cache.rate_control.total)))
    assert len(set(held)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_greedy_selector_takes_the_same_of_a_stream_and_a_clip_in_every_precision(frames, dtype):
    selector, video = GreedyGazeSelector().to(dtype), torch.cat(frames[:4], dim=1).to(dtype)
    whole, cache = selector.generate(video, gazing_ratio=0.1), selector.cache_class()
    parts = [
        selector.generate(part, gazing_ratio=0.1, past_key_values=cache) for part in video.split([1, 2, 1], dim=1)
    ]
    assert torch.equal(GazeOutput.concatenate(parts).gazing_pos, whole.gazing_pos)


def test_a_model_takes_the_same_of_a_stream_and_a_clip_in_single_precision_and_nearly_in_half(model, frames):
    video = torch.cat(frames, dim=1)
    for dtype, least in ((torch.float32, 1.0), (torch.bfloat16, 0.7)):
        own, cache = copy.deepcopy(model).to(dtype), GazeCache()
        whole = own.generate(video.to(dtype), gazing_ratio=0.4)
        parts = [own.generate(frame.to(dtype), gazing_ratio=0.4, past_key_values=cache) for frame in frames]
        same = torch.cat(whole.gazing_mask, -1) & torch.cat(GazeOutput.concatenate(parts).gazing_mask, -1)
        assert same.sum() >= least * whole.num_real.sum()
