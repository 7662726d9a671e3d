"""Where a record comes from: which data, which versions, which device."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch
from torch import nn

from spectra.backend.version import __version__
from spectra.operators.hessian.batches import contents_of

SAMPLED_WEIGHTS = 1024  # entries of a parameter that a fingerprint of the weights looks at


def fingerprint(batches: list[Any]) -> str:
    """A short hash of what batches hold, the same on every device.

    Args:
        batches: Tensors, or anything that holds them: tuples, lists, dictionaries and objects. NumPy arrays, numbers
            and texts in them count too.

    Returns:
        16 hexadecimal digits. Two runs with the same digits measured the same data.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for content in contents_of(batch):
            if isinstance(content, bytes):
                digest.update(content)
                continue
            digest.update(str((tuple(content.shape), content.dtype)).encode())
            for part in _parts(content.detach()):
                digest.update(_bytes(part))
    return digest.hexdigest()[:16]


def fingerprint_of_weights(model: nn.Module) -> str:
    """A short hash of a model's weights, from some entries of each parameter.

    For a sharded model all ranks call this together, and it is that of the whole model.

    Args:
        model: The model.

    Returns:
        16 hexadecimal digits, "" where weights cannot be read. Other digits mean other weights.
    """
    digest = hashlib.sha256()
    try:
        for parameter in model.parameters():
            value = parameter.detach()
            flat = getattr(value, "full_tensor", lambda value=value: value)().reshape(-1)
            digest.update(_bytes(flat[:: max(len(flat) // SAMPLED_WEIGHTS, 1)]))
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # meta or lazy; out of memory
        return ""
    return digest.hexdigest()[:16]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Dense tensors that hold what a tensor holds."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def _bytes(tensor: torch.Tensor) -> bytes:
    """The entries of a dense tensor in memory."""
    flat = tensor.resolve_conj().resolve_neg().cpu().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def versions() -> dict[str, str]:
    """The versions of spectra, torch and Python that a record names."""
    return {"spectra": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or the type of another device, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
