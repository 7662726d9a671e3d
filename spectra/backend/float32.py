"""Float32 arithmetic that is float32: torch has global settings that let a device round what it multiplies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch


class HasDevice(Protocol):
    """Anything that says where it computes, such as an operator."""

    device: torch.device


P = ParamSpec("P")
S = TypeVar("S", bound=HasDevice)
R = TypeVar("R")
EXACT = ("none", "ieee")  # no rounding allowed by anyone, or forbidden


@contextlib.contextmanager
def float32_products(device: torch.device, *, tf32: bool = False, convolutions: bool = False) -> Iterator[None]:
    """Inside, float32 matrices are multiplied in float32, or in TF32, whatever the caller has set; that is put back.

    A training script often allows TF32 (10 bits of fraction) for the whole program; eigenvectors combined so are
    orthonormal to three digits only. convolutions: those too, which have TF32 on a GPU from the start.
    torch keeps these settings in an older and in a newer place, and refuses to read the older one where they differ:
    both are set alike, or the newer one alone where the caller has made them differ.
    """
    backends: Any = torch.backends  # whose parts are not all declared
    places = [backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul]
    if convolutions and device.type == "cuda":
        places += [backends.cudnn.conv, backends.cudnn.rnn]
    if not tf32 and all(place.fp32_precision in EXACT for place in places):
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
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        for place, setting in zip(places, newer, strict=True):
            place.fp32_precision = setting


def in_float32(
    function: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """A function of an operator, with all of its vector arithmetic in `float32_products`."""

    @functools.wraps(function)
    def exact(op: S, *args: P.args, **options: P.kwargs) -> R:
        with float32_products(op.device):
            return function(op, *args, **options)

    return exact
