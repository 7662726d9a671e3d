"""What a search may have missed: eigenvalues whose vectors lie outside everything it has found."""

from __future__ import annotations

import math

import torch

from spectra.algorithms.lanczos import Recurrence, Tridiagonal
from spectra.backend.vectors import gaussian
from spectra.estimates.quadrature import christoffel, gauss_rule
from spectra.operators.base import LinearOperator
from spectra.operators.derived import DeflatedOperator

STEPS = 15  # after which a random start should have shown an outlier: each multiplies its share of the vector
RISK = 0.05  # of missing an eigenvalue that would have to be among those wanted


def nothing_beyond(
    op: LinearOperator, basis: torch.Tensor, low: float, high: float, *, seed: int, stream: str, steps: int = STEPS
) -> bool:
    """Whether the complement of `basis`, orthonormal rows (m, n), shows no eigenvalue below `low` or above `high`.

    Lanczos there from a random vector, at most `steps` products. True once an eigenvalue just beyond either end would
    have stayed hidden with a probability of at most 5 % (`hidden`); False where a Ritz value lies beyond. Undecided at
    the end, it tells whether the outermost Ritz values stay within by their residuals.
    """
    dimension = op.shape[0] - len(basis)
    if not dimension:
        return True
    complement = DeflatedOperator(op, basis.T, inputs="orthogonal", orthonormal=True)
    start = complement.project(gaussian(op, seed=seed, index=0, stream=stream))
    recurrence = Recurrence(complement, start)
    for _ in range(steps):
        recurrence.advance(1)
        found = recurrence.tridiagonals()[0]
        rule = gauss_rule(found.alphas, found.betas)
        if rule.nodes[0] < low or rule.nodes[-1] > high:
            return False
        if recurrence.broken or max(hidden(found, dimension, end) for end in (low, high)) <= RISK:
            return True
    residuals = found.betas[-1] * abs(rule.last_components)
    return bool(low <= rule.nodes[0] - residuals[0] and rule.nodes[-1] + residuals[-1] <= high)


def hidden(found: Tridiagonal, dimension: int, end: float) -> float:
    """How likely at most a random vector holds as little of an eigenvector as its recurrence leaves room for, where the
    eigenvalue lies outside the Ritz values, at `end` or further out.

    Of all measures with the moments that it has seen, none has more mass at a point than the Christoffel function rho
    there, which falls away from the Ritz values. An eigenvector x gives the measure of the start vector b the mass
    (x . b)^2, and in d dimensions that of a random b is below rho with a probability of at most sqrt(2 d rho / pi).
    """
    if math.isinf(end):
        return 0.0
    return min(math.sqrt(2 * dimension * christoffel(found.alphas, found.betas, end) / math.pi), 1.0)
