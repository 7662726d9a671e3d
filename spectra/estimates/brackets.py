"""Rigorous bounds on the mass of a spectral measure below a threshold, from its Jacobi matrix.

Many measures have the moments that m Lanczos steps determine. The mass below a threshold t is smallest and largest for
the Gauss-Radau rule with a node at t (Chebyshev, Markov and Stieltjes; Akhiezer, The Classical Moment Problem, 1965,
section 2.5; Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spectra.estimates.quadrature import GaussRule, gauss_rule

BREAKDOWN_TOLERANCE = 1e-12  # relative distance within which eigenvalues count as at a node after a breakdown
RULES = 8  # quadrature rules whose nodes are interleaved between the Ritz values


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
    scale = _largest_entry(alphas, betas)
    if betas[-1] <= 0:
        return _exact_bracket(alphas, betas, threshold, tolerance=BREAKDOWN_TOLERANCE * scale)
    rule, node = _radau_rule(alphas, betas, threshold)
    return Bracket(float(rule.weights[:node].sum()), float(rule.weights[node]))


def mass_bounds(
    alphas: np.ndarray,
    betas: np.ndarray,
    thresholds: np.ndarray,
    *,
    exactly_at: Sequence[float] = (),
    rules: int = RULES,
) -> tuple[np.ndarray, np.ndarray]:
    """Bound the mass of a spectral measure below many thresholds, with few quadrature rules.

    `bracket` needs a rule for each threshold. Here a few rules serve all thresholds, by two facts, and the bounds are
    hardly wider:

    * A Gauss-Radau rule is extremal at each of its nodes, so it gives m + 1 brackets. Between nodes the bounds follow
      from monotonicity.
    * The bracket at t contains the mass below t of each of the rules. Its width is the Christoffel function
      1 / sum_{j<=m} p_j(t)^2, which costs O(m). So it extends at most by this width below the largest of these masses,
      and above the smallest (Akhiezer, 1965, section 2.5).

    The rules are the Gauss rule and the rules of T bordered by betas[-1] and the diagonal entries
    alphas[-1] + betas[-1] tan(phi) for evenly spaced phi. Their nodes are interleaved between the Ritz values.

    Args:
        alphas: (m,) diagonal of the Jacobi matrix T.
        betas: (m,) its off-diagonal, and last the norm of the residual.
        thresholds: (g,) where the mass is cut.
        exactly_at: Those of the thresholds at which the bounds are those of `bracket`; each costs one more rule.
        rules: How many interleaved rules are used.

    Returns:
        (g,) lower bounds of the mass strictly below each threshold, and (g,) upper bounds of the mass below and at it.

    Example:
        >>> low, high = mass_bounds(np.array([1.0]), np.array([0.0]), np.array([0.0, 2.0]))
        >>> low.tolist(), high.tolist()
        ([0.0, 1.0], [0.0, 1.0])
    """
    if betas[-1] <= 0:
        tolerance = BREAKDOWN_TOLERANCE * _largest_entry(alphas, betas)
        found = [_exact_bracket(alphas, betas, float(t), tolerance=tolerance) for t in thresholds]
        return np.array([one.below for one in found]), np.array([one.below + one.at for one in found])
    widths = _bracket_widths(alphas, betas, thresholds)
    low, high = np.zeros(len(thresholds)), np.ones(len(thresholds))
    for nodes, weights in _rules(alphas, betas, rules, exactly_at):
        mass = np.append(0.0, np.cumsum(weights))
        before, up_to = (np.searchsorted(nodes, thresholds, side=side) for side in ("left", "right"))
        # the brackets at the nodes next to the threshold, the one at or left of it and the one at or right of it
        low = np.maximum(low, mass[np.maximum(up_to - 1, 0)])
        high = np.minimum(high, mass[np.minimum(before + 1, len(nodes))])
        low, high = np.maximum(low, mass[up_to] - widths), np.minimum(high, mass[before] + widths)
    return low, high


def _rules(
    alphas: np.ndarray, betas: np.ndarray, count: int, thresholds: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights of rules with the moments of T: `count` interleaved ones, and one for each threshold."""
    rule = gauss_rule(alphas, betas)
    yield rule.nodes, rule.weights
    for phase in np.pi * (np.arange(1, count) / count - 0.5):
        rule = gauss_rule(np.append(alphas, alphas[-1] + betas[-1] * np.tan(phase)), betas)
        yield rule.nodes, rule.weights
    for threshold in thresholds:
        rule, node = _radau_rule(alphas, betas, threshold)
        yield np.where(np.arange(len(rule.nodes)) == node, threshold, rule.nodes), rule.weights


def _bracket_widths(alphas: np.ndarray, betas: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The widths of the brackets at the thresholds, 1 / sum_{j<=m} p_j(t)^2 by the three-term recurrence.

    Their rounding error is equivalent to a move of the threshold by a few eps ||T||.
    """
    previous, current = np.zeros(len(thresholds)), np.ones(len(thresholds))
    total = current.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # far outside the spectrum the polynomials overflow: width 0
        for step, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
            coupling = betas[step - 1] * previous if step else 0.0
            previous, current = current, ((thresholds - alpha) * current - coupling) / beta
            total += current**2
    return 1 / np.where(np.isfinite(total), total, np.inf)


def _largest_entry(alphas: np.ndarray, betas: np.ndarray) -> float:
    """A cheap bound on the norm of T; 1 for T = 0."""
    return float(np.abs(alphas).max() + 2 * np.abs(betas).max()) or 1.0


def _radau_rule(alphas: np.ndarray, betas: np.ndarray, threshold: float) -> tuple[GaussRule, int]:
    """The Gauss-Radau rule with a node at the threshold, and the index of that node."""
    smallest_pivot = np.finfo(float).eps * _largest_entry(alphas, betas)
    bordered = np.append(alphas, _radau_entry(alphas, betas, threshold, smallest_pivot=smallest_pivot))
    rule = gauss_rule(bordered, betas)
    return rule, int(np.argmin(np.abs(rule.nodes - threshold)))


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
