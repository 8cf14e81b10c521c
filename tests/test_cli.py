import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from published import FIXTURES

from transformers_autogaze import __version__, read_video, write_video
from transformers_autogaze.hub.checkpoints import SHIPPED_SELECTORS
from transformers_autogaze_cli import main
from transformers_autogaze_cli.prune import SELECTORS


resource = pytest.importorskip("resource")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8).repeat(13, 1).repeat(13, 2)
    frames[3:] = frames[3]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", iter(frames), fps=10)


def test_prune_writes_an_overlay_records_a_sheet_and_a_table(clip, tmp_path, capsys):
    assert main(["prune", str(clip), "--clip-ratio", "0.3", "-o", str(tmp_path / "out")]) == 0
    frames, metadata = read_video(tmp_path / "out" / "overlay.mp4")
    assert frames.shape[0] == 20 and frames.shape[2] == 3 * 312 + 2 * 4 and metadata.fps == 10
    gaze = json.loads((tmp_path / "out" / "gaze.json").read_text())
    statistics = gaze["statistics"]
    assert statistics["num_frames"] == 20 and len(statistics["patches_each_frame"]) == 20
    assert statistics["num_patches"] == len(gaze["records"]) == sum(statistics["patches_each_frame"])
    assert (
        statistics["patches_each_frame"][0] == 196 > statistics["patches_each_frame"][-1]
    )  # the clip is still by then
    assert statistics["num_patches"] == 20 * 196 * 0.3 and gaze["settings"] == {"clip_ratio": 0.3}
    assert [record["frame"] for record in gaze["records"]] == sorted(record["frame"] for record in gaze["records"])
    assert gaze["records"][-1]["frame"] == 19
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 8 * 92
    table = capsys.readouterr().out
    assert f"patches kept    {statistics['num_patches']}" in table and "20 frames of 92x66" in table


def test_chunks_continue_the_stream(clip, tmp_path):
    """The 17th frame opens a chunk; nothing moves there, so the greedy selector needs next to nothing."""
    arguments = ["--selector", "greedy", "--task-loss-requirement", "0.5"]
    assert main(["prune", str(clip), *arguments, "-o", str(tmp_path)]) == 0
    gaze = json.loads((tmp_path / "gaze.json").read_text())
    counts = gaze["statistics"]["patches_each_frame"]
    assert gaze["selector"] == "greedy"
    assert counts[0] > 10 and counts[16] <= 2


