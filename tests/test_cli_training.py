import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import set_seed

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.cli import main
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.training.labels import read_labels
from transformers_autogaze.video import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(3):
        write_video(folder / f"clip{seed}.mp4", render_demo_clip(8, 64, 96, seed), fps=10)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    set_seed(0)
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoGazeModel(AutoGazeConfig(vision_config={"output_size": 32}, decoder_config=decoder)).save_pretrained(folder)
    AutoGazeVideoProcessor(image_std=(0.5, 0.25, 0.125)).save_pretrained(folder)
    return folder


def train(videos, output, *arguments):
    settings = (
        "--num-frames 2 --per-device-train-batch-size 1 --max-steps 2 --use-cpu --report-to none --disable-tqdm True"
    )
    return main(["train", str(videos), "--output-dir", str(output), *settings.split(), *map(str, arguments)])


def test_label_writes_the_published_json(videos, tmp_path, capsys):
    arguments = ["label", str(videos), "-o", str(tmp_path / "labels.json"), "--num-frames", "4", "--device", "cpu"]
    assert main([*arguments, "--gazing-ratio", "0.02"]) == 0
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert list(labels) == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    assert [len(frame) for frame in labels["clip1.mp4"]["gazing_pos"]] == [5] * 4
    assert "labels.json: 3 videos labelled, 0 skipped" in capsys.readouterr().out

    assert main([*arguments, "--task-loss-requirement", "1.2", "--shard", "2/3"]) == 0
    shard = read_labels(tmp_path / "labels-00002-of-00003.json")
    assert list(shard) == ["clip1.mp4"] and max(losses[-1] for losses in shard["clip1.mp4"].task_losses) <= 1.2


def test_train_trains_a_checkpoint_on_random_clips(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    assert train(videos, tmp_path, "--model", checkpoint, "--ratio-max", "0.1", "--eval-videos", videos) == 0
    trained, before = (AutoGazeModel.from_pretrained(folder) for folder in (tmp_path, checkpoint))
    assert trained.dtype == torch.float32
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    assert list(AutoGazeVideoProcessor.from_pretrained(tmp_path).image_std) == [0.5, 0.25, 0.125]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_train_leaves_a_whole_processor_and_a_card(videos, checkpoint, tmp_path, capsys):
    pytest.importorskip("accelerate")
    assert train(videos, tmp_path / "out", "--model", checkpoint, "--ratio-max", "0.05", "--max-steps", 1) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'out'}\n")
    script = """
import sys
sys.modules["transformers_autogaze"] = None
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    print(type(processor).__name__, list(processor.video_processor.image_std))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    folders = [str(tmp_path / "out"), str(tmp_path / "out" / "checkpoint-1")]
    shown = subprocess.run(
        [sys.executable, "-c", script, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == ["AutoGazeProcessor [0.5, 0.25, 0.125]"] * 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| started from | {checkpoint.name} |" in card and "| steps | 1 |" in card and "| videos | 3 |" in card
    assert "None were measured" in card


def test_own_arguments_come_first_in_the_help(capsys):
    for command in ("train", "train-grpo", "distill"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        places = [shown.index(text) for text in ("-o ", "of this package:", "\nTrainingArguments, of transformers:")]
        assert places == sorted(places) and shown.index("--learning_rate") > places[-1]
        assert shown.index("--max_steps") > places[-1]


def test_train_begins_a_new_model_from_weights_that_can_learn(videos, tmp_path):
    pytest.importorskip("accelerate")
    assert train(videos, tmp_path, "--learning-rate", 0, "--ratio-max", "0.05", "--num-multi-token-pred", 4) == 0
    model = AutoGazeModel.from_pretrained(tmp_path)
    assert model.gaze_decoder.num_rows == 4
    # Each position has a code of waves of its own; random weights have none.
    codes = model.connector.pos_embed[:, -108:]
    torch.testing.assert_close(codes.T @ codes / 196, torch.eye(108), rtol=0, atol=1e-5)


def test_train_takes_label_files_and_goes_on_from_a_checkpoint(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    labels = [tmp_path / "labels.json", "--num-frames", "2", "--gazing-ratio", "0.02"]
    assert main(["label", str(videos), "-o", *map(str, labels)]) == 0
    arguments = ["--model", checkpoint, "--labels", labels[0], "--in-memory", "--save-steps", "1"]
    assert train(videos, tmp_path / "one", *arguments) == 0
    assert (
        train(videos, tmp_path / "two", *arguments, "--resume-from-checkpoint", tmp_path / "one" / "checkpoint-1") == 0
    )
    one, two = (AutoGazeModel.from_pretrained(tmp_path / folder) for folder in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_train_teaches_history_before_all_else(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--model", checkpoint, "--ratio-max", "0.05", "--learning-rate", 0, "--history-steps", 3]
    assert train(videos, tmp_path, *arguments) == 0
    trained, before = (AutoGazeModel.from_pretrained(folder).state_dict() for folder in (tmp_path, checkpoint))
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert any(".layers.0." in name for name in changed) and not any(".layers.1." in name for name in changed)


def test_train_makes_a_new_model_of_the_published_sizes(videos, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--num-multi-token-pred", "5", "--ratio-max", "0.02", "--max-steps", "1", "--num-frames", "1"]
    assert train(videos, tmp_path, *arguments) == 0
    model = AutoGazeModel.from_pretrained(tmp_path)
    assert model.config.decoder_config.num_multi_token_pred == 5 and model.config.decoder_config.hidden_size == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label", "nowhere", "-o", "labels.json"], "there is no folder 'nowhere'"),
        (["label", "{videos}", "-o", "labels.txt"], "`output` must end in .json"),
        (
            ["label", "{videos}", "-o", "labels.json", "--shard", "3"],
            "`--shard` must be two numbers such as 3/16, got '3'",
        ),
        (["train", "nowhere", "--output-dir", "out", "--use-cpu"], "there is no folder 'nowhere'"),
        (["train", "{videos}", "--output-dir", "out", "--min-crop", "2"], "`min_crop` must lie above 0"),
        (["train", "{videos}", "--output-dir", "out", "--on-policy", "2"], "`on_policy` must lie in 0..1"),
        (
            ["train", "{videos}", "--output-dir", "out", "--history-steps", "-1"],
            "`--history-steps` must be a whole number",
        ),
        (
            ["train", "{videos}", "--output-dir", "out", "--history-steps", "9", "--labels", "labels.json"],
            "0 with `--labels`",
        ),
    ],
)
def test_what_is_at_fault_is_said_before_any_work(videos, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(videos=videos) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
