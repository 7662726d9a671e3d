"""In which precision a model is measured: its own float32 or float64, or that of a copy."""

from __future__ import annotations

import copy

import torch
from torch import nn

from spectra.errors import InputError
from spectra.parameters import ParameterSpace

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def in_precision(model: nn.Module, precision: str | None) -> nn.Module:
    """The model, or a copy of it in "float32" or "float64" where one is asked for."""
    if precision is None:
        return model
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    return copy.deepcopy(model).to(PRECISIONS[precision])


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
