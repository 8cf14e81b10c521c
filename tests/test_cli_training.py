import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from published import FIXTURES
from transformers import set_seed

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.cli import main
from transformers_autogaze.training.label_files import read_label_settings, read_labels
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


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
    assert list(labels) == ["settings", "clip0.mp4", "clip1.mp4", "clip2.mp4"]
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


def test_train_saves_a_complete_processor_and_a_card(videos, checkpoint, tmp_path, capsys):
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
    output = subprocess.run(
        [sys.executable, "-c", script, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.splitlines() == ["AutoGazeProcessor [0.5, 0.25, 0.125]"] * 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| started from | {checkpoint.name} |" in card and "| steps | 1 |" in card and "| videos | 3 |" in card
    assert "Nothing was measured" in card


def test_own_arguments_come_first_in_the_help(capsys):
    for command in ("train", "train-grpo", "distill"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        output = capsys.readouterr().out
        places = [output.index(text) for text in ("-o ", "of this package:", "\nTrainingArguments, of transformers:")]
        assert places == sorted(places) and output.index("--learning_rate") > places[-1]
        assert output.index("--max_steps") > places[-1]


def test_train_accepts_label_files_and_a_checkpoint(videos, checkpoint, tmp_path):
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


def test_a_finished_training_that_is_resumed_makes_no_further_step(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--model", checkpoint, "--ratio-max", "0.02", "--save-steps", "1"]
    assert train(videos, tmp_path / "one", *arguments) == 0
    resumed = ["--resume-from-checkpoint", tmp_path / "one" / "checkpoint-2"]
    assert train(videos, tmp_path / "two", *arguments, *resumed) == 0
    one, two = (AutoGazeModel.from_pretrained(tmp_path / folder) for folder in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert "| steps | 2 |" in (tmp_path / "two" / "README.md").read_text()


def test_both_stages_train_on_the_task_of_features(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    labels = str(tmp_path / "labels.json")
    frames = ["--num-frames", "2", "--device", "cpu"]
    assert main(["label", str(videos), "-o", labels, "--gazing-ratio", "0.02", "--task", "features", *frames]) == 0
    assert read_label_settings(labels)["task"] == "features"
    losses = [loss for clip in read_labels(labels).values() for losses in clip.task_losses for loss in losses]
    assert 0 < min(losses) and max(losses) < 1.2  # a frame can be further from the mean than the average
    stage1 = ["--model", checkpoint, "--labels", labels, "--task", "features", "--on-policy", 1]
    assert train(videos, tmp_path / "stage1", *stage1) == 0
    stage2 = [
        "train-grpo",
        videos,
        "--model",
        tmp_path / "stage1",
        "--output-dir",
        tmp_path / "stage2",
        "--task",
        "features",
    ]
    settings = "--num-frames 2 --group-size 2 --max-steps 1 --ratio-min 0.02 --ratio-max 0.02 --threshold-share 0"
    quiet = "--per-device-train-batch-size 1 --use-cpu --report-to none --disable-tqdm True"
    assert main([*map(str, stage2), *settings.split(), *quiet.split()]) == 0
    trained, before = (AutoGazeModel.from_pretrained(tmp_path / stage) for stage in ("stage2", "stage1"))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))


def test_labels_of_other_settings_are_not_trained_on(videos, checkpoint, tmp_path, capsys):
    pytest.importorskip("accelerate")
    labels = str(tmp_path / "labels.json")
    label = ["label", str(videos), "-o", labels, "--num-frames", "2", "--gazing-ratio", "0.02", "--device", "cpu"]
    assert main(label) == 0
    arguments = ["--model", checkpoint, "--labels", labels]
    for others, message in (
        (["--num-frames", 4], "`num_frames` 2, but it is 4 now"),
        (["--task", "features"], "`task` pixels, but it is features now"),
    ):
        assert train(videos, tmp_path / "out", *arguments, *others) == 2
        assert message in capsys.readouterr().err
    assert main([*label, "--gazing-ratio", "0.05"]) == 2
    assert "`gazing_ratio` 0.02, but it is 0.05" in capsys.readouterr().err


def test_labels_of_videos_that_have_changed_are_not_trained_on(videos, checkpoint, tmp_path, capsys):
    pytest.importorskip("accelerate")
    copies = shutil.copytree(videos, tmp_path / "videos")
    labels = ["--num-frames", "2", "--gazing-ratio", "0.02", "--device", "cpu", "-o", str(tmp_path / "labels.json")]
    assert main(["label", str(copies), *labels]) == 0
    with (copies / "clip1.mp4").open("ab") as file:
        file.write(b"other")
    for run in (
        lambda: main(["label", str(copies), *labels]),
        lambda: train(copies, tmp_path / "out", "--model", checkpoint, "--labels", tmp_path / "labels.json"),
    ):
        assert run() == 2
        assert "the labels of 'clip1.mp4' in" in capsys.readouterr().err


def test_an_undecodable_video_is_left_out_of_training_by_name(videos, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    for path in videos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "clip0.mp4").read_bytes()[:300])
    arguments = ["--model", checkpoint, "--ratio-max", "0.02", "--max-steps", 4]
    with pytest.warns(UserWarning, match="the video bad.mp4 cannot be read and is left out") as warned:
        assert train(tmp_path, tmp_path / "out", *arguments) == 0
    assert len([warning for warning in warned if "left out" in str(warning.message)]) == 1


def test_train_makes_a_new_model_of_the_published_sizes(videos, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--num-multi-token-pred", "5", "--ratio-max", "0.02", "--max-steps", "1", "--num-frames", "1"]
    assert train(videos, tmp_path, *arguments) == 0
    model = AutoGazeModel.from_pretrained(tmp_path)
    assert model.config.decoder_config.num_multi_token_pred == 5 and model.config.decoder_config.hidden_size == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["label", "nowhere", "-o", "labels.json"],
            "VIDEOS must be a folder of videos, but there is no folder 'nowhere'",
        ),
        (["label", "{videos}/clip0.mp4", "-o", "labels.json"], "clip0.mp4' is a file"),
        (["label", "nowhere", "-o", "labels.json", "--gazing-ratio", "2"], "`gazing_ratio` must lie in 0..1"),
        (["label", "{videos}", "-o", "labels.txt"], "`output` must end in .json"),
        (
            ["label", "{videos}", "-o", "labels.json", "--shard", "3"],
            "`--shard` must be two numbers such as 3/16, got '3'",
        ),
        (
            ["train", "nowhere", "--output-dir", "out", "--use-cpu"],
            "VIDEOS must be a folder of videos, but there is no folder 'nowhere'",
        ),
        (
            ["train", "{videos}", "--eval-videos", "nowhere", "--output-dir", "out", "--use-cpu"],
            "`--eval-videos` must be a folder of videos, but there is no folder 'nowhere'",
        ),
        (["train", "{videos}", "--output-dir", "out", "--min-crop", "2"], "`min_crop` must lie above 0"),
        (["train", "{videos}", "--output-dir", "out", "--on-policy", "2"], "`on_policy` must lie in 0..1"),
        (
            ["label", "{videos}", "-o", "labels.json", "--num-frames", "0"],
            "--num-frames: must be a whole number of at least 1",
        ),
        (
            ["label", "{videos}", "-o", "labels.json", "--batch-size", "0"],
            "--batch-size: must be a whole number of at least 1",
        ),
        (
            ["label", "{videos}", "-o", "labels.json", "--task", "features", "--task-loss-requirement", "1.5"],
            "`task_loss_requirement` must lie in 0..1",
        ),
        (
            ["label", "{videos}", "-o", "labels.json", "--feature-model", "x"],
            "`--feature-model` needs `--task features`, got 'x'",
        ),
        (
            ["label", "{videos}", "-o", "labels.json", "--task", "features", "--feature-model", "no/such"],
            "`--feature-model` must be a checkpoint's folder or Hub repository, but the config.json of 'no/such' cannot",
        ),
        (
            [
                "label",
                "{videos}",
                "-o",
                "labels.json",
                "--task",
                "features",
                "--feature-model",
                str(FIXTURES / "tiny-1"),
            ],
            "`--feature-model` must be a checkpoint of a gaze model (autogaze_features), but",
        ),
        (
            ["train", "{videos}", "-o", "out", "--task", "features", "--model", str(FIXTURES / "tiny-1")],
            "`--feature-model` must take patches of GazeGrid(scales=[16, 32, 64], patch_size=16): `scales` must be",
        ),
        (
            ["train", "{videos}", "--output-dir", "out", "--task", "features", "--threshold-max", "2"],
            "`threshold_min` and `threshold_max` must be losses of the task",
        ),
    ],
)
def test_invalid_input_is_an_error_before_any_work(videos, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(videos=videos) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
