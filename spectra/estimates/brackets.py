"""Rigorous bounds on the mass of a spectral measure below a threshold, from its Jacobi matrix.

Of all measures with the moments that m steps of Lanczos saw, the mass below t is largest and smallest for the one that
sits on the nodes of a Gauss-Radau rule with a node at t (Chebyshev, Markov and Stieltjes; Akhiezer, The Classical
Moment Problem, 1965, section 2.5; Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.estimates.quadrature import gauss_rule


@dataclass(frozen=True)
class Bracket:
    """below: mass on nodes left of the threshold, a lower bound of the true mass strictly below it. at: the weight
    of the node at the threshold; below + at is an upper bound of the true mass up to and including it."""

    below: float
    at: float


def bracket(alphas: np.ndarray, betas: np.ndarray, threshold: float) -> Bracket:
    """The bracket after m = len(alphas) steps. alphas, betas: (m,); betas[-1] is the norm of the last residual.

    The rule has m + 1 nodes: T is bordered by betas[-1] and a last diagonal entry that makes the threshold an
    eigenvalue, threshold + betas[-1]^2 e_m . (T - threshold)^-1 e_m. After a breakdown (betas[-1] = 0) T's own nodes
    carry the measure exactly.
    """
    scale = float(np.abs(alphas).max() + 2 * np.abs(betas).max()) or 1.0
    if betas[-1] <= 0:
        rule = gauss_rule(alphas, betas)
        close = 1e-12 * scale
        below = rule.weights[rule.nodes < threshold - close].sum()
        at = rule.weights[np.abs(rule.nodes - threshold) <= close].sum()
        return Bracket(float(below), float(at))
    pivot = alphas[0] - threshold
    tiny = np.finfo(float).eps * scale
    for alpha, beta in zip(alphas[1:], betas[:-1], strict=True):
        pivot = alpha - threshold - beta**2 / (pivot if abs(pivot) > tiny else tiny)
    pivot = pivot if abs(pivot) > tiny else tiny
    bordered = np.append(alphas, threshold + betas[-1] ** 2 / pivot)
    rule = gauss_rule(bordered, betas)
    node = int(np.argmin(np.abs(rule.nodes - threshold)))
    return Bracket(float(rule.weights[:node].sum()), float(rule.weights[node]))
