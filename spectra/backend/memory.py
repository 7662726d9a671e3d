"""How much memory is free on a device, and how much a computation allocates."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device.

    On a CPU this is what the machine has left, or what the process's control group has left if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_machine_available()]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    return max(min(limits), 0)


def _machine_available() -> int:
    """Bytes that the operating system calls available; 4 GiB where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # no /proc on this system: assume a small machine


class AllocationMeter(TorchDispatchMode):
    """Context that counts the bytes of the tensors which operations inside it allocate.

    Each storage counts once, from the operation that allocates it until nothing refers to it. Tensors from before the
    context, such as parameters, do not count. Neither do the workspaces of libraries, nor what the caching allocator
    keeps for later.

    Attributes:
        live: Bytes allocated inside that are still in use.
        peak: The largest value of `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known or key in arguments:
                continue
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        """Note that a storage is gone."""
        self._known.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The dense tensors anywhere in nested arguments or results; others have no storage to ask for."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
