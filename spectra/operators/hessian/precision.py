"""In which precision a model is measured: its own float32 or float64, that of a copy, or with faster matrix products.

"float32" and "float64" are copies of the model. "tf32" and "bfloat16" keep float32 weights and vectors and round the
inputs of matrix products to 10 or 7 bits of fraction, with sums in float32: faster where the hardware has units for it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.backend.float32 import float32_products
from spectra.operators.hessian.parameters import ParameterSpace

COPIES = {"float32": torch.float32, "float64": torch.float64}
LOWER = ("tf32", "bfloat16")
PRECISIONS = (*COPIES, *LOWER)


def in_precision(model: nn.Module, precision: str | None) -> nn.Module:
    """The model, or a copy of it in the floating-point type that the precision asks for."""
    if precision is None:
        return model
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    wanted = COPIES.get(precision, torch.float32)
    if precision in LOWER and {p.dtype for p in model.parameters() if p.is_floating_point()} == {wanted}:
        return model
    return copy.deepcopy(model).to(wanted)


@contextlib.contextmanager
def arithmetic(precision: str | None, device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices in the precision asked for, and never in a lower one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(float32_products(device, tf32=precision == "tf32", convolutions=True))
        if precision == "bfloat16":
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False))
        yield


def lifted(given: nn.Module, space: ParameterSpace, dtype: torch.dtype) -> list[str]:
    """Says so where the measured parameters are copies in another precision than the model's own."""
    own = dict(given.named_parameters())
    before = {str(own[name].dtype).removeprefix("torch.") for name in space.names} - {str(dtype).removeprefix("torch.")}
    if not before:
        return []
    return [f"{', '.join(sorted(before))} weights, measured in a {str(dtype).removeprefix('torch.')} copy"]


def one_dtype(model: nn.Module, space: ParameterSpace) -> torch.dtype:
    """The dtype that the chosen parameters share. Raises InputError for several, or for bfloat16 and float16."""
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
