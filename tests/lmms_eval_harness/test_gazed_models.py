"""lmms-eval runs gazed MLLMs from end to end: small random ones, on questions about videos of this machine."""

from pathlib import Path
from statistics import mean

import pytest
from local_benchmark import ask_about

from transformers_autogaze.lmms_harness.results_table import read_rows, write_table


pytest.importorskip("lmms_eval")
FAMILIES = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "llava_onevision": "llava_hf"}
TINY_AUTOGAZE = Path(__file__).parents[1] / "fixtures" / "tiny-1"
SECONDS = ("choosing_seconds", "encoding_seconds", "answering_seconds")


def gazed(family: str) -> str:
    return f"gaze_{family}"


def costs_of(samples: list[dict]) -> list[dict]:
    return [cost for sample in samples for cost in sample["token_counts"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_results_hold_accuracy_tokens_and_seconds(run, videos, tmp_path, family):
    results, samples = run(gazed(family), family, "gazing_ratio=0.25")
    answers = [answer for path in videos for *_, answer in ask_about(path)]
    assert [sample["target"] for sample in samples] == answers
    right = [sample["filtered_resps"] == answer for sample, answer in zip(samples, answers, strict=True)]
    assert results["results"]["hlvid_local"]["accuracy,none"] == pytest.approx(100 * mean(right))

    costs = costs_of(samples)
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
    read, whole = {}, None
    for arguments in ("gazing_ratio=0.5", "clip_ratio=0.5", "selector=none"):
        costs = costs_of(run(gazed(family), family, arguments, "--limit", "2")[1])
        read[arguments] = [cost["input_tokens"] for cost in costs]
        whole = [cost["whole_input_tokens"] for cost in costs]
    assert read["selector=none"] == whole
    assert all(half < all_tokens for half, all_tokens in zip(read["clip_ratio=0.5"], whole, strict=True))
    # Frames of these sizes have even numbers of units, so that half of each is half of all.
    assert read["gazing_ratio=0.5"] == read["clip_ratio=0.5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_kept_answers_are_those_of_lmms_evals_own_model(run, family):
    options = ["--gen_kwargs", "max_new_tokens=4", *(["--force_simple"] if family == "llava_onevision" else [])]
    answers = [
        [sample["filtered_resps"] for sample in run(model, family, arguments, *options)[1]]
        for model, arguments in (
            (FAMILIES[family], ""),
            (gazed(family), "selector=none"),
            (gazed(family), "gazing_ratio=1"),
        )
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_without_a_selector_no_seconds_go_into_choosing(run):
    costs = costs_of(run("gaze_qwen2_5_vl", "qwen2_5_vl", "selector=none", "--limit", "1")[1])
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
    from lmms_eval.models import get_model

    with pytest.raises(ValueError, match=message):
        get_model(gazed(family))(pretrained="is not looked at", **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_ends_the_run_instead_of_counting_as_a_wrong_answer(run, family):
    """A published AutoGaze has fixed scales, which do not fit budgets of a clip."""
    with pytest.raises(ValueError, match="clip_ratio"):
        run(gazed(family), family, f"selector={TINY_AUTOGAZE},clip_ratio=0.5", "--verbosity", "DEBUG")


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
            _, samples = run("gaze_qwen3_vl", "qwen3_vl", "gazing_ratio=0.5", "--limit", "1", "--seed", str(len(lengths)))
        finally:
            yaml.write_text(text)
        lengths += [cost["whole_input_tokens"] for cost in costs_of(samples)]
    assert lengths[0] == lengths[1] + len(own)
