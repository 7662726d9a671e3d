"""How much memory is free, and how much a graph holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on the device. On a CPU the tighter of the machine and its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_machine_available()]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    return max(min(limits), 0)


def _machine_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # no /proc here: assume a small machine


class GraphMeter:
    """Counts the bytes that autograd saves for backward inside `metering`, each storage once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextlib.contextmanager
def metering() -> Iterator[GraphMeter]:
    """Measure the graph built inside: `with metering() as meter: ...; meter.bytes`. Parameters count too."""
    meter = GraphMeter()
    with torch.autograd.graph.saved_tensors_hooks(meter._count, lambda tensor: tensor):
        yield meter
