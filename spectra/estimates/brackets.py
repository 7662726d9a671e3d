"""Rigorous bounds on the mass of a spectral measure below a threshold, from its Jacobi matrix.

Many measures have the moments that m Lanczos steps determine. The mass below a threshold t is smallest and largest for
the Gauss-Radau rule with a node at t (Chebyshev, Markov and Stieltjes; Akhiezer, The Classical Moment Problem, 1965,
section 2.5; Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.estimates.quadrature import gauss_rule


@dataclass(frozen=True)
class Bracket:
    """Bounds on the mass of a measure below a threshold.

    Attributes:
        below: Mass on the nodes left of the threshold, a lower bound of the mass strictly below it.
        at: Weight of the node at the threshold. below + at is an upper bound of the mass below and at the threshold.
    """

    below: float
    at: float


def bracket(alphas: np.ndarray, betas: np.ndarray, threshold: float) -> Bracket:
    """Bound the mass of a spectral measure below a threshold.

    The Gauss-Radau rule has m + 1 nodes. Its matrix is T bordered by betas[-1] and the diagonal entry that makes the
    threshold an eigenvalue, threshold + betas[-1]^2 e_m . (T - threshold)^-1 e_m. After a breakdown (betas[-1] = 0) the
    nodes of T carry the measure exactly.

    Args:
        alphas: (m,) diagonal of the Jacobi matrix T.
        betas: (m,) its off-diagonal, and last the norm of the residual.
        threshold: Where the mass is cut, in the units of the eigenvalues.

    Returns:
        The bracket.

    Example:
        >>> bracket(np.array([1.0]), np.array([0.0]), threshold=2.0)
        Bracket(below=1.0, at=0.0)
    """
    scale = float(np.abs(alphas).max() + 2 * np.abs(betas).max()) or 1.0
    if betas[-1] <= 0:
        return _exact_bracket(alphas, betas, threshold, tolerance=1e-12 * scale)
    bordered = np.append(alphas, _radau_entry(alphas, betas, threshold, smallest_pivot=np.finfo(float).eps * scale))
    rule = gauss_rule(bordered, betas)
    node = int(np.argmin(np.abs(rule.nodes - threshold)))
    return Bracket(float(rule.weights[:node].sum()), float(rule.weights[node]))


def _exact_bracket(alphas: np.ndarray, betas: np.ndarray, threshold: float, *, tolerance: float) -> Bracket:
    """The mass below and at the threshold after a breakdown; nodes within the tolerance count as at it."""
    rule = gauss_rule(alphas, betas)
    below = rule.weights[rule.nodes < threshold - tolerance].sum()
    at = rule.weights[np.abs(rule.nodes - threshold) <= tolerance].sum()
    return Bracket(float(below), float(at))


def _radau_entry(alphas: np.ndarray, betas: np.ndarray, threshold: float, *, smallest_pivot: float) -> float:
    """The last diagonal entry of the Gauss-Radau matrix, by Gaussian elimination of T - threshold."""
    pivot = alphas[0] - threshold
    for alpha, beta in zip(alphas[1:], betas[:-1], strict=True):
        pivot = alpha - threshold - beta**2 / (pivot if abs(pivot) > smallest_pivot else smallest_pivot)
    pivot = pivot if abs(pivot) > smallest_pivot else smallest_pivot
    return threshold + betas[-1] ** 2 / pivot
