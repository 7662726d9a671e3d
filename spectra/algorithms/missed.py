"""Whether a search missed eigenvalues: a few Lanczos steps from a random vector orthogonal to what it found."""

from __future__ import annotations

import math

import torch

from spectra.algorithms.lanczos import LanczosRecurrence, Tridiagonal
from spectra.backend.random_vectors import gaussian
from spectra.estimates.quadrature import christoffel, gauss_rule
from spectra.operators.base import LinearOperator
from spectra.operators.derived import DeflatedOperator

MAX_STEPS = 15  # Lanczos steps; an eigenvalue clearly outside the others shows in fewer
MISS_PROBABILITY = 0.05  # accepted probability of missing an eigenvalue beyond the bounds


def rules_out_eigenvalues_beyond(
    op: LinearOperator,
    basis: torch.Tensor,
    low: float,
    high: float,
    *,
    seed: int,
    stream: str,
    max_steps: int = MAX_STEPS,
) -> bool:
    """Whether A, restricted to the orthogonal complement of a basis, has no eigenvalue outside [low, high].

    Runs Lanczos in the complement from a random vector. After each step:

    * a Ritz value outside [low, high] proves an eigenvalue there: the answer is False;
    * if an eigenvalue at `low` or at `high` would have gone unseen with a probability of at most 5 %
      (`missed_probability_bound`), or if the recurrence has broken down: the answer is True.

    If neither happens, the answer after the last step is whether the extreme Ritz values, moved outward by their
    residual norms, stay within [low, high].

    Args:
        op: The operator A, (n, n).
        basis: (m, n) with orthonormal rows.
        low: Lower bound; -inf to check the upper end only.
        high: Upper bound; inf to check the lower end only.
        seed: Seed of the random vector.
        stream: Name of the purpose of the random vector (`random_vectors.gaussian`).
        max_steps: The largest number of Lanczos steps, each of which costs one product.

    Returns:
        False if there is an eigenvalue outside, or may well be one.
    """
    dimension = op.shape[0] - len(basis)
    if not dimension:
        return True
    restricted = DeflatedOperator(op, basis.T, inputs="orthogonal", orthonormal=True)
    start = restricted.project(gaussian(op, seed=seed, index=0, stream=stream))
    recurrence = LanczosRecurrence(restricted, start)
    for _ in range(max_steps):
        recurrence.advance(1)
        found = recurrence.tridiagonals()[0]
        rule = gauss_rule(found.alphas, found.betas)
        if rule.nodes[0] < low or rule.nodes[-1] > high:
            return False
        bounds = [missed_probability_bound(found, dimension, end) for end in (low, high)]
        if recurrence.broken_down or max(bounds) <= MISS_PROBABILITY:
            return True
    residuals = found.betas[-1] * abs(rule.last_components)
    return bool(low <= rule.nodes[0] - residuals[0] and rule.nodes[-1] + residuals[-1] <= high)


def missed_probability_bound(found: Tridiagonal, dimension: int, end: float) -> float:
    """Upper bound on the probability that Lanczos from a random vector missed an eigenvalue at `end` or further out.

    An eigenvector x gives the spectral measure of the start vector b the mass (x . b)^2 at its eigenvalue. Among all
    measures with the moments of the Jacobi matrix, none has more mass at a point than the Christoffel function rho
    there, and rho decreases away from the Ritz values. So the eigenvalue can only have been missed if
    (x . b)^2 <= rho(end). For b uniform on the unit sphere in d dimensions that has a probability of at most
    sqrt(2 d rho / pi).

    Args:
        found: The Jacobi matrix of the start vector.
        dimension: Dimension d of the space from which the start vector was drawn.
        end: A point outside the Ritz values; infinite where that end of the spectrum does not matter.

    Returns:
        The bound, at most 1; 0 for an infinite `end`.
    """
    if math.isinf(end):
        return 0.0
    return min(math.sqrt(2 * dimension * christoffel(found.alphas, found.betas, end) / math.pi), 1.0)
