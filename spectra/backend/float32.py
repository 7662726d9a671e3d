"""True float32 matrix products, whatever TF32 setting the program has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch


class HasDevice(Protocol):
    """Anything that computes on one device, such as an operator."""

    device: torch.device


P = ParamSpec("P")
S = TypeVar("S", bound=HasDevice)
R = TypeVar("R")
FULL_PRECISION = ("none", "ieee")  # torch's settings under which float32 operands are not rounded


@contextlib.contextmanager
def float32_products(device: torch.device, *, tf32: bool = False, convolutions: bool = False) -> Iterator[None]:
    """Fix the precision of float32 matrix products inside the context, and restore the caller's settings after it.

    A caller's autocast, which would run matrix products in bfloat16, is off inside.

    A training script often allows TF32 for the whole program. TF32 rounds operands to 10 bits of fraction, so that
    linear combinations of basis vectors would be orthonormal to three digits only.

    torch holds these settings twice, in an older and in a newer interface, and refuses to read the older one where the
    two disagree. Both are set here, or the newer one alone where the caller has made them disagree.

    Args:
        device: Where the products run.
        tf32: Whether to multiply in TF32 instead of float32.
        convolutions: Whether to fix the precision of convolutions and recurrent layers too; torch lets them use TF32
            on a GPU by default.
    """
    backends: Any = torch.backends  # torch's stubs do not declare all of its attributes
    places = [backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul]
    if convolutions and device.type == "cuda":
        places += [backends.cudnn.conv, backends.cudnn.rnn]
    if not tf32 and all(place.fp32_precision in FULL_PRECISION for place in places):
        with _no_autocast(device):
            yield
        return
    places = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    newer = [place.fp32_precision for place in places]
    older = None
    with contextlib.suppress(RuntimeError):
        older = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        if older is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            backends.cudnn.allow_tf32 = tf32
        for place in places:
            place.fp32_precision = "tf32" if tf32 else "ieee"
        with _no_autocast(device):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        for place, setting in zip(places, newer, strict=True):
            place.fp32_precision = setting


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without the caller's autocast."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_float32(
    function: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Decorate a function of an operator so that all of its float32 matrix products run in true float32."""

    @functools.wraps(function)
    def wrapper(op: S, *args: P.args, **options: P.kwargs) -> R:
        if not isinstance(getattr(op, "device", None), torch.device):  # no operator, which the function refuses
            return function(op, *args, **options)
        with float32_products(op.device):
            return function(op, *args, **options)

    return wrapper