def test_prune_takes_a_model_and_samples_frames(clip, tiny, tmp_path):
    arguments = ["prune", str(clip), "--model", str(tiny.folder), "--num-frames", "5", "--gazing-ratio", "0.3"]
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
    arguments = ["--selector", selector, "--num-frames", "3", "--tiles", tiles]
    arguments += ["--max-tiles", "6"] if tiles == "grid" else []
    settings = {
        "finest": ["--clip-ratio", "0.9"],
        "greedy": ["--gazing-ratio", "0.2", "--task-loss-requirement", "-9"],
    }[selector]
    assert main(["prune", str(clip), *arguments, *settings, "-o", str(tmp_path)]) == 0
    assert len(read_video(tmp_path / "overlay.mp4")[0]) == 3
    gaze = json.loads((tmp_path / "gaze.json").read_text())
    assert list(gaze["statistics"]["patches_each_scale"])[-1] == finest
    boxes = np.array([record["box"] for record in gaze["records"]])
    assert len(boxes) == gaze["statistics"]["num_patches"] > 3 and gaze["statistics"]["psnr"] > 20
    # Every patch overlaps the frame of 92x66 pixels, and no box exceeds it.
    assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min() >= 0
    assert boxes[:, 2].max() <= 92 and boxes[:, 3].max() <= 66


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "missing.mp4"], "missing.mp4"),
        (["prune", "{text}"], "is not a video"),
        (["prune", "{clip}", "--gazing-ratio", "1.5"], "`gazing_ratio` must lie in 0..1"),
        (["prune", "{clip}", "--task-loss-requirement", "nan"], "--task-loss-requirement: must be a finite number"),
        (["prune", "{clip}", "--task-loss-requirement", "inf"], "must be a finite number such as 0.25, got 'inf'"),
        (["prune", "{clip}", "--clip-ratio", "0"], "`clip_ratio` must be above 0 and at most 1"),
        (["prune", "{clip}", "--tokens-per-second", "-3"], "`tokens_per_second` must be a number above 0"),
        (["prune", "{clip}", "--model", "{model}", "--clip-ratio", "0.1"], "need a selector that knows"),
        (["prune", "{clip}", "--num-frames", "21"], "`num_frames` must be at most 20"),
        (["prune", "{clip}", "--fps", "-1"], "`fps` must be above 0"),
        (
            ["prune", "{clip}", "--tiles", "grid", "--max-tiles", "0"],
            "--max-tiles: must be a whole number of at least 1",
        ),
        (["prune", "{clip}", "--max-tiles", "4"], "`--max-tiles` needs `--tiles grid`, got 4 with `--tiles whole`"),
        (["prune", "{clip}", "--num-frames", "0"], "--num-frames: must be a whole number of at least 1, got '0'"),
        (["prune", "{clip}", "--device", "nowhere"], "`--device` must be a device that torch can compute on here"),
        (["prune", "{clip}", "--device", ""], "--device: must not be empty"),
        (["prune", ""], "VIDEO: must not be empty"),
        (["prune", "{clip}", "missing.mp4"], "there is no 'missing.mp4'"),
        (["prune", "{folder}"], "must hold videos"),
        (["demo", "--model", ""], "--model: must not be empty"),
        (["prunes"], "invalid choice: 'prunes'"),
        (["prune", "{clip}", "--model", "{text}"], "`--model` must be a checkpoint"),
    ],
)
def test_invalid_input_ends_with_a_message_and_status_2(clip, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("not a video")
    (tmp_path / "folder").mkdir()
    names = {"clip": clip, "text": tmp_path / "notes.txt", "folder": tmp_path / "folder"}
    names["model"] = FIXTURES / "tiny-1"
    arguments = [argument.format(**names) for argument in arguments]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "autogaze: error:" in error and message in error
    assert not (tmp_path / "out").exists()


def test_the_command_is_installed(tmp_path):
    for module in ("transformers_autogaze.cli", "transformers_autogaze_cli"):
        result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
        assert result.returncode == 0 and "prune" in result.stdout and "demo" in result.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["prune", "--help"], ["label", "--help"], ["prune", "a.mp4", "-o", ""]]
)
def test_help_and_errors_of_arguments_do_not_import_torch(arguments):
    code = f"""
import sys
from transformers_autogaze_cli import main
try:
    main({arguments})
finally:
    print({{"torch", "transformers", "numpy", "av", "transformers_autogaze"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("set()\n") and "Traceback" not in result.stderr


def test_pruning_does_not_import_the_trainer():
    code = "import sys, transformers_autogaze.cli.prune as _; print({'transformers.trainer_utils', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_a_warning_is_one_line_without_a_place_in_the_source(tmp_path):
    video = str(FIXTURES / "videos" / "ftrunc_25.mp4")
    arguments = ["prune", video, "--selector", "finest", "--no-overlay", "-o", str(tmp_path / "out")]
    code = f"from transformers_autogaze_cli import main; main({arguments})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    [line] = [line for line in result.stderr.splitlines() if "damaged" in line]
    assert line == f"autogaze: warning: {video!r} is damaged or cut off: 12 of its 50 frames could be decoded"
    assert "Warning:" not in result.stderr


@pytest.mark.parametrize("command", ["label", "train", "train-grpo", "distill"])
def test_help_shows_defaults_that_say_something(command, capsys):
    pytest.importorskip("accelerate")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert "(default: None)" not in text and "(default: [])" not in text
    assert (
        "frames of a clip (default: 16)" in text
        or "frames to sample of each video (default: 16)" in text
        or ("Crops of each video. (default: 96)" in text)
    )
    assert "gemm_4bit" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "missing.mp4", "--clip-ratio", "2"], "`clip_ratio` must be above 0 and at most 1"),
        (["prune", "missing.mp4", "--model", "no/such", "--gazing-ratio", "2"], "`gazing_ratio` must lie in 0..1"),
        (["prune", "missing.mp4", "--tokens-per-second", "0"], "`tokens_per_second` must be a number above 0"),
        (["demo", "--clip-ratio", "2"], "`clip_ratio` must be above 0 and at most 1"),
        (["evaluate", "no/such", "missing.mp4", "--gazing-ratio", "0.1", "2"], "`gazing_ratio` must lie in 0..1"),
        (["evaluate", "no/such", "missing.mp4", "--max-gazing-ratio", "2"], "`--max-gazing-ratio` must lie in 0..1"),
        (["evaluate", "--encoder", "no/such", "missing.mp4", "--clip-ratio", "3/2"], "`clip_ratio` must be above 0"),
        (
            ["evaluate", "--encoder", "no/such", "missing.mp4", "--task-loss-requirement", "2"],
            "`--task-loss-requirement` must lie in 0..1 with `--encoder`",
        ),
    ],
)
def test_budgets_are_checked_before_videos_and_models(tmp_path, capsys, arguments, message):
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "out").exists()


def test_a_threshold_that_the_selector_refuses_is_an_error_before_the_progress_bar(clip, tmp_path, capsys):
    assert main(["prune", str(clip), "--task-loss-requirement", "2", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "`task_loss_requirement` must lie in 0..1" in error and "pruning:" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "no/such", "nomodel", "{clip}"], "there is neither a model nor a video 'nomodel'"),
        (
            ["--encoder", "no/such", "features", "no.mp4"],
            "VIDEO must be a video file or an http(s) URL, but there is no 'no.mp4'",
        ),
        (["--encoder", "no/such", "features"], "at least one VIDEO must be given, got only the MODEL 'features'"),
        (["--encoder", "no/such", "features", "{folder}"], "is a folder"),
        (["features", "no.mp4"], "VIDEO must be a video file or an http(s) URL, but there is no 'no.mp4'"),
    ],
)
def test_evaluate_names_the_model_or_video_that_is_missing(clip, tmp_path, capsys, arguments, message):
    arguments = [argument.format(clip=clip, folder=tmp_path) for argument in arguments]
    assert main(["evaluate", *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    result = capsys.readouterr().out
    assert result.startswith(f"autogaze {__version__} (") and torch.__version__ in result


def test_selectors_have_the_same_names_in_both_packages():
    assert list(SHIPPED_SELECTORS) == list(SELECTORS)


def test_several_videos_have_their_own_folders_and_a_broken_one_does_not_stop_the_others(clip, tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "inside").mkdir(parents=True)
    for name in ("clip.mp4", "inside/clip.mp4", "other.mkv"):
        shutil.copy(clip, videos / name)
    (videos / "bad.mp4").write_text("not a video")
    arguments = ["--num-frames", "2", "--no-overlay", "-o", str(videos / "out")]
    for _ in range(2):  # The second run does not prune the output of the first.
        assert main(["prune", str(videos), str(clip), *arguments]) == 2
        written = {str(path.parent.relative_to(videos / "out")) for path in videos.rglob("gaze.json")}
        assert written == {"clip", "inside/clip", "other", "clip-2"}
    printed = capsys.readouterr()
    assert f"autogaze: error: {videos / 'bad.mp4'}: " in printed.err
    assert str(videos / "out" / "inside" / "clip" / "gaze.json") in printed.out
    assert json.loads((videos / "out" / "clip-2" / "gaze.json").read_text())["video"] == str(clip)


def test_only_the_overlays_of_an_earlier_run_are_left_out(clip, tmp_path, capsys):
    for name in ("overlay.mp4", "clip.mp4"):
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "gaze.json").write_text("{}")
    arguments = ["prune", str(tmp_path), "--num-frames", "2", "--no-overlay", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "gaze.json").read_text())["video"] == str(tmp_path / "clip.mp4")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "clip.mp4").unlink()
    assert main(arguments) == 2
    assert "must hold videos other than those that an earlier run wrote" in capsys.readouterr().err


def test_without_an_overlay_the_other_files_are_the_same(clip, tmp_path, capsys):
    for folder in ("with", "without"):
        assert main(["prune", str(clip), "-o", str(tmp_path / folder)]) == 0
    assert main(["prune", str(clip), "--no-overlay", "-o", str(tmp_path / "without")]) == 0
    assert "overlay.mp4" not in capsys.readouterr().out.rpartition("written")[2]
    # An overlay of an earlier run would belong to another gaze.
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["contact_sheet.png", "gaze.json"]
    for name in ("gaze.json", "contact_sheet.png"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_timeline_is_drawn_below_both_pictures(clip, tmp_path, capsys):
    for name, options in {"without": [], "with": ["--timeline"]}.items():
        assert main(["prune", str(clip), *options, "-o", str(tmp_path / name)]) == 0
    heights = {name: Image.open(tmp_path / name / "contact_sheet.png").height for name in ("with", "without")}
    frames = {name: read_video(tmp_path / name / "overlay.mp4")[0] for name in ("with", "without")}
    assert heights["with"] > heights["without"] + 80
    assert frames["with"].shape[1] > frames["without"].shape[1] + 80 and len(frames["with"]) == 20
    assert (tmp_path / "with" / "gaze.json").read_bytes() == (tmp_path / "without" / "gaze.json").read_bytes()


@pytest.mark.parametrize("way", ["the same", "relative", "a link"])
def test_an_input_is_never_overwritten(clip, tmp_path, monkeypatch, capsys, way):
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, "overlay.mp4")
    (tmp_path / "link.mp4").symlink_to("overlay.mp4")
    names = {"the same": str(tmp_path / "overlay.mp4"), "relative": "./overlay.mp4", "a link": "link.mp4"}
    assert main(["prune", names[way], "-o", str(tmp_path)]) == 2
    assert "is the input" in capsys.readouterr().err
    assert (tmp_path / "overlay.mp4").read_bytes() == clip.read_bytes() and not (tmp_path / "gaze.json").exists()


def test_the_demo_does_not_touch_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_text("mine")
    assert main(["demo", "-o", "."]) == 0
    assert (tmp_path / "clip.mp4").read_text() == "mine" and (tmp_path / "overlay.mp4").exists()
    assert json.loads((tmp_path / "gaze.json").read_text())["video"] == "demo"


def test_a_failed_run_keeps_the_earlier_results(clip, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(clip), "-o", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The overlay is complete by then, the records are not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before.values())) - 100, hard))
    try:
        assert main(["prune", str(clip), "--clip-ratio", "1", "-o", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "autogaze: error:" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_output_that_is_a_file_is_refused(clip, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    for command in (["prune", str(clip)], ["demo"]):
        assert main([*command, "-o", str(tmp_path / "out")]) == 2
        assert "the output must be a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
