"""Operators given by their entries or by their eigenvalues. Estimates are tested against them."""

from __future__ import annotations

import numpy as np
import torch

from spectra.backend.errors import InputError
from spectra.operators.base import UNITS_OF_ROUNDING, LinearOperator


class _ExplicitOperator(LinearOperator):
    """An operator with exact entries. Its products have the rounding error of the dtype, which need not be measured."""

    def rounding(self) -> float:
        """A few units of the dtype's floating-point spacing."""
        return UNITS_OF_ROUNDING * torch.finfo(self.dtype).eps


class DenseOperator(_ExplicitOperator):
    """A symmetric matrix held in memory.

    Args:
        matrix: (n, n) tensor or array, symmetric to rounding error.

    Raises:
        InputError: For a matrix that is not square, not symmetric, complex, or not finite.

    Example:
        >>> import numpy as np, spectra
        >>> operator = spectra.DenseOperator(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> operator @ np.array([1.0, -1.0])
        array([ 1., -1.])
    """

    def __init__(self, matrix: torch.Tensor | np.ndarray):
        matrix = _real(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise InputError(f"a square matrix is expected, got shape {tuple(matrix.shape)}")
        if not torch.isfinite(matrix).all():
            raise InputError("the matrix holds NaN or infinity; every entry must be finite")
        scale = matrix.abs().max()
        if (matrix - matrix.T).abs().max() > 1e3 * torch.finfo(matrix.dtype).eps * scale:
            raise InputError("the matrix is not symmetric; pass (A + A.T) / 2 if that is what you mean")
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[0])
        self.dtype, self.device = matrix.dtype, matrix.device

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matrix @ vector

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors @ self.matrix.T


class DiagonalOperator(_ExplicitOperator):
    """The diagonal matrix of given eigenvalues, for tests and examples with a known spectrum at large n.

    Args:
        values: The eigenvalues, (n,).

    Raises:
        InputError: For values that are not a vector of finite real numbers.

    Example:
        >>> import numpy as np, spectra
        >>> print(spectra.trace(spectra.DiagonalOperator(np.arange(5.0)), probes=5))
        10 [10, 10]
    """

    def __init__(self, values: torch.Tensor | np.ndarray):
        values = _real(values)
        if values.ndim != 1 or not len(values):
            raise InputError(f"a vector of eigenvalues is expected, got shape {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise InputError("the values hold NaN or infinity; every value must be finite")
        self.values = values
        self.shape = (len(values), len(values))
        self.dtype, self.device = values.dtype, values.device

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.values * vector

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.values * vectors


def _real(values: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The values in float32 or float64. Integers and narrower floats are converted, complex numbers refused."""
    tensor = torch.as_tensor(values).detach()
    if tensor.is_complex():
        raise InputError(f"real numbers are expected, got {tensor.dtype}")
    if tensor.dtype == torch.float64 or tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
