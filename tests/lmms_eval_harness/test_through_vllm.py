"""lmms-eval asks vLLM with the plug-in, and gets the answers that the gazed models in transformers give it."""

import json
import os

import pytest


# To be set before vLLM is imported: a small cache, all cores, and the engine in this process.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
pytest.importorskip("vllm")
pytest.importorskip("lmms_eval")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm_server import run_server  # noqa: E402


ENGINE = (
    'dtype=float32,max_model_len=2048,enforce_eager=True,max_new_tokens=1,nframes=8,limit_mm_per_prompt={"video": 1}'
)
PIXELS = {
    "qwen2_5_vl": "min_image_pixels=784,max_pixels=12544",
    "qwen3_vl": "min_image_pixels=1024,max_pixels=16384",
}
QUARTER = {"gaze_model": "features", "gazing_ratio": 0.25}
KEPT = f"mm_processor_kwargs={json.dumps(QUARTER)}"
IN_TRANSFORMERS = "device_map=cpu,max_num_frames=8,min_pixels=784,max_pixels=12544"


def evaluate(tasks, model, arguments: str = "") -> list[tuple[str, dict]]:
    """Gives the answer to each question, and what it cost."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"tasks": ["hlvid_local"], "batch_size": 1, "device": "cpu", "bootstrap_iters": 0}
    results = simple_evaluate(model, arguments, task_manager=manager, **options)
    samples = results["samples"]["hlvid_local"]
    return [(sample["filtered_resps"][0], sample["token_counts"][0]) for sample in samples]


def evaluate_in_vllm(tasks, model: str, folder, family: str, arguments: str = "") -> list[tuple[str, dict]]:
    given = ",".join(filter(None, [f"model={folder}", ENGINE, PIXELS[family], arguments]))
    loaded = get_model(model).create_from_arg_string(given, {"batch_size": 2})
    try:
        return evaluate(tasks, loaded)
    finally:
        loaded.client.llm_engine.engine_core.shutdown()
        del loaded.client
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("is_gazed", [True, False], ids=["gazed", "whole"])
def test_answers_and_tokens_are_those_in_transformers(tasks, mllms, is_gazed):
    folder = mllms("qwen2_5_vl")
    found = evaluate_in_vllm(tasks, "gaze_vllm", folder, "qwen2_5_vl", KEPT if is_gazed else "")
    settings = "selector=features,gazing_ratio=0.25" if is_gazed else "selector=none"
    expected = evaluate(tasks, "gaze_qwen2_5_vl", f"pretrained={folder},{IN_TRANSFORMERS},{settings}")
    assert [answer for answer, _ in found] == [answer for answer, _ in expected]
    for name in ("input_tokens", "output_tokens"):
        assert [cost[name] for _, cost in found] == [cost[name] for _, cost in expected]
    assert all(cost["answering_seconds"] > 0 for _, cost in found)
    assert all((cost["input_tokens"] < cost["whole_input_tokens"]) == is_gazed for _, cost in expected)


def test_lmms_evals_own_model_gazes_at_the_videos_of_qwen3_vl(tasks, mllms):
    """It resizes videos of Qwen3-VL in another way than lmms-eval's model in transformers, and logs no tokens."""
    folder = mllms("qwen3_vl")
    own, gazed, whole = (
        evaluate_in_vllm(tasks, model, folder, "qwen3_vl", arguments)
        for model, arguments in (("vllm_generate", KEPT), ("gaze_vllm", KEPT), ("gaze_vllm", ""))
    )
    answers = [[answer for answer, _ in results] for results in (own, gazed, whole)]
    assert answers[0] == answers[1] != answers[2]
    tokens = [[cost["input_tokens"] for _, cost in results] for results in (gazed, whole)]
    assert all(left < before for left, before in zip(*tokens, strict=True))


def test_through_the_server_as_many_tokens_are_read(tasks, mllms, videos, tmp_path):
    """As `docs/benchmarks.md` says; the server takes other frames than lmms-eval, so answers can differ."""
    folder = mllms("qwen2_5_vl")
    options = ["--allowed-local-media-path", str(videos[0].parent), "--mm-processor-kwargs", json.dumps(QUARTER)]
    # lmms-eval sends the number of frames, which a server takes from clients that it trusts, and with this loader.
    options += ["--trust-request-mm-kwargs", "--media-io-kwargs", '{"video": {"video_backend": "opencv"}}']
    with run_server(folder, tmp_path / "server.log", *options) as address:
        given = f"model_version={folder},base_url={address}/v1,api_key=EMPTY,timeout=600,num_concurrent=1"
        found = evaluate(tasks, "openai", f"{given},pass_video_url=True,max_frames_num=8")
    settings = "selector=features,gazing_ratio=0.25"
    expected = evaluate(tasks, "gaze_qwen2_5_vl", f"pretrained={folder},{IN_TRANSFORMERS},{settings}")
    assert all(answer in tuple("ABCD") for answer, _ in found)
    assert [cost["input_tokens"] for _, cost in found] == [cost["input_tokens"] for _, cost in expected]
