"""Commands refuse unsupported, broken and incomplete checkpoints with clear errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeProcessor, FeatureGazeConfig, FeatureGazeModel
from transformers_autogaze.hub.checkpoints import check_device, load_encoder, load_selector
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip
from transformers_autogaze_cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whole checkpoints of two kinds of selectors and two kinds of encoders, and videos."""
    base = tmp_path_factory.mktemp("checkpoints")
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "output_size": 32}
    models = {
        "autogaze": AutoGazeModel(AutoGazeConfig(vision_config=vision, decoder_config=decoder)),
        "features": FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[8, 8, 8], depths=[1, 1, 1], feature_size=8)),
        "dinov2": Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)),
        "siglip": SiglipVisionModel(
            SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(base / name)
        if name == "siglip":
            SiglipImageProcessor().save_pretrained(base / name)
        if name in ("autogaze", "features"):
            AutoGazeProcessor().save_pretrained(base / name)
    for seed in range(2):
        (base / "videos").mkdir(exist_ok=True)
        write_video(base / "videos" / f"clip{seed}.mp4", render_demo_clip(4, 32, 48, seed), fps=4)
    return base


def test_an_unreachable_hub_is_tried_once_and_the_local_cache_is_used(folders, tmp_path):
    """In a process of its own, as where the Hub is and what was loaded from it is read when the library is imported."""
    cached = tmp_path / "models--someone--selector"
    shutil.copytree(folders / "features", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    code = """
from transformers_autogaze.hub.checkpoints import load_selector
try:
    load_selector("autogaze", argument="--selector")
except ValueError as error:
    print(error)
model, _ = load_selector("someone/selector")
print(model.config.model_type)
"""
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    error, kind = result.stdout.splitlines()
    assert "`--selector` must be a checkpoint's folder or Hub repository" in error
    assert "http://127.0.0.1:9 cannot be reached" in error and kind == "autogaze_features"
    assert "someone/selector is loaded from the local cache" in result.stderr


def break_checkpoint(folder, fault):
    """Breaks a checkpoint; gives what the message must say."""
    weights = folder / "model.safetensors"
    if fault == "a foreign model":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]})
        )
        return "bert"
    if fault in ("missing weights", "weights of other shapes", "unknown weights", "weights that are not finite"):
        held = load_file(weights)
        name = next(name for name in held if name.endswith("weight") and "norm" not in name)
        if fault == "missing weights":
            del held[name]
        elif fault == "weights of other shapes":
            held[name] = torch.zeros(3, 2, *held[name].shape[2:])
        elif fault == "weights that are not finite":
            held[name].view(-1)[0] = torch.nan
        else:
            held[name := "another.weight"] = torch.zeros(2)
        save_file(held, weights, metadata={"format": "pt"})
        return name
    if fault == "truncated weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return "cannot be loaded"
    if fault == "no weights":
        weights.unlink()
        return "model.safetensors"
    if fault == "a broken processor":
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).write_text('{"image_mean": [')
        return "processor"
    if fault == "a broken configuration":
        (folder / "config.json").write_text('{"model_type":')
        return "config.json"
    shutil.rmtree(folder)
    return "there is no folder"


