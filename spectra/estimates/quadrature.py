"""From Jacobi matrices to quadrature rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy


@dataclass(frozen=True)
class GaussRule:
    """Nodes theta_i (m,), ascending, weights w_i (m,) that sum to 1, and last_components (m,): the last entries of
    T's eigenvectors, so that betas[-1] * |last_components| bounds the residual of each Ritz pair."""

    nodes: np.ndarray
    weights: np.ndarray
    last_components: np.ndarray


def gauss_rule(alphas: np.ndarray, betas: np.ndarray) -> GaussRule:
    """The Gauss rule of a Jacobi matrix: sum_i w_i f(theta_i) equals the integral of f under the start vector's
    spectral measure for polynomials up to degree 2m - 1 (Golub and Welsch, Math. Comp. 23, 1969).

    alphas: (m,), betas: (m - 1,) or longer, of which the first m - 1 are used.
    """
    nodes, vectors = _eigh_tridiagonal(alphas, betas[: len(alphas) - 1])
    weights = vectors[0] ** 2
    return GaussRule(nodes, weights / weights.sum(), vectors[-1])


def _eigh_tridiagonal(diagonal: np.ndarray, off_diagonal: np.ndarray) -> Any:
    try:
        return scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
    except np.linalg.LinAlgError:  # LAPACK's fast driver gives up on rare matrices; plain QR does not
        return scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stev")


def christoffel(alphas: np.ndarray, betas: np.ndarray, point: float) -> float:
    """The Christoffel function at a point, 1 / sum_{j<m} p_j(point)^2, with p_j the orthonormal polynomials of T.

    It is the weight of a Gauss-Radau node placed at the point, and so the most mass the measure can carry exactly
    there (Akhiezer, The Classical Moment Problem, 1965, section 2.5).
    """
    total, previous, current, scale = 1.0, 0.0, 1.0, 1.0
    for j in range(len(alphas) - 1):
        coupling = betas[j - 1] * previous if j else 0.0
        previous, current = current, ((point - alphas[j]) * current - coupling) / betas[j]
        total += current * current
        if total > 1e200:  # far outside the support the polynomials explode
            total, previous, current, scale = total * 1e-200, previous * 1e-100, current * 1e-100, scale * 1e-200
    return scale / total
