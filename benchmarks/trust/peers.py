"""The negative share from the densities of PyHessian 0.1 and curvlinops 3.0.1, as a user would read it.

Both get a model in float32 whose Hessian is diag(values), and run with their default settings except for the numbers of
probe vectors and steps. PyHessian's probe vectors are random signs, which have no sampling error on a diagonal matrix.
Its error here is that of the quadrature alone; on another matrix with this spectrum, a sampling error is added.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn


@functools.cache
def missing(package: str) -> str:
    """Why a library cannot be used, in a line; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    except ImportError as error:
        return f"{package} is missing, its column stays empty ({error}): make bench-trust installs it"
    return ""


class Quadratic(nn.Module):
    """L(theta) = theta . (values * theta) / 2, whose Hessian is diag(values)."""

    values: torch.Tensor

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.register_buffer("values", torch.as_tensor(values, dtype=torch.float32))
        self.theta = nn.Parameter(torch.zeros(len(values)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The loss, whatever the inputs."""
        return (self.theta * self.values * self.theta).sum() / 2


def pyhessian(values: np.ndarray, *, probes: int, steps: int, seed: int) -> float:
    """The weights of PyHessian's nodes below zero, over the sum of all weights."""
    from pyhessian import hessian

    torch.manual_seed(seed)
    unused = torch.zeros(1)
    with quiet(), torch_eig():
        measured = hessian(Quadratic(values), lambda loss, _: loss, data=(unused, unused), cuda=False)
        nodes, weights = (np.array(part) for part in measured.density(iter=steps, n_v=probes))
    for parameter in measured.params:
        parameter.grad = None  # it refers to the graph, which refers to it
    return float(weights[nodes < 0].sum() / weights.sum())


def curvlinops(values: np.ndarray, *, probes: int, steps: int, seed: int) -> float:
    """The part of curvlinops' density below zero, by the trapezoid rule over its grid.

    The density is a sum of Gaussian kernels on 1,024 points; their width is that of the spectrum over the number of
    steps (kappa = 3). The ends of the spectrum are found first, to a hundredth, with SciPy, whose start vector has no
    seed.
    """
    module = importlib.import_module("curvlinops")
    torch.manual_seed(seed)
    with quiet():
        operator = _diagonal_class(module)(torch.as_tensor(values, dtype=torch.float32))
        found = module.lanczos_approximate_spectrum(operator, steps, num_repeats=probes)
    grid, density = (part.double().numpy() for part in found)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
    return float(np.interp(0.0, grid, mass) / mass[-1])


PEERS: dict[str, tuple[str, Callable[..., float]]] = {
    "PyHessian": ("pyhessian", pyhessian),
    "curvlinops": ("curvlinops", curvlinops),
}


def _diagonal_class(module: ModuleType) -> Any:
    """diag(values) as an operator of curvlinops, which works on lists of tensors with the vectors last."""
    base: Any = importlib.import_module(f"{module.__name__}._torch_base").PyTorchLinearOperator

    class Diagonal(base):
        SELF_ADJOINT = True

        def __init__(self, values: torch.Tensor):
            super().__init__([tuple(values.shape)], [tuple(values.shape)])
            self.values = values

        @property
        def device(self) -> torch.device:
            return self.values.device

        @property
        def dtype(self) -> torch.dtype:
            return self.values.dtype

        def _matmat(self, X: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self.values[:, None] * X[0]]

    return Diagonal


@contextlib.contextmanager
def torch_eig() -> Iterator[None]:
    """Supply torch.eig, which PyHessian 0.1 calls and torch has removed."""

    def eig(matrix: torch.Tensor, eigenvectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (n, 2), real and imaginary part, and eigenvectors (n, n), real for a symmetric matrix."""
        values, vectors = torch.linalg.eig(matrix)
        return torch.view_as_real(values), vectors.real

    with mock.patch.object(torch, "eig", eig, create=True):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings about gradients that keep their graph."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
