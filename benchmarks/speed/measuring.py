"""Time and memory: what a measurement waits for, what it holds at its peak, and where it was made."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "RESULT "  # before a line of a worker's own among what libraries print
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "scipy": "scipy",
    "PyHessian": "PyHessian",
    "hessian-eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
}


def synchronize(device: torch.device) -> None:
    """Wait for the device, whose work is asynchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


def _process_memory(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _highest_resident() -> int:
    # ru_maxrss would start at the parent's size, since it survives fork and exec
    highest = _process_memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if highest is None else highest


class PeakMemory:
    """Bytes held at the peak since `restart`, above what was held when this was made.

    CPU: the highest resident size of the process, which is lowered to the present one by `restart` where the kernel
    allows that; elsewhere the peak counts from the start of the process. GPU: torch's own count.
    """

    def __init__(self, device: torch.device):
        self.device = device
        release(device)
        self.restart()
        self.baseline = self._held()

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _process_memory("VmRSS") or _highest_resident()

    @property
    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        return max(_highest_resident() - self.baseline, 0)


def release(device: torch.device) -> None:
    """Let go of garbage, and on a CPU give freed memory back, so that a peak counts from what is really held.

    A GPU's allocator keeps what it has: the peak does not count it, and asking for it again would take time.
    """
    gc.collect()
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def use_all_cores() -> None:
    """Every core to this process, unless the caller has said how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads and date: what a figure means nothing without."""
    versions = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(package)
    import spectra

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"spectra": spectra.__version__, **versions},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return f"CPU, {platform.machine()}"
