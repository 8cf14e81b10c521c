"""vLLM's server with the plug-in, and requests of the `openai` client about a video file."""

import json
from pathlib import Path

import openai
import pytest
from vllm_server import run_server

from transformers_autogaze.video import write_video

from .conftest import TOKENS, VIDEO, make_prompt, make_video, run_documented_block


DEFAULT = {"gazing_ratio": 0.5, "gaze_model": "greedy"}  # of the server, for requests without arguments
OFF = {"gazing_ratio": None}
QUARTER = {"gazing_ratio": 0.25, "gaze_model": "features"}
WRONG = {
    "ratio above 1": ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
    "no such selector": ({"gazing_ratio": 0.5, "gaze_model": "mine"}, "`gaze_model` of a request must be one of"),
    "two budgets": ({"gazing_ratio": 0.5, "clip_ratio": 0.5}, "only one of"),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip.mp4", make_video()[0], 2)
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def client(qwen_folder, media, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = ["--allowed-local-media-path", str(media), "--mm-processor-kwargs", json.dumps(DEFAULT)]
    with run_server(qwen_folder, log, *options, "--trust-request-mm-kwargs") as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, path: Path, **settings) -> tuple[int, list[int]]:
    """Gives the length of the prompt and the tokens of the answer."""
    content = [{"type": "video_url", "video_url": {"url": f"file://{path}"}}, {"type": "text", "text": "What?"}]
    response = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"mm_processor_kwargs": settings, "ignore_eos": True, "return_token_ids": True},
    )
    return response.usage.prompt_tokens, response.choices[0].model_dump()["token_ids"]


@pytest.fixture(scope="module")
def video(media):
    """Frames of the file as vLLM decodes them."""
    from vllm.multimodal.media import MediaConnector

    found = MediaConnector(allowed_local_media_path=str(media)).fetch_video(f"file://{media / 'clip.mp4'}")
    frames, metadata = getattr(found, "media", found)
    assert len(frames) == 8
    return frames, metadata


@pytest.mark.parametrize("settings", [{}, QUARTER, OFF], ids=str)
def test_the_server_answers_as_transformers(client, reference, media, video, settings):
    together = {name: value for name, value in {**DEFAULT, **settings}.items() if value is not None}
    together = together if "gazing_ratio" in together else {}
    expected = reference.answer(make_prompt(VIDEO, "What?"), [video], **together)
    assert ask(client, media / "clip.mp4", **settings) == expected


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_a_bad_request_and_the_server_lives_on(client, media, name):
    settings, message = WRONG[name]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, media / "clip.mp4", **settings)
    assert error.value.status_code == 400 and message in str(error.value)
    assert ask(client, media / "clip.mp4", **QUARTER)


def test_a_video_without_frames_is_refused_and_the_server_lives_on(client, media):
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, media / "broken.mp4", **QUARTER)
    assert error.value.status_code == 400
    assert ask(client, media / "clip.mp4", **QUARTER)


def test_the_documented_request_is_answered(client, media, capsys):
    replaced = {
        "http://localhost:8000/v1": str(client.base_url),
        "Qwen/Qwen2.5-VL-7B-Instruct": client.models.list().data[0].id,
        "/videos/clip.mp4": str(media / "clip.mp4"),
    }
    usage = run_documented_block(0, replaced)["answer"].usage
    assert str(usage.prompt_tokens) in capsys.readouterr().out
