"""Fixtures of the tests with lmms-eval. `make lmms-eval-test` and `make vllm-test` make environments for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from local_benchmark import find_videos, write_benchmark


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory) -> Iterator[None]:
    """Keeps lmms-eval off the network and out of the caches of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    return find_videos(tmp_path_factory.mktemp("videos"), count=3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, offline, videos) -> Iterator[Path]:
    """Folder of the task `hlvid_local`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLVID_VIDEOS", str(videos[0].parent))
        yield write_benchmark(tmp_path_factory.mktemp("benchmark"), videos)


@pytest.fixture(scope="module")
def mllms(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a tiny MLLM of a family."""
    from multiple_choice_mllms import save_tiny  # needs torchvision, as lmms-eval does

    folder, made = tmp_path_factory.mktemp("mllms"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, folder / family)
        return made[family]

    return get
