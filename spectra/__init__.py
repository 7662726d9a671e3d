"""Hessian spectral diagnostics for PyTorch models: every estimate that involves chance has an interval."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectra.algorithms.batch_noise import NoiseSplit, batch_noise
from spectra.algorithms.congruence import Congruence, find_congruence
from spectra.algorithms.inertia import count_below
from spectra.algorithms.lanczos import Tridiagonal, lanczos
from spectra.algorithms.plan import MemoryPlan, plan
from spectra.algorithms.resolve import resolve
from spectra.algorithms.sensitivity import sensitivity
from spectra.algorithms.slq import slq
from spectra.algorithms.topk import Eigenpairs, topk
from spectra.algorithms.trace import trace
from spectra.backend import ranks as distributed
from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.extras import need
from spectra.backend.version import __version__
from spectra.estimates.band import CumulativeBand
from spectra.estimates.changes import Change, compare
from spectra.estimates.counts import CountBelow
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.estimates.sensitivity import BlockSensitivity, SensitivityRanking
from spectra.operators.base import LinearOperator
from spectra.operators.blocks import BlockOperator, blocks_of
from spectra.operators.derived import CongruentOperator, DeflatedOperator, DifferenceOperator, MeanOperator
from spectra.operators.explicit import DenseOperator, DiagonalOperator
from spectra.operators.gauss_newton import FisherOperator, GaussNewtonOperator
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.runs.folder import Run
from spectra.runs.probe import SpectrumProbe
from spectra.runs.record import SpectrumRecord
from spectra.runs.schedule import Schedule
from spectra.runs.signals import GradientNormJump, LossPlateau

if TYPE_CHECKING:
    from spectra.integrations.trainer import SpectrumCallback
    from spectra.views import page as report
    from spectra.views import plots

__all__ = [
    "BlockOperator",
    "BlockSensitivity",
    "Change",
    "Congruence",
    "CongruentOperator",
    "CountBelow",
    "CumulativeBand",
    "DeflatedOperator",
    "DenseOperator",
    "DiagonalOperator",
    "DifferenceOperator",
    "Eigenpairs",
    "Estimate",
    "FisherOperator",
    "GaussNewtonOperator",
    "GradientNormJump",
    "HessianOperator",
    "InputError",
    "LinearOperator",
    "LossPlateau",
    "MeanOperator",
    "MemoryPlan",
    "NoiseSplit",
    "NonFiniteError",
    "Objective",
    "ParameterSpace",
    "Run",
    "Schedule",
    "SensitivityRanking",
    "SpectralDensity",
    "SpectrumCallback",
    "SpectrumProbe",
    "SpectrumRecord",
    "Tridiagonal",
    "__version__",
    "batch_noise",
    "blocks_of",
    "compare",
    "count_below",
    "distributed",
    "find_congruence",
    "lanczos",
    "plan",
    "plots",
    "report",
    "resolve",
    "sensitivity",
    "slq",
    "topk",
    "trace",
]

# Imported at first use, with the packages of the extras that they need.
_LAZY = {
    "plots": ("spectra.views.plots", None, ("matplotlib",)),
    "report": ("spectra.views.page", None, ("matplotlib", "jinja2")),
    "SpectrumCallback": ("spectra.integrations.trainer", "SpectrumCallback", ("transformers",)),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    module, attribute, packages = _LAZY[name]
    need(*packages)
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
