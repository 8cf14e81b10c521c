"""One benchmark and one model of each family for all tests of this folder, which need lmms-eval."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_benchmark import find_videos, write_benchmark


SMALL = {
    "qwen2_5_vl": "device_map=cpu,max_num_frames=8,min_pixels=784,max_pixels=12544",
    "qwen3_vl": "device_map=cpu,max_num_frames=8,min_pixels=1024,max_pixels=16384",
    "llava_onevision": "device_map=cpu,max_frames_num=8",
}


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory) -> None:
    """Keeps lmms-eval off the network and out of the caches of this machine."""
    pytest.importorskip("lmms_eval")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> list[Path]:
    return find_videos(tmp_path_factory.mktemp("videos"), count=3)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, offline, videos) -> Path:
    """Folder of the task `hlvid_local`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLVID_VIDEOS", str(videos[0].parent))
        yield write_benchmark(tmp_path_factory.mktemp("benchmark"), videos)


@pytest.fixture(scope="session")
def mllms(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a tiny MLLM of a family."""
    from tiny_mllms import save_tiny

    folder, made = tmp_path_factory.mktemp("mllms"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, folder / family)
        return made[family]

    return get


@pytest.fixture
def run(tasks, mllms, tmp_path, monkeypatch) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs the command line of lmms-eval on the local task, and gives its results and samples as files say."""
    from lmms_eval.__main__ import cli_evaluate

    def call(model: str, family: str, arguments: str = "", *options: str) -> tuple[dict, list[dict]]:
        given = ",".join(filter(None, [f"pretrained={mllms(family)}", SMALL[family], arguments]))
        output = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        command = ["lmms_eval", "--model", model, "--model_args", given, "--tasks", "hlvid_local"]
        command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "1", "--log_samples"]
        monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(output), *options])
        cli_evaluate()
        [results], [samples] = output.rglob("*_results.json"), output.rglob("*_samples_hlvid_local.jsonl")
        return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]

    return call


