"""Qwen2.5-VL and Qwen3-VL in vLLM against `GazeQwenVL` in transformers, for the same videos, settings and selectors."""

import re

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams

from .conftest import (
    IMAGE,
    TOKENS,
    VIDEO,
    dense_request,
    find_logprobs,
    has_plugin,
    make_prompt,
    make_video,
    run_documented_block,
)


GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
QUARTER = {"gazing_ratio": 0.25}
SETTINGS = [{"gazing_ratio": 0.1}, QUARTER, {"gazing_ratio": 1.0}, {"task_loss_requirement": 0.3}, {"clip_ratio": 0.2}]
WRONG = {
    "ratio above 1": ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
    "ratio below 0": ({"gazing_ratio": -0.1}, "`gazing_ratio` must lie in 0..1"),
    "no number": ({"gazing_ratio": "much"}, "`gazing_ratio` must be a number"),
    "one ratio too few": ({"gazing_ratio": [0.5, 0.5, 0.5]}, "one for each of the 4 frames"),
    "threshold out of range": ({"task_loss_requirement": -1}, "`task_loss_requirement`"),
    "two budgets": ({"gazing_ratio": 0.5, "clip_ratio": 0.5}, "only one of"),
    "no such selector": ({**QUARTER, "gaze_model": "mine"}, "`gaze_model` of a request must be one of"),
    "a folder of a client's": ({**QUARTER, "gaze_model": "/tmp"}, "`gaze_model` of a request must be one of"),
    "no budget": ({"gaze_model": "greedy"}, "`gaze_model` must be given with one of"),
}


def make_request(parts: list[str], videos: list, images: list = (), **settings) -> dict:
    data = {"video": videos} if videos else {}
    data |= {"image": list(images)} if images else {}
    return {"prompt": make_prompt(*parts), "multi_modal_data": data, "mm_processor_kwargs": settings}


def answer(engine, *requests: dict) -> list[tuple[int, list[int]]]:
    """Gives the length of each prompt and the tokens of the answer."""
    outputs = engine.generate(list(requests), SamplingParams(**GREEDY), use_tqdm=False)
    return [(len(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("gaze_model", ["features", "greedy"])
def test_answers_and_prompts_equal_those_in_transformers(engine, reference, gaze_model, settings):
    video = make_video()
    request = make_request([VIDEO, "What?"], [video], gaze_model=gaze_model, **settings)
    expected = reference.answer(request["prompt"], [video], gaze_model=gaze_model, **settings)
    assert answer(engine, request) == [expected]


def test_what_is_kept_decides_the_answer(engine):
    requests = [make_request([VIDEO, "What?"], [make_video()], **settings) for settings in SETTINGS]
    answers = answer(engine, *requests)
    assert len({tuple(tokens) for _, tokens in answers}) > 2


@pytest.mark.parametrize("settings", [QUARTER, {"task_loss_requirement": 0.3}], ids=str)
def test_two_videos_and_a_picture_in_a_prompt(engine, reference, settings):
    videos = [make_video(8), make_video(4, 56, 84, seed=1)]
    picture = Image.fromarray(make_video(1, 84, 84, seed=2)[0][0])
    request = make_request(["One ", VIDEO, " two ", VIDEO, IMAGE, "?"], videos, [picture], **settings)
    assert answer(engine, request) == [reference.answer(request["prompt"], videos, [picture], **settings)]


def test_a_batch_of_unequal_requests(engine, reference):
    cases = [
        ([make_video(8)], QUARTER),
        ([make_video(4, 56, 84, seed=1)], {}),
        ([make_video(6, 112, 56, seed=2), make_video(2, 112, 112, seed=3)], {"gazing_ratio": 0.1}),
        ([make_video(6, 84, 84, seed=4)], {"task_loss_requirement": 0.3, "gaze_model": "greedy"}),
    ]
    requests = [
        make_request([VIDEO] * len(videos) + ["What is it?"], videos, **settings) for videos, settings in cases
    ]
    expected = [
        reference.answer(request["prompt"], videos, **settings)
        for request, (videos, settings) in zip(requests, cases, strict=True)
    ]
    assert answer(engine, *requests) == expected


def test_caches_do_not_confuse_two_settings_of_one_video(engine, reference):
    videos, prompt = [make_video(seed=5)], make_prompt(VIDEO, "What?")
    for settings in (QUARTER, {"gazing_ratio": 0.1}, {}, QUARTER, {**QUARTER, "gaze_model": "greedy"}, {}):
        request = make_request([VIDEO, "What?"], videos, **settings)
        assert answer(engine, request) == [reference.answer(prompt, videos, **settings)]


def test_a_prefix_that_is_cached_gives_the_same_answer(engine, reference):
    videos = [make_video(seed=6)]
    for question in ("What?", "What is here to be seen, and where?", "What?"):
        request = make_request([VIDEO, question], videos, **QUARTER)
        assert answer(engine, request) == [reference.answer(request["prompt"], videos, **QUARTER)]


def test_without_arguments_logits_are_those_of_plain_vllm(engine, plain_logprobs):
    assert has_plugin(engine)
    assert find_logprobs(engine, dense_request()) == plain_logprobs


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused_and_the_engine_lives_on(engine, name):
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        answer(engine, make_request([VIDEO, "What?"], [make_video()], **settings))
    assert len(answer(engine, make_request([VIDEO, "What?"], [make_video()], **QUARTER))) == 1


def test_a_video_without_frames_is_refused(engine):
    video, metadata = make_video()
    with pytest.raises(ValueError):
        answer(engine, make_request([VIDEO, "What?"], [(np.zeros((0, 112, 112, 3), np.uint8), metadata)], **QUARTER))
    assert len(answer(engine, make_request([VIDEO, "What?"], [(video, metadata)], **QUARTER))) == 1


def test_the_documented_call_runs(engine):
    frames, metadata = make_video()
    names = {"LLM": lambda name: engine, "prompt": make_prompt(VIDEO, "What?"), "frames": frames, "metadata": metadata}
    run_documented_block(1, {"from vllm import LLM\n": ""}, **names)
