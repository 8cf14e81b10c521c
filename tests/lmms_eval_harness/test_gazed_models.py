"""lmms-eval runs gazed MLLMs from end to end: tiny ones with random weights, on questions about local videos."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from local_benchmark import FIELDS, INSTRUCTION, ask_about

from transformers_autogaze.lmms_harness import TASKS
from transformers_autogaze.lmms_harness.results_table import read_rows, write_table


pytest.importorskip("lmms_eval")
from lmms_eval.__main__ import cli_evaluate  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager, get_task_dict  # noqa: E402


FAMILIES = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "llava_onevision": "llava_hf"}
TINY_AUTOGAZE = Path(__file__).parents[1] / "fixtures" / "tiny-1"
SECONDS = ("choosing_seconds", "encoding_seconds", "answering_seconds")
SMALL = {
    "qwen2_5_vl": "device_map=cpu,max_num_frames=8,min_pixels=784,max_pixels=12544",
    "qwen3_vl": "device_map=cpu,max_num_frames=8,min_pixels=1024,max_pixels=16384",
    "llava_onevision": "device_map=cpu,max_frames_num=8",
}


@pytest.fixture
def run(tasks, mllms) -> Callable[..., dict[str, Any]]:
    """Runs lmms-eval on the local task, and gives its results."""

    def call(model: str, family: str, arguments: str = "", **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks), include_defaults=False, model_name=model)
        given = arguments_of(mllms(family), family, arguments)
        settings = {"tasks": ["hlvid_local"], "batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **options}
        return simple_evaluate(model, given, task_manager=manager, **settings)

    return call


def arguments_of(folder: Path, family: str, arguments: str) -> str:
    return ",".join(filter(None, [f"pretrained={folder}", SMALL[family], arguments]))


def gazed(family: str) -> str:
    return f"gaze_{family}"


def costs_of(results: dict[str, Any]) -> list[dict[str, float]]:
    return [cost for sample in results["samples"]["hlvid_local"] for cost in sample["token_counts"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_of_a_run_hold_accuracy_tokens_and_seconds(tasks, mllms, videos, tmp_path, monkeypatch, family):
    """By the command line, with all of lmms-eval's own tasks at hand."""
    given = arguments_of(mllms(family), family, "gazing_ratio=0.25")
    command = ["lmms_eval", "--model", gazed(family), "--model_args", given, "--tasks", "hlvid_local"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--log_samples", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    [results], [samples] = (list(tmp_path.rglob(name)) for name in ("*_results.json", "*_samples_hlvid_local.jsonl"))
    results = json.loads(results.read_text())
    samples = [json.loads(line) for line in samples.read_text().splitlines()]

    answers = [answer for path in videos for *_, answer in ask_about(path)]
    assert [sample["target"] for sample in samples] == answers
    right = [sample["filtered_resps"] == answer for sample, answer in zip(samples, answers, strict=True)]
    assert results["results"]["hlvid_local"]["accuracy,none"] == pytest.approx(100 * mean(right))

    costs = [cost for sample in samples for cost in sample["token_counts"]]
    assert len(costs) == len(answers) and all(cost[name] > 0 for cost in costs for name in SECONDS)
    assert all(cost["output_tokens"] == 1 for cost in costs)
    logged = results["throughput"]
    for name in ("input_tokens", "whole_input_tokens", *SECONDS):
        assert logged[f"avg_{name}"] == pytest.approx(mean(cost[name] for cost in costs))
    assert logged["total_gen_tokens"] == len(answers) and logged["total_elapsed_time"] > 0
    assert results["efficiency"]["overall"]["total_input_tokens"] == sum(cost["input_tokens"] for cost in costs)

    table = write_table(read_rows([tmp_path]))
    assert f"| {logged['avg_input_tokens']:.0f} | {logged['avg_whole_input_tokens']:.0f} |" in table


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_reads_the_share_that_was_asked_for(run, family):
    settings = ("gazing_ratio=0.5", "clip_ratio=0.5", "selector=none")
    costs = {arguments: costs_of(run(gazed(family), family, arguments, limit=2)) for arguments in settings}
    assert all(cost["input_tokens"] == cost["whole_input_tokens"] for cost in costs["selector=none"])
    for half, of_clip in zip(*(costs[arguments] for arguments in settings[:2]), strict=True):
        assert half["whole_input_tokens"] == of_clip["whole_input_tokens"]
        # A ratio is rounded down in every frame, or pair of frames.
        assert 0 <= of_clip["input_tokens"] - half["input_tokens"] <= 8
        dropped = of_clip["whole_input_tokens"] - of_clip["input_tokens"]
        assert 0 < dropped < of_clip["whole_input_tokens"] / 2  # words are kept


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_kept_answers_are_those_of_lmms_evals_own_model(run, family):
    options = {"gen_kwargs": "max_new_tokens=4", "force_simple": family == "llava_onevision"}
    answers = [
        [sample["filtered_resps"][0] for sample in run(model, family, arguments, **options)["samples"]["hlvid_local"]]
        for model, arguments in (
            (FAMILIES[family], ""),
            (gazed(family), "selector=none"),
            (gazed(family), "gazing_ratio=1"),
            (gazed(family), "gazing_ratio=0.25"),
        )
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1 and answers[3] != answers[0]


def test_without_a_selector_no_seconds_go_into_choosing(run):
    costs = costs_of(run("gaze_qwen2_5_vl", "qwen2_5_vl", "selector=none", limit=1))
    assert [cost["choosing_seconds"] for cost in costs] == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
        ({"clip_ratio": 0}, "`clip_ratio` must be above 0"),
        ({"task_loss_requirement": "low"}, "`task_loss_requirement` must be a number"),
        ({"selector": "nowhere"}, "`selector`.*'nowhere'"),
        ({"selector": "none", "gazing_ratio": 0.5}, "`gazing_ratio` must not be given with `selector` 'none'"),
        ({"batch_size": 4}, "`batch_size` must be 1"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_settings_are_refused_before_the_mllm_is_loaded(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model(gazed(family))(pretrained="is not looked at", **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_ends_the_run_instead_of_counting_as_a_wrong_answer(run, family):
    """A published AutoGaze has fixed scales, which do not fit budgets of a clip."""
    with pytest.raises(ValueError, match="clip_ratio"):
        run(gazed(family), family, f"selector={TINY_AUTOGAZE},clip_ratio=0.5", limit=1)


def test_tasks_ask_as_they_ask_lmms_evals_own_model(run, tasks):
    yaml = tasks / "hlvid_local.yaml"
    text, own = yaml.read_text(), "words of its own"
    (tasks / "words.py").write_text(
        "def ask(doc, lmms_eval_specific_kwargs):\n    return doc['question'] + lmms_eval_specific_kwargs['end']\n"
    )
    lengths = []
    for name in ("qwen3_vl", "another_model"):
        words = f"lmms_eval_specific_kwargs:\n  default:\n    end: ''\n  {name}:\n    end: {own}\n"
        try:
            yaml.write_text(f"{text}doc_to_text: !function words.ask\n{words}")
            results = run("gaze_qwen3_vl", "qwen3_vl", "gazing_ratio=0.5", limit=1)
        finally:
            yaml.write_text(text)
        lengths += [cost["whole_input_tokens"] for cost in costs_of(results)]
    assert lengths[0] == lengths[1] + len(own)


def test_the_task_reads_the_published_fields(tasks, videos):
    """From a parquet file where the data set has its own, which lmms-eval reads in the same way."""
    manager = TaskManager(include_path=[str(tasks), str(TASKS)], include_defaults=False)
    assert {"hlvid", "hlvid_local"} <= set(manager.all_tasks)
    task = get_task_dict(["hlvid_local"], manager, "chat")["hlvid_local"]
    docs = task.test_docs()
    assert set(docs.column_names) == set(FIELDS) and len(docs) == 2 * len(videos)
    [message] = task.doc_to_messages(docs[0])
    video, question = message["content"]
    assert (video["type"], Path(video["url"])) == ("video", videos[0])
    assert question["text"].startswith("What is the shape") and question["text"].endswith(INSTRUCTION)
    assert task.config.dataset_path != "bfshi/HLVid" and task.config.test_split == "test"
