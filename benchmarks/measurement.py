"""What the benchmarks share: a clock that waits for the device, and what a result says of its machine."""

import platform
import time

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def now(device: str = "cpu") -> float:
    """Gives the time in seconds, once the device has done all that it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(threads: int, device: str = "cpu", dtype: str = "float32") -> dict[str, str | int]:
    """Describes where and how something was measured, for JSON."""
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": dtype,
        "threads": threads,
        "torch": torch.__version__,
    }
