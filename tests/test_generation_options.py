"""Options of `generate` on pruned prompts: supported ones give the MLLM's own answer, others are refused."""

import pytest
import torch
from test_mllm import SCALES, build, clip, original_inputs
from test_qwen_vl import as_original, make_inputs, tiny_mllm
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from transformers_autogaze import GazeGrid, GazeOutput, GreedyGazeSelector
from transformers_autogaze.integrations import GazeQwenVL, GazeVideoLM


class Case:
    """A wrapper and its MLLM on the same prompts, with all patches kept or few."""

    def __init__(self, family: str):
        if family == "llava_onevision":
            mllm = build(family)
            self.model = GazeVideoLM(mllm, scales=SCALES, attention="frame")
            self.original = original_inputs(self.model, [5, 6, self.model.placeholder_id, 7], [clip(2, seed=1)], False)
            full = GazeOutput.full(self.model.grid, 1, 2, scale=-1)
            self.inputs = {"input_ids": self.original["input_ids"], "pixel_values_videos": [clip(2, seed=1)]}
        else:
            mllm = tiny_mllm(family)
            self.model = GazeQwenVL(mllm)
            self.inputs = make_inputs(mllm, [[1, (2, 4, 6), 2]])
            self.original = as_original(mllm, self.inputs)
            full = GazeOutput.full(GazeGrid([16], patch_size=8), 1, 4)
        self.length = self.inputs["input_ids"].shape[1]
        few = [torch.zeros_like(mask) for mask in full.gazing_mask]
        few[-1][:, 0, 0] = True
        self.full, self.few = full, GazeOutput.from_masks(few, full.grid)

    def expected(self, **options) -> torch.Tensor:
        return self.model.mllm.generate(**self.original, **{"do_sample": False, "max_new_tokens": 6, **options})

    def answer(self, gaze: GazeOutput, **options) -> torch.Tensor:
        return self.model.generate(**self.inputs, gaze=gaze, **{"do_sample": False, "max_new_tokens": 6, **options})


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(0, 40, 2))},
        {"num_beams": 3, "length_penalty": 0.5},
        {"use_cache": False},
        {"sequence_bias": [[[7], 30.0]]},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_known_options_give_the_answer_of_the_mllm(case, options):
    expected = case.expected(**options)
    assert torch.equal(case.answer(case.full, **options)[:, case.length :], expected[:, case.length :])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"encoder_repetition_penalty": 1.5},
        {"guidance_scale": 1.5},
        {"cache_implementation": "static"},
        {"assistant_early_exit": 1},
        {"position_ids": torch.arange(3)},
        {"past_key_values": object()},
        {"inputs_embeds": torch.zeros(1, 3, 32)},
        {"no_such_option": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_are_not_supported_are_refused_by_name(case, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must not be given for a pruned prompt"):
        case.answer(case.few, **options)


def test_an_unknown_option_is_refused_before_the_gaze(case, monkeypatch):
    monkeypatch.setattr(type(case.model), "prepare_inputs", None)
    with pytest.raises(ValueError, match="`gazes` must not be given for a pruned prompt, got 1"):
        case.answer(None, gazes=1)


def test_the_error_of_a_refused_option_is_short(case):
    with pytest.raises(
        ValueError, match="`assistant_model` must not be given for a pruned prompt, got [A-Za-z0-9_]+:"
    ):
        case.answer(case.few, assistant_model=case.model.mllm)


def test_an_assistant_and_a_configuration_are_checked_as_well(case):
    with pytest.raises(ValueError, match="`assistant_model` must not be given"):
        case.answer(case.few, assistant_model=case.model.mllm)
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` must not be given"):
        case.answer(case.few, generation_config=GenerationConfig(prompt_lookup_num_tokens=2))
    own = case.model.generation_config
    case.model.generation_config = GenerationConfig(guidance_scale=2.0)
    try:
        assert case.model.mllm.generation_config.guidance_scale == 2.0
        with pytest.raises(ValueError, match="`guidance_scale` must not be given"):
            case.answer(case.few)
    finally:
        case.model.generation_config = own


def test_lengths_refer_to_the_prompt_of_the_caller(case):
    options = {"max_new_tokens": None, "max_length": case.length + 3}
    assert case.answer(case.few, **options).shape[1] == case.expected(**options).shape[1] == case.length + 3
    config = GenerationConfig(max_length=case.length + 2)
    assert case.answer(case.few, max_new_tokens=None, generation_config=config).shape[1] == case.length + 2
    assert case.answer(case.few, max_length=case.length, max_new_tokens=2).shape[1] == case.length + 2
    with pytest.raises(ValueError, match=f"`max_length` must be more than the prompt's {case.length} tokens"):
        case.answer(case.few, max_new_tokens=None, max_length=case.length)


class Recorder(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Records its inputs; ends an answer after two tokens."""

    def __init__(self, length: int):
        self.length, self.shown = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids[:, : self.length])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 2)

    def put(self, value):
        self.shown.append(value)

    def end(self):
        self.shown.append(None)


class Processor(LogitsProcessor):
    def __init__(self, shown):
        self.shown = shown

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids)
        return scores


@pytest.mark.parametrize("num_beams", [1, 2])
def test_callbacks_receive_the_prompt_of_the_caller(case, num_beams):
    given, recorder, shown, rows = case.inputs["input_ids"], Recorder(case.length), [], []

    def allowed(row, ids):
        rows.append(ids)
        return list(range(40))

    output = case.answer(
        case.few,
        num_beams=num_beams,
        stopping_criteria=[recorder],
        logits_processor=[Processor(shown)],
        prefix_allowed_tokens_fn=allowed,
    )
    assert output.shape[1] == case.length + 2
    prompt = given.expand(num_beams, -1)
    assert all(bool((ids == given).all()) for ids in recorder.shown) and torch.equal(shown[0], prompt)
    assert all(torch.equal(ids[: case.length], given[0]) for ids in rows)


def test_a_streamer_receives_the_prompt_of_the_caller(case):
    streamer = Recorder(case.length)
    answer = case.answer(case.few, streamer=streamer)[0, case.length :]
    prompt, *tokens, end = streamer.shown
    assert torch.equal(prompt, case.inputs["input_ids"]) and end is None
    assert torch.cat([token.flatten() for token in tokens]).tolist() == answer.tolist()


def test_without_a_video_every_option_is_the_mllms_own():
    model = GazeVideoLM(build("llava_onevision"), GreedyGazeSelector(), None, scales=SCALES)
    words = torch.tensor([[5, 6, 5, 6]])
    options = {"guidance_scale": 1.5, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(words, **options), model.mllm.generate(words, **options))
