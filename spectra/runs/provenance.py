"""Where a record comes from: which data, which versions, which device."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from spectra.backend.version import __version__
from spectra.operators.hessian.batches import tensors_of


def fingerprint(batches: list[Any]) -> str:
    """A short hash of what batches hold, the same on every device.

    Args:
        batches: Tensors, or tuples, lists and dictionaries of them.

    Returns:
        16 hexadecimal digits. Two runs with the same digits measured the same data.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in tensors_of(batch):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of spectra, torch and Python that a record names."""
    return {"spectra": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or the type of another device, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
