"""What the benchmarks share: a clock that waits for the device, this process's memory, and what a result says of its machine."""

import platform
import time
from pathlib import Path

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def now(device: str = "cpu") -> float:
    """Gives the time in seconds, once the device has done all that it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(key: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"{key} is not in /proc/self/status")


def machine(threads: int, device: str = "cpu", dtype: str = "float32") -> dict[str, str | int]:
    """Describes where and how something was measured, for JSON."""
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": dtype,
        "threads": threads,
        "torch": torch.__version__,
    }
