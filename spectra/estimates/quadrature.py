"""The Gauss quadrature rule of a Jacobi matrix, which the Lanczos recurrence gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy


@dataclass(frozen=True, eq=False)
class GaussRule:
    """The Gauss quadrature rule of a Jacobi matrix T.

    Attributes:
        nodes: (m,) eigenvalues of T in ascending order, the Ritz values theta_i.
        weights: (m,) weights w_i, which sum to 1.
        last_components: (m,) last entries of T's normalised eigenvectors. betas[-1] * |last_components| are the
            residual norms of the Ritz pairs.
    """

    nodes: np.ndarray
    weights: np.ndarray
    last_components: np.ndarray


def gauss_rule(alphas: np.ndarray, betas: np.ndarray) -> GaussRule:
    """Diagonalise a Jacobi matrix into its Gauss rule (Golub and Welsch, Math. Comp. 23, 1969).

    sum_i w_i f(theta_i) is the integral of f under the start vector's spectral measure, for every polynomial f of
    degree 2m - 1 or less.

    Args:
        alphas: (m,) diagonal of T.
        betas: (m - 1,) or longer; the first m - 1 entries are the off-diagonal of T.

    Returns:
        The rule with m nodes.

    Example:
        >>> rule = gauss_rule(np.array([0.0, 0.0]), np.array([2.0]))
        >>> rule.nodes.round(12).tolist(), rule.weights.round(12).tolist()
        ([-2.0, 2.0], [0.5, 0.5])
    """
    nodes, vectors = _eigh_tridiagonal(alphas, betas[: len(alphas) - 1])
    weights = vectors[0] ** 2
    return GaussRule(nodes, weights / weights.sum(), vectors[-1])


def _eigh_tridiagonal(diagonal: np.ndarray, off_diagonal: np.ndarray) -> Any:
    """Eigenvalues (m,) and eigenvectors (m, m) of a symmetric tridiagonal matrix."""
    try:
        return scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
    except np.linalg.LinAlgError:  # LAPACK's fast driver fails on rare matrices; the QR driver does not
        return scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stev")


def christoffel(alphas: np.ndarray, betas: np.ndarray, point: float) -> float:
    """Return the Christoffel function at a point, 1 / sum_{j<m} p_j(point)^2.

    p_j are the orthonormal polynomials of T. The value is the weight of a Gauss-Radau node at the point, and so the
    largest mass that a measure with these moments can have exactly there (Akhiezer, The Classical Moment Problem, 1965,
    section 2.5).

    Args:
        alphas: (m,) diagonal of the Jacobi matrix T.
        betas: (m - 1,) or longer, its off-diagonal.
        point: Where to evaluate the function.

    Returns:
        The mass, in (0, 1].
    """
    total, previous, current, scale = 1.0, 0.0, 1.0, 1.0
    for j in range(len(alphas) - 1):
        coupling = betas[j - 1] * previous if j else 0.0
        previous, current = current, ((point - alphas[j]) * current - coupling) / betas[j]
        total += current * current
        if total > 1e200:  # the polynomials grow without bound outside the support: rescale before they overflow
            total, previous, current, scale = total * 1e-200, previous * 1e-100, current * 1e-100, scale * 1e-200
    return scale / total