FAULTS = (
    "a foreign model",
    "missing weights",
    "weights of other shapes",
    "weights that are not finite",
    "truncated weights",
    "no weights",
    "a broken processor",
    "a broken configuration",
    "nothing there",
)
COMMANDS = {
    "prune": ("features", ["prune", "{clip}", "--model", "{checkpoint}", "-o", "{out}"]),
    "demo": ("autogaze", ["demo", "--model", "{checkpoint}", "-o", "{out}"]),
    "evaluate": ("autogaze", ["evaluate", "{checkpoint}", "{clip}", "--num-frames", "2", "-o", "{out}"]),
    "evaluate --encoder": (
        "siglip",
        ["evaluate", "--encoder", "{checkpoint}", "{clip}", "--num-frames", "2", "-o", "{out}"],
    ),
    "train": ("autogaze", ["train", "{videos}", "--model", "{checkpoint}", "-o", "{out}", "--use-cpu"]),
    "train-grpo": ("autogaze", ["train-grpo", "{videos}", "--model", "{checkpoint}", "-o", "{out}", "--use-cpu"]),
    "resume": (
        "autogaze",
        ["train", "{videos}", "--resume-from-checkpoint", "{checkpoint}", "-o", "{out}", "--use-cpu"],
    ),
    "distill": ("dinov2", ["distill", "{checkpoint}", "{videos}", "-o", "{out}", "--scales", "2"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_broken_checkpoints(folders, tmp_path, capsys, command, fault):
    kind, arguments = COMMANDS[command]
    if command in ("train", "train-grpo", "resume", "distill"):
        pytest.importorskip("accelerate")
    if command.startswith("evaluate"):
        pytest.importorskip("matplotlib")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folders / kind, checkpoint)
    message = break_checkpoint(checkpoint, fault)
    names = {"clip": folders / "videos" / "clip0.mp4", "videos": folders / "videos", "out": tmp_path / "out"}
    assert main([argument.format(checkpoint=checkpoint, **names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "autogaze: error:" in error and message in error.rpartition("autogaze: error:")[2]
    assert not (tmp_path / "out").exists()


def test_unexpected_weights_are_named(folders, tmp_path):
    shutil.copytree(folders / "features", tmp_path / "features")
    message = break_checkpoint(tmp_path / "features", "unknown weights")
    with pytest.raises(ValueError, match=f"weights that the model does not have: {message}"):
        load_selector(tmp_path / "features")


@pytest.mark.parametrize("file", ["processor_config.json", "config.json"])
def test_a_file_without_a_json_object_is_named(folders, tmp_path, file):
    shutil.copytree(folders / "features", tmp_path / "features")
    (tmp_path / "features" / file).write_text("[]")
    with pytest.raises(ValueError, match=f"cannot be loaded: {file} must hold a JSON object, got a list") as error:
        load_selector(tmp_path / "features")
    assert "must be a checkpoint's folder" not in str(error.value)


@pytest.mark.parametrize("name", ["finest", "features", "greedy"])
def test_the_packages_selectors_load_by_name(name):
    selector, processor = load_selector(name)
    assert not selector.training and selector.dtype == torch.float32
    assert isinstance(processor, AutoGazeProcessor)


def test_a_checkpoint_without_a_processor_gets_the_published_one_with_a_warning(tiny, caplog):
    _, processor = load_selector(tiny.folder)
    assert processor.to_dict() == AutoGazeProcessor().to_dict()
    assert "has no processor; the published preprocessing is used" in caplog.text


def test_weights_that_do_not_affect_features_may_be_missing(folders, tmp_path):
    shutil.copytree(folders / "siglip", tmp_path / "siglip")
    held = load_file(tmp_path / "siglip" / "model.safetensors")
    kept = {name: weight for name, weight in held.items() if "head." not in name}
    assert len(kept) < len(held)
    save_file(kept, tmp_path / "siglip" / "model.safetensors", metadata={"format": "pt"})
    tower, processor = load_encoder(tmp_path / "siglip")
    assert list(processor.image_mean) == [0.5, 0.5, 0.5] and not tower.training


@pytest.mark.parametrize("device", ["nowhere", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
@pytest.mark.parametrize("command", ["prune", "demo", "evaluate", "label"])
def test_an_unavailable_device_is_refused_before_any_work(folders, tmp_path, capsys, command, device):
    inputs = {
        "prune": [folders / "videos"],
        "demo": [],
        "evaluate": ["finest", folders / "videos" / "clip0.mp4"],
        "label": [folders / "videos"],
    }[command]
    if command == "evaluate":
        pytest.importorskip("matplotlib")
    output = tmp_path / "out" / "labels.json" if command == "label" else tmp_path / "out"
    assert main([command, *map(str, inputs), "-o", str(output), "--device", device]) == 2
    assert f"must be a device that torch can compute on here, such as cpu, got {device!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "{clip}", "--model", "", "-o", "{out}"],
        ["evaluate", "", "{clip}", "-o", "{out}"],
        ["evaluate", "--encoder", "", "{clip}", "-o", "{out}"],
        ["train", "{videos}", "--model", "", "-o", "{out}"],
        ["train", "{videos}", "-o", ""],
        ["train", "{videos}", "--eval-videos", "", "-o", "{out}"],
        ["train-grpo", "{videos}", "--model", " ", "-o", "{out}"],
        ["label", "", "-o", "{out}.json"],
        ["distill", "", "{videos}", "-o", "{out}"],
        ["distill", "{dinov2}", "{videos}", "-o", ""],
    ],
)
def test_empty_names_are_refused(folders, tmp_path, monkeypatch, capsys, arguments):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names = {"clip": folders / "videos" / "clip0.mp4", "videos": folders / "videos", "dinov2": folders / "dinov2"}
    assert main([argument.format(out=tmp_path / "out", **names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "must not be empty" in error or "`--output` must name a folder" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "train-grpo", "distill", "evaluate"])
def test_an_output_that_is_a_file_is_refused(folders, tmp_path, capsys, command):
    pytest.importorskip("accelerate")
    (tmp_path / "out").write_text("mine")
    videos = str(folders / "videos")
    inputs = {
        "train": [videos],
        "train-grpo": [videos, "--model", str(folders / "autogaze")],
        "distill": [str(folders / "dinov2"), videos],
        "evaluate": ["finest", str(folders / "videos" / "clip0.mp4")],
    }[command]
    assert main([command, *inputs, "-o", str(tmp_path / "out")]) == 2
    assert "the output must be a folder, but" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "train-grpo", "distill"])
def test_the_initial_checkpoint_is_not_overwritten(folders, tmp_path, capsys, command):
    pytest.importorskip("accelerate")
    kind = "dinov2" if command == "distill" else "autogaze"
    shutil.copytree(folders / kind, tmp_path / kind)
    (tmp_path / "link").symlink_to(tmp_path / kind)
    before = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    start, videos = str(tmp_path / kind), str(folders / "videos")
    inputs = [start, videos] if command == "distill" else [videos, "--model", start]
    assert main([command, *inputs, "-o", str(tmp_path / "link")]) == 2
    assert "is the input" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} == before


def test_training_prints_a_progress_bar_and_the_output_folder(folders, tmp_path, capfd):
    pytest.importorskip("accelerate")
    logging.set_verbosity_warning()
    settings = (
        "--num-frames 1 --ratio-max 0.05 --max-steps 1 --per-device-train-batch-size 1 --use-cpu --report-to none"
    )
    arguments = ["train", str(folders / "videos"), "--model", str(folders / "autogaze"), *settings.split()]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    output = capfd.readouterr()
    assert "1/1" in output.err and output.out.endswith(f"written: {tmp_path / 'out'}\n")
    assert logging.get_verbosity() == logging.WARNING


def test_check_device_has_a_default():
    assert check_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
