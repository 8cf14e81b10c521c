"""LLaVA-OneVision in vLLM on embeddings of gazed videos, against `GazeVideoLM` in transformers."""

import pytest
import tiny_mllms
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import SamplingParams

from transformers_autogaze import GreedyGazeSelector
from transformers_autogaze.integrations import GazeVideoLM
from transformers_autogaze.serving.llava_embeddings import embed_for_vllm

from .conftest import TOKENS, make_video, run_documented_block, run_engine


GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
QUESTION = "What?"
PROMPT = "<|im_start|>user\n{}" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_onevision")
    tiny_mllms.write_llava_onevision(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> GazeVideoLM:
    mllm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return GazeVideoLM(mllm, GreedyGazeSelector(), AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def engine(folder):
    with run_engine(folder, limit_mm_per_prompt={"image": 2, "video": 1}, enable_mm_embeds=True) as engine:
        yield engine


def make_pixels(model: GazeVideoLM, frames: int = 8, seed: int = 0) -> torch.Tensor:
    """Makes normalised frames as the processor of the MLLM gives them, `(1, frames, 3, 56, 56)`."""
    levels = torch.from_numpy(make_video(frames, 56, 56, seed)[0]).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(numbers)[:, None, None] for numbers in (model.processor.image_mean, model.processor.image_std)
    )
    return ((levels / 255 - mean) / std)[None]


def expected_answer(model: GazeVideoLM, folder, pixels: list[torch.Tensor], settings: dict) -> tuple[int, list[int]]:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    prompt = tokenizer(PROMPT.format(" ".join(["<video>"] * len(pixels))), return_tensors="pt")["input_ids"]
    videos = [part[0] for part in pixels]
    inputs = model.prepare_inputs(prompt, videos, **settings)
    answer = model.generate(prompt, videos, **settings, max_new_tokens=TOKENS, do_sample=False)
    return inputs["input_ids"].shape[1], answer[0, prompt.shape[1] :].tolist()


def read(output) -> tuple[int, list[int]]:
    return len(output.prompt_token_ids), list(output.outputs[0].token_ids)


@pytest.mark.parametrize(
    "settings", [{"gazing_ratio": 0.5}, {"clip_ratio": 0.3}, {"task_loss_requirement": 0.5}], ids=str
)
def test_embeddings_give_the_answers_of_transformers(engine, model, folder, settings):
    pixels = make_pixels(model)
    video = embed_for_vllm(model, pixels, **settings)
    request = {"prompt": PROMPT.format("<image>"), "multi_modal_data": video.multi_modal_data}
    output = engine.generate([request], GREEDY, use_tqdm=False)[0]
    assert read(output) == expected_answer(model, folder, [pixels], settings)


def test_two_videos_of_unequal_length_and_a_batch(engine, model, folder):
    settings = {"gazing_ratio": 0.5}
    cases = [[make_pixels(model, 8), make_pixels(model, 4, seed=1)], [make_pixels(model, 6, seed=2)]]
    requests = [
        {
            "prompt": PROMPT.format(" ".join(["<image>"] * len(pixels))),
            "multi_modal_data": embed_for_vllm(model, [part[0] for part in pixels], **settings).multi_modal_data,
        }
        for pixels in cases
    ]
    outputs = engine.generate(requests, GREEDY, use_tqdm=False)
    assert [read(output) for output in outputs] == [
        expected_answer(model, folder, pixels, settings) for pixels in cases
    ]


def test_a_chat_message_takes_them_as_a_part(engine, model, folder):
    pixels, settings = make_pixels(model, seed=3), {"gazing_ratio": 0.5}
    content = [*embed_for_vllm(model, pixels, **settings).content, {"type": "text", "text": QUESTION}]
    output = engine.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0]
    assert read(output) == expected_answer(model, folder, [pixels], settings)


def test_a_model_that_cannot_gaze_refuses_the_settings(engine):
    request = {
        "prompt": PROMPT.format("<video>"),
        "multi_modal_data": {"video": [make_video(8, 56, 56)[0]]},
        "mm_processor_kwargs": {"gazing_ratio": 0.25},
    }
    with pytest.raises(ValueError, match="`gazing_ratio` must not be given to LlavaOnevision"):
        engine.generate([request], GREEDY, use_tqdm=False)


def test_other_mllms_and_a_gaze_beside_settings_are_refused(model):
    pixels = make_pixels(model)
    gaze = model.gaze(pixels, gazing_ratio=0.5)
    with pytest.raises(ValueError, match="`gaze` and settings must not be given together"):
        embed_for_vllm(model, pixels, gaze, gazing_ratio=0.5)


def test_the_documented_call_runs(engine, model):
    names = {"mllm": model.mllm, "selector": GreedyGazeSelector(), "processor": model.processor}
    names |= {"pixel_values_videos": make_pixels(model), "LLM": lambda name, **settings: engine}
    run_documented_block(2, **names)
