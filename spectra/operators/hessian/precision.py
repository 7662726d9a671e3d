"""The precision of a measurement: the model's own, that of a copy of the weights, or faster matrix products.

"float32" and "float64" measure a copy of the weights. "tf32" and "bfloat16" keep float32 weights and vectors, and round
the operands of matrix products to 10 or 7 bits of fraction. Sums are in float32. This is faster on hardware with
units for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.backend.float32 import float32_products
from spectra.operators.hessian.parameters import ParameterSpace

COPIES = {"float32": torch.float32, "float64": torch.float64}
LOWER = ("tf32", "bfloat16")
PRECISIONS = (*COPIES, *LOWER)


def dtype_of_copy(model: nn.Module, precision: str | None) -> torch.dtype | None:
    """The dtype of the copy of the weights that is measured; None where the model itself is measured.

    Args:
        model: The model that is measured.
        precision: One of `PRECISIONS`, or None for the model's own.

    Returns:
        The dtype, or None where no copy is made.

    Raises:
        InputError: For an unknown precision.
    """
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    wanted = COPIES.get(precision, torch.float32)
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return None if own == {wanted} else wanted


@contextlib.contextmanager
def arithmetic(precision: str | None, device: torch.device) -> Iterator[None]:
    """A context in which float32 matrices are multiplied in this precision, whatever the program has set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(float32_products(device, tf32=precision == "tf32", convolutions=True))
        if precision == "bfloat16":
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False))
        yield


def note_of_copy(space: ParameterSpace, dtype: torch.dtype) -> list[str]:
    """The note for a record that the measured parameters are a copy in another dtype; [] where they are not."""
    own = {_name(p.dtype) for p in space.parameters} - {_name(dtype)}
    return [f"{', '.join(sorted(own))} weights, measured in a {_name(dtype)} copy"] if own else []


def dtype_of_vectors(model: nn.Module, space: ParameterSpace, copy: torch.dtype | None) -> torch.dtype:
    """The dtype of a measurement's vectors: that of the copy, or the one that the chosen parameters share.

    Args:
        model: The model that is measured.
        space: The chosen parameters.
        copy: The dtype of the copy, None where there is none.

    Returns:
        torch.float32 or torch.float64.

    Raises:
        InputError: For parameters of several dtypes, or in bfloat16 or float16, where no copy is asked for.
    """
    if copy is not None:
        return copy
    narrow = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if narrow:
        raise InputError(
            f"the model holds {', '.join(sorted(map(str, narrow)))} weights, float32 or float64 is expected: their "
            "rounding drowns small eigenvalues; pass precision='float32' to measure a float32 copy"
        )
    chosen = {p.dtype for p in space.parameters}
    if len(chosen) > 1:
        raise InputError(
            f"the chosen parameters must share one dtype, got {', '.join(sorted(map(str, chosen)))}; "
            "pass precision='float32' or 'float64'"
        )
    return chosen.pop()


def _name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")
