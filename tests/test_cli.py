import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from transformers_autogaze import read_video, write_video
from transformers_autogaze.cli import main


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8).repeat(13, 1).repeat(13, 2)
    frames[3:] = frames[3]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", iter(frames), fps=10)


def test_prune_writes_an_overlay_records_a_sheet_and_a_table(clip, tmp_path, capsys):
    assert main(["prune", str(clip), "--clip-ratio", "0.3", "-o", str(tmp_path / "out")]) == 0
    frames, metadata = read_video(tmp_path / "out" / "overlay.mp4")
    assert frames.shape == (20, 66, 3 * 92 + 2 * 4, 3) and metadata.fps == 10
    gaze = json.loads((tmp_path / "out" / "gaze.json").read_text())
    statistics = gaze["statistics"]
    assert statistics["num_frames"] == 20 and len(statistics["patches_each_frame"]) == 20
    assert statistics["num_patches"] == len(gaze["records"]) == sum(statistics["patches_each_frame"])
    assert statistics["patches_each_frame"][0] == 196 > statistics["patches_each_frame"][-1]  # it stands still by then
    assert statistics["num_patches"] == 20 * 196 * 0.3 and gaze["settings"] == {"clip_ratio": 0.3}
    assert [record["frame"] for record in gaze["records"]] == sorted(record["frame"] for record in gaze["records"])
    assert gaze["records"][-1]["frame"] == 19
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 8 * 92
    table = capsys.readouterr().out
    assert f"patches kept    {statistics['num_patches']}" in table and "20 frames of 92x66" in table


def test_chunks_go_on_with_the_stream(clip, tmp_path):
    """The 17th frame opens a chunk; nothing moves there, so the greedy selector needs next to nothing."""
    arguments = ["--selector", "greedy", "--task-loss-requirement", "0.5"]
    assert main(["prune", str(clip), *arguments, "-o", str(tmp_path)]) == 0
    gaze = json.loads((tmp_path / "gaze.json").read_text())
    counts = gaze["statistics"]["patches_each_frame"]
    assert gaze["selector"] == "greedy"
    assert counts[0] > 10 and counts[16] <= 2


def test_prune_takes_a_model_and_samples_frames(clip, tiny, tmp_path):
    arguments = ["prune", str(clip), "--model", str(tiny.folder), "--frames", "5", "--gazing-ratio", "0.3"]
    assert main([*arguments, "--task-loss-requirement", "-9", "-o", str(tmp_path)]) == 0
    gaze = json.loads((tmp_path / "gaze.json").read_text())
    assert gaze["statistics"]["patches_each_frame"] == [6] * 5
    assert gaze["frame_indices"] == [0, 4, 8, 12, 16]
    assert read_video(tmp_path / "overlay.mp4")[1].fps == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("selector", "tiles", "finest"),
    [
        ("finest", "grid", "448x672"),
        ("finest", "native", "80x96"),
        ("greedy", "grid", "448x672"),
        ("greedy", "native", "224"),
    ],
)
def test_prune_gazes_at_tiles(clip, tmp_path, selector, tiles, finest):
    arguments = ["--selector", selector, "--frames", "3", "--tiles", tiles, "--max-tiles", "6"]
    asked = {
        "finest": ["--clip-ratio", "0.9"],
        "greedy": ["--gazing-ratio", "0.2", "--task-loss-requirement", "-9"],
    }[selector]
    assert main(["prune", str(clip), *arguments, *asked, "-o", str(tmp_path)]) == 0
    assert read_video(tmp_path / "overlay.mp4")[0].shape == (3, 66, 3 * 92 + 2 * 4, 3)
    gaze = json.loads((tmp_path / "gaze.json").read_text())
    assert list(gaze["statistics"]["patches_each_scale"])[-1] == finest
    boxes = np.array([record["box"] for record in gaze["records"]])
    assert len(boxes) == gaze["statistics"]["num_patches"] > 3 and gaze["statistics"]["psnr"] > 20
    # Every patch shows something of the frame of 92x66 pixels, and no box reaches beyond it.
    assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min() >= 0
    assert boxes[:, 2].max() <= 92 and boxes[:, 3].max() <= 66


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "missing.mp4"], "missing.mp4"),
        (["prune", "{text}"], "no video"),
        (["prune", "{clip}", "--gazing-ratio", "1.5"], "`gazing_ratio` must lie in 0..1"),
        (["prune", "{clip}", "--task-loss-requirement", "nan"], "`task_loss_requirement` must be numbers, got NaN"),
        (["prune", "{clip}", "--clip-ratio", "0"], "`clip_ratio` must be above 0 and at most 1"),
        (["prune", "{clip}", "--tokens-per-second", "-3"], "`tokens_per_second` must be a number above 0"),
        (["prune", "{clip}", "--model", "{model}", "--clip-ratio", "0.1"], "need a selector that knows"),
        (["prune", "{clip}", "--frames", "21"], "`num_frames` must be at most 20"),
        (["prune", "{clip}", "--fps", "-1"], "`fps` must be above 0"),
        (["prune", "{clip}", "--tiles", "grid", "--max-tiles", "0"], "`max_tiles` must be a whole number"),
        (["prune", "{clip}", "--model", "{text}"], "`--model` must be a checkpoint"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(clip, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("not a video")
    model = FIXTURES / "tiny-1"
    arguments = [argument.format(clip=clip, text=tmp_path / "notes.txt", model=model) for argument in arguments]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "autogaze: error:" in error and message in error
    assert not (tmp_path / "out" / "overlay.mp4").exists()


def test_the_command_is_installed(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "transformers_autogaze.cli", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "prune" in shown.stdout and "demo" in shown.stdout
