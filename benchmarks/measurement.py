"""Shared functions of the benchmarks: time, memory and a description of the machine."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def now(device: str = "cpu") -> float:
    """Returns the time in seconds after the device has finished all work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def run_in_turn(
    cases: Mapping[str, Callable[[], object]], runs: int, device: str = "cpu", warm_ups: int = 1
) -> dict[str, list[float]]:
    """Runs all cases alternately, and returns the seconds of every run of each case except the warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(warm_ups + runs):
        for name, case in cases.items():
            start = now(device)
            case()
            if run >= warm_ups:
                seconds[name].append(now(device) - start)
    return seconds


def memory(key: str) -> float:
    """Returns the resident memory of this process in MiB, current (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"{key} is not in /proc/self/status")


def machine(threads: int, device: str = "cpu", dtype: str = "float32") -> dict[str, str | int]:
    """Returns the conditions of a measurement, for JSON."""
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": dtype,
        "threads": threads,
        "torch": torch.__version__,
    }
