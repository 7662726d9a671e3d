"""Time, peak memory, and a description of the machine."""

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

MARK = "RESULT "  # begins a worker's lines of results; libraries print other lines
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
    """Wait until the device has finished its work."""
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
    # ru_maxrss survives fork and exec, so it would start at the size of the parent process
    highest = _process_memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if highest is None else highest


class PeakMemory:
    """Peak bytes since `restart`, above those held when the object was made.

    CPU: the highest resident size of the process. `restart` resets it to the present size where the kernel allows it;
    elsewhere the peak is that since the start of the process. GPU: the peak that torch's allocator counts.
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
    """Collect garbage, and on a CPU return freed memory to the system, so that a peak starts from what is in use.

    A GPU's allocator keeps its freed memory: the peak does not count it, and allocating it again would take time.
    """
    gc.collect()
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def use_all_cores() -> None:
    """Use every core, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads and date of a measurement."""
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
