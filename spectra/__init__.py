"""Hessian spectral diagnostics for PyTorch models: every stochastic number carries its interval."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectra.batch_noise import NoiseSplit, batch_noise
from spectra.changes import Change, compare
from spectra.density import SpectralDensity
from spectra.eigs import Eigenpairs, topk
from spectra.errors import InputError, NonFiniteError
from spectra.estimates import Estimate
from spectra.hessian import HessianOperator
from spectra.lanczos import Tridiagonal, lanczos
from spectra.objective import Objective
from spectra.operators import DeflatedOperator, DenseOperator, DiagonalOperator, LinearOperator, MeanOperator
from spectra.parameters import ParameterSpace
from spectra.plan import MemoryPlan, plan
from spectra.probe import SpectrumProbe
from spectra.records import Run, SpectrumRecord
from spectra.resolution import resolve
from spectra.stochastic_lanczos import slq
from spectra.trace import trace

if TYPE_CHECKING:
    from spectra import plots, report
    from spectra.integrations.transformers import SpectrumCallback

__version__ = "0.1.0"

__all__ = [
    "Change",
    "DeflatedOperator",
    "DenseOperator",
    "DiagonalOperator",
    "Eigenpairs",
    "Estimate",
    "HessianOperator",
    "InputError",
    "LinearOperator",
    "MeanOperator",
    "MemoryPlan",
    "NoiseSplit",
    "NonFiniteError",
    "Objective",
    "ParameterSpace",
    "Run",
    "SpectralDensity",
    "SpectrumCallback",
    "SpectrumProbe",
    "SpectrumRecord",
    "Tridiagonal",
    "batch_noise",
    "compare",
    "lanczos",
    "plan",
    "plots",
    "report",
    "resolve",
    "slq",
    "topk",
    "trace",
]

# Loaded when first asked for: they bring in matplotlib, jinja2 and transformers.
_LAZY = {
    "plots": ("spectra.plots", None),
    "report": ("spectra.report", None),
    "SpectrumCallback": ("spectra.integrations.transformers", "SpectrumCallback"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
