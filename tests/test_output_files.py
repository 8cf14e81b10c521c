"""Files are complete or unchanged: on a full disk, when a run fails, and when inputs are outputs."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from transformers import TrainingArguments

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    read_video,
    stream_video,
    write_video,
)
from transformers_autogaze.evaluation import comparison, feature_comparison, feature_report, plots, report
from transformers_autogaze.training.trainer import GazeClipTrainer
from transformers_autogaze.utils.output_files import (
    check_folder,
    check_not_inputs,
    replacing,
    replacing_files,
    to_json,
)


resource = pytest.importorskip("resource")


@contextmanager
def full_disk(size=64):
    """Limits files to a number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def score(**changes):
    score = comparison.SelectorScores("model", 0.5, None, 1.0, 26.0, 0.9, 0.1, 10.0, 19.6, None, None)
    return replace(score, **changes)


ROW = feature_comparison.FeatureRow("a", "spread", "random", "evenly", 0.5, "frame", 9, 0.5, 0.5, 0.5, 1.0, 1.0)


def write_clip(folder):
    write_video(folder / "clip.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8))


def write_chart(folder):
    plots.draw_charts(folder / "chart.png", [plots.Panel({"a": [(0, 1), (1, 3)]}, "Title", "x", "y")])


def write_scores(folder):
    report.write_report([score()], folder, {"model": "a name"})


def write_features(folder):
    feature_report.write_feature_report([ROW], folder, {"model": "a name"}, 100)


def write_rows(folder):
    feature_comparison.FeatureResults(folder / "rows.json", {"encoder": "a"}).add([ROW] * 9)


@pytest.mark.parametrize("write", [write_clip, write_chart, write_scores, write_features, write_rows])
def test_a_full_disk_leaves_earlier_files_unchanged(tmp_path, write):
    if write not in (write_clip, write_rows):
        pytest.importorskip("matplotlib")
    write(tmp_path)  # Libraries are loaded before the disk is full.
    before = contents(tmp_path)
    assert before
    with full_disk(), pytest.raises((OSError, ValueError)):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_a_trainer_that_cannot_save_leaves_the_last_model_unchanged(tmp_path):
    pytest.importorskip("accelerate")
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "output_size": 32}
    model = AutoGazeModel(AutoGazeConfig(scales=[32], image_size=32, vision_config=vision, decoder_config=decoder))
    trainer = GazeClipTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.save_model()
    before = contents(tmp_path)
    assert {"model.safetensors", "processor_config.json"} <= set(before)
    with full_disk(2000), pytest.raises(Exception, match="File too large|os error 27"):
        trainer.save_model()
    assert contents(tmp_path) == before
    assert isinstance(AutoGazeProcessor.from_pretrained(tmp_path), AutoGazeProcessor)


def test_files_of_an_earlier_run_are_replaced_together_when_all_are_complete(tmp_path):
    folder = tmp_path / "new" / "out"
    with replacing_files(folder, ["a", "b"]) as unfinished:
        (unfinished / "a").write_text("1")
        (unfinished / "b").write_text("1")
        (unfinished / "inside").mkdir()
        (unfinished / "inside" / "c").write_text("1")
    (folder / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt), replacing_files(folder, ["a", "b"]) as unfinished:
        (unfinished / "a").write_text("2")
        raise KeyboardInterrupt
    assert contents(folder) == {"a": b"1", "b": b"1", "inside/c": b"1", "mine": b"mine"}
    with replacing_files(folder, ["a", "b"]) as unfinished:
        (unfinished / "a").write_text("3")
    assert contents(folder) == {"a": b"3", "inside/c": b"1", "mine": b"mine"}


def test_a_failed_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError), replacing_files(tmp_path / "new" / "out"):
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_link_is_kept_and_its_file_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert oct((tmp_path / "file").stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_output_must_not_be_an_input_by_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_text("video")
    (tmp_path / "link.mp4").symlink_to("clip.mp4")
    check_not_inputs(["other.mp4", tmp_path], ["clip.mp4", "http://host/clip.mp4"])
    for path in ("clip.mp4", "./clip.mp4", tmp_path / "link.mp4"):
        with pytest.raises(ValueError, match="is the input 'clip.mp4'; give another output"):
            check_not_inputs([path], ["clip.mp4"])


def test_an_output_folder_must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match="the output must be a folder, but .* is a file"):
            check_folder(folder)
    with pytest.raises(ValueError, match="is a folder; give another name"), replacing(tmp_path):
        pass


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    assert json.loads(to_json({"a": [float("inf"), 1], "b": (float("nan"),)})) == {"a": [None, 1], "b": [None]}
    pytest.importorskip("matplotlib")
    report.write_report([score(reduction_factor=float("inf"))], tmp_path, {})
    text = (tmp_path / "results.json").read_text()
    assert "Infinity" not in text and json.loads(text)["scores"][0]["reduction_factor"] is None


def test_a_video_may_be_replaced_by_its_own_frames(tmp_path):
    write_clip(tmp_path)
    write_video(tmp_path / "clip.mp4", (255 - frame for frame in stream_video(tmp_path / "clip.mp4")[1]))
    assert len(read_video(tmp_path / "clip.mp4")[0]) == 9
