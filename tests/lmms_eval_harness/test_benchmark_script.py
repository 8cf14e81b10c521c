"""The commands that `examples/benchmark_mllm.sh` gives, to stand-ins that write them down."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_mllm.sh"


def run(tmp_path: Path, *arguments: str, **settings: str) -> tuple[int, list[list[str]], str]:
    """Gives the exit code, the commands and the errors."""
    log, stand_in = tmp_path / "log", tmp_path / "stand_in"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {shlex.quote(str(log))}\n[ "$1" != -c ] || echo said\n')
    stand_in.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stand_in), "VLLM": "false", **settings}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    lines = log.read_text().splitlines() if log.exists() else []
    return done.returncode, [line.split() for line in lines if not line.startswith("-c")], done.stderr


def options(command: list[str]) -> dict[str, str]:
    return {name: value for name, value in zip(command, command[1:], strict=False) if name.startswith("--")}


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(
    ("mllm", "method", "model", "arguments"),
    [
        ("qwen2_5_vl", "own", "qwen2_5_vl", "device_map=auto,max_num_frames=64,max_pixels=200704"),
        ("qwen3_vl", "dense", "gaze_qwen3_vl", "max_num_frames=64,max_pixels=200704,selector=none"),
        ("qwen2_5_vl", "gaze", "gaze_qwen2_5_vl", "selector=features,clip_ratio=0.25"),
        ("llava_onevision", "own", "llava_hf", "device_map=auto,max_frames_num=64"),
        ("llava_onevision", "gaze", "gaze_llava_onevision", "max_frames_num=64,selector=features,clip_ratio=0.25"),
        ("nvila_hd", "dense", "gaze_nvila_hd", "num_video_frames_thumbnail=64,selector=none"),
    ],
)
def test_a_method_is_one_run_of_lmms_eval_and_a_table(tmp_path, mllm, method, model, arguments):
    code, [evaluation, table], errors = run(tmp_path, mllm, method)
    assert code == 0, errors
    assert evaluation[:2] == ["-m", "lmms_eval"] and "--log_samples" in evaluation
    given = options(evaluation)
    assert given["--model"] == model and given["--model_args"].endswith(arguments)
    assert given["--tasks"].split(",")[-1] == "hlvid" and given["--include_path"] == "said"
    assert ("--force_simple" in evaluation) == (model == "llava_hf")
    assert table[-1] == given["--output_path"] == f"outputs/benchmarks/{mllm}/{method}"


def test_settings_come_from_the_environment(tmp_path):
    settings = {
        "TASKS": "hlvid",
        "FRAMES": "8",
        "PIXELS": "12544",
        "RATIO": "0.5",
        "SELECTOR": "greedy",
        "OUTPUT": "here",
    }
    _, [evaluation, _], _ = run(tmp_path, "qwen2_5_vl", "gaze", **settings)
    given = options(evaluation)
    assert given["--tasks"] == "hlvid" and given["--output_path"] == "here/qwen2_5_vl/gaze"
    assert given["--model_args"].endswith("max_num_frames=8,max_pixels=12544,selector=greedy,clip_ratio=0.5")
    _, [*_, evaluation, _], _ = run(tmp_path, "nvila_hd", "gaze", SELECTOR="published")
    assert options(evaluation)["--model_args"].endswith("selector=published")


@pytest.mark.parametrize(
    "arguments", [("llava", "gaze"), ("qwen3_vl", "sparse"), ("llava_onevision", "vllm-evs"), ("nvila_hd", "own")]
)
def test_what_there_is_not_is_refused(tmp_path, arguments):
    code, commands, errors = run(tmp_path, *arguments)
    assert code == 2 and not commands and any(argument in errors for argument in arguments)


def test_a_server_that_does_not_start_ends_the_run(tmp_path):
    code, commands, errors = run(tmp_path, "qwen3_vl", "vllm-evs", PORT="1")
    assert code == 1 and "vllm serve has ended" in errors and not commands


def test_the_server_takes_what_lmms_eval_sends_with_requests(tmp_path):
    code, [command], _ = run(tmp_path, "qwen3_vl", "vllm-gaze", PORT="1", VLLM=str(tmp_path / "stand_in"))
    assert code == 1 and command[0] == "serve"
    assert "--trust-request-mm-kwargs" in command and options(command)["--allowed-local-media-path"] == "/"
    assert '"opencv"}}' in command[command.index("--media-io-kwargs") :]
