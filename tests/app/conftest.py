import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from transformers_autogaze import write_video


PATIENCE = 240  # seconds that a slow machine may take for one step


def moving_clip(num_frames: int, height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Blocks of colours that move to the right."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    still = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(still, 2 * index, axis=1) for index in range(num_frames)])


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> dict[str, Path]:
    """Videos of all kinds: a good one, another, one that takes long, one that is too long and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    broken = folder / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(2000))
    return {
        "good": write_video(folder / "good.mp4", moving_clip(8), fps=8),
        "other": write_video(folder / "other.mp4", moving_clip(6, seed=1), fps=8),
        "large": write_video(folder / "large.mp4", moving_clip(16, 720, 960), fps=8),
        "long": write_video(folder / "long.mp4", moving_clip(61), fps=0.9),
        "broken": broken,
    }


class Server:
    """The page in a process of its own."""

    def __init__(self, command: list[str], temporary: Path, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.temporary = f"http://127.0.0.1:{self.port}", temporary
        environment = {**os.environ, "TMPDIR": str(temporary), "GRADIO_SERVER_PORT": str(self.port), **environment}
        self.log = temporary / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait(self) -> "Server":
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"{self.url}/config", timeout=30):
                    return self
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    @property
    def folder(self) -> Path:
        """Where the files of visitors lie."""
        return next(self.temporary.glob("autogaze-app-*"))

    def files(self) -> list[Path]:
        """The files of visitors, without the example."""
        return [path for path in self.folder.rglob("*") if path.is_file() and path.parent.name != "example"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "transformers_autogaze_cli", "app"]
    server = Server(command, tmp_path_factory.mktemp("server"))
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
