"""The table of results, from files as lmms-eval writes them."""

import json

import pytest

from transformers_autogaze.lmms_harness.results_table import main, read_rows, write_table


def write_results(folder, results, samples, groups=None, arguments="pretrained=a/b,max_num_frames=8"):
    folder.mkdir(parents=True)
    found = {
        "config": {"model": "gaze_qwen3_vl", "model_args": arguments},
        "group_subtasks": {name: [] for name in results} | (groups or {}),
        "results": results,
    }
    (folder / "20261126_1_results.json").write_text(json.dumps(found))
    for task, costs in samples.items():
        lines = [json.dumps({"doc_id": number, "token_counts": [cost]}) for number, cost in enumerate(costs)]
        (folder / f"20261126_1_samples_{task}.jsonl").write_text("\n".join(lines))


def cost(tokens: int, seconds: float) -> dict:
    return {"input_tokens": tokens, "output_tokens": 1, "whole_input_tokens": 4 * tokens, "encoding_seconds": seconds}


def test_a_row_holds_accuracy_its_interval_tokens_and_seconds(tmp_path):
    result = {
        "alias": "hlvid",
        "accuracy,none": 52.345,
        "accuracy_stderr,none": "N/A",
        "accuracy_stderr_clt,none": 0.03,
    }
    result |= {"accuracy_low,none": 49.5, "accuracy_high,none": 55.25}
    write_results(tmp_path / "deep" / "run", {"hlvid": result}, {"hlvid": [cost(100, 0.5), cost(200, 1.0)]})
    [row] = read_rows([tmp_path])
    assert row == {
        "model": "gaze_qwen3_vl",
        "arguments": "pretrained=a/b, max_num_frames=8",
        "task": "hlvid",
        "accuracy": "52.34 (49.5 to 55.25)",
        "input_tokens": "150",
        "whole_input_tokens": "600",
        "encoding_seconds": "0.750",
    }
    assert write_table([row]).endswith("| 52.34 (49.5 to 55.25) | 150 | 600 | - | 0.750 | - |")


def test_a_model_that_logs_nothing_has_empty_places(tmp_path):
    write_results(tmp_path / "run", {"mlvu_dev": {"alias": "mlvu_dev", "score,none": 60.0}}, {"mlvu_dev": [None]})
    [row] = read_rows([tmp_path])
    assert row["accuracy"] == "60" and "input_tokens" not in row


def test_a_group_is_the_mean_of_its_tasks(tmp_path):
    results = {"mvbench": {"alias": "mvbench"}, "one": {"acc,none": 40.0}, "two": {"acc,none": 60.0}}
    samples = {"one": [cost(100, 1.0)], "two": [cost(300, 1.0)]}
    write_results(tmp_path / "run", results, samples, groups={"mvbench": ["one", "two"]})
    [row] = read_rows([tmp_path])
    assert (row["task"], row["accuracy"], row["input_tokens"]) == ("mvbench", "50", "200")


def test_a_wrong_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no "):
        read_rows([tmp_path])
    (tmp_path / "1_results.json").write_text("[]")
    with pytest.raises(ValueError, match="is no file of lmms-eval's results"):
        read_rows([tmp_path])
    monkeypatch.setattr("sys.argv", ["results_table", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*1_results.json"):
        main()
