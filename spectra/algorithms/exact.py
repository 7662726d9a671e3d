"""The density of a matrix that is small enough to be formed and diagonalized."""

from __future__ import annotations

import numpy as np
import scipy

from spectra.algorithms.progress import Progress
from spectra.estimates.density import SpectralDensity
from spectra.operators.base import LinearOperator


def exact_density(op: LinearOperator, *, probes: int, steps: int, progress: Progress) -> SpectralDensity:
    """The density of all eigenvalues, from n products.

    Args:
        op: A, a symmetric operator (n, n).
        probes: How many equal rows the nodes of the density have.
        steps: How many columns they have at least.
        progress: Told of the products.

    Returns:
        The density, with `exact` set. Rows of zeros are eigenvalues of exactly zero.
    """
    before = progress.done
    progress.total = before + op.shape[0]
    matrix = op.to_dense(on_products=lambda done: progress.reach(before + done)).cpu().double().numpy()
    nonzero = matrix.any(axis=1)  # the other rows and columns are zero eigenvalues, free of rounding error
    eigenvalues = np.zeros(len(matrix))
    if nonzero.any():
        eigenvalues[nonzero] = scipy.linalg.eigvalsh(matrix[np.ix_(nonzero, nonzero)])
    rounding_error = op.rounding() * float(np.abs(eigenvalues).max())
    return SpectralDensity.from_eigenvalues(eigenvalues, probes=probes, steps=steps, rounding_error=rounding_error)
