"""Detects changes of weights that torch does not count in a tensor's version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_steps = 0


def _count_step(*_: Any) -> None:
    """Count a step; torch calls this after every step of every optimizer."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps the optimizers of this program have made. Fused optimizers change weights, but not versions."""
    return _steps


def fingerprint(tensors: Iterable[torch.Tensor]) -> list[float]:
    """A number for each tensor that changes with its values: on a CPU a sum of its bits, on a GPU its norm.

    Args:
        tensors: The tensors. Those without memory of their own and those with another layout (sparse) are left out. Of
            a sharded tensor the part of this rank is looked at.

    Returns:
        The numbers.
    """
    held = [getattr(t, "to_local", lambda t=t: t)() for t in (tensor.detach() for tensor in tensors)]
    whole = [t for t in held if t.layout == torch.strided and t.numel() and not t.is_meta]
    norms = [t for t in whole if t.device.type != "cpu" and t.is_floating_point()]
    sums = [float(t.view(INTEGERS[t.element_size()]).sum()) for t in whole if t.device.type == "cpu" and _plain(t)]
    if not norms:
        return sums
    found = torch._foreach_norm(norms)  # pyright: ignore[reportPrivateImportUsage]
    return sums + torch.stack([n.double() for n in found]).tolist()


def _plain(tensor: torch.Tensor) -> bool:
    """Whether the entries can be read as integers: an ordinary tensor with one dimension or more."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.element_size() in INTEGERS and tensor.ndim > 0
