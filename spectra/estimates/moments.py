"""Sums over eigenvalues, their ratios, and the ends of a spectrum, each with its interval.

For a probe uniform on the unit sphere of n dimensions, v . f(A) v has mean m = mean f(lambda), variance
2 Var f(lambda) / (n + 2) and third central moment 8 mean (f - m)^3 / ((n + 2)(n + 4)): the squared coordinates are
Dirichlet(1/2, ..., 1/2). The moments of f on the right are estimated from the same quadrature rules, so one probe is
enough to have an interval. How well p probes know the variance follows in the same way: with
p n (mean (f - m)^2)^2 / mean (f - m)^4 degrees of freedom (Satterthwaite, Biometrics Bulletin 2, 1946), which are many
unless a few eigenvalues make up the sum. Sums of one sign are then skewed, and the interval allows for it already;
differences need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from spectra.estimates.estimate import Estimate, certain, sampling_interval
from spectra.estimates.quadrature import GaussRule

Function = Callable[[np.ndarray], np.ndarray]
ROUNDING = 1e-12  # relative error of sums in float64
ENDS_ROUNDING = 16  # times the noise of one product: a recurrence and an eigensolver lie between
BISECTIONS = 50
LEAST_FREEDOM = 3.0  # below, the quantile would say more about its own approximation
RESOLVED_END = 0.05  # relative half-width under which an extreme eigenvalue counts as resolved


def sum_over_eigenvalues(
    function: Function,
    rules: Sequence[GaussRule],
    dimension: int,
    atoms: np.ndarray,
    counts: np.ndarray,
    *,
    rounding: float = ROUNDING,
    difference: bool = False,
) -> Estimate:
    """sum_k f(lambda_k) over all eigenvalues: exactly over the atoms, by quadrature over the rest. rounding: what the
    arithmetic may have lost, relative to sum |f|. difference: f changes its sign, so that the sum need not be skewed
    where few eigenvalues make it up."""
    known = float(counts @ function(atoms))
    slack = rounding * float(counts @ np.abs(function(atoms)))
    if not rules:
        return certain(known, rounding=slack)
    mean, deviation, skewness, freedom = _mean_of(function, rules, dimension)
    freedom = freedom if difference else math.inf
    part = sampling_interval(dimension * mean, dimension * deviation, skewness, freedom=freedom)
    size = np.mean([rule.weights @ np.abs(function(rule.nodes)) for rule in rules])
    slack += rounding * dimension * float(size)
    return Estimate(known + part.value, known + part.low - slack, known + part.high + slack)


def ratio_of_sums(
    part: Function, whole: Function, rules: Sequence[GaussRule], dimension: int, atoms: np.ndarray, counts: np.ndarray
) -> Estimate:
    """sum part(lambda) / sum whole(lambda), for 0 <= part <= whole.

    A ratio r is in the interval if 0 is in that of sum (part - r whole) (Fieller, J. R. Stat. Soc. B 16, 1954). Where
    probes saw too much of a few large eigenvalues, both the ratio and its spread come out small; asking each r for the
    spread that it would have leaves room on the far side.
    """
    ratio = ratio_value(part, whole, rules, dimension, atoms, counts)
    if ratio is None:
        return Estimate(0.0, 0.0, 0.0, False, "every eigenvalue is zero")
    if not rules:
        return widened(certain(ratio), ROUNDING, least=0.0, most=1.0)

    def remainder(r: float) -> Estimate:
        def function(nodes: np.ndarray) -> np.ndarray:
            return part(nodes) - r * whole(nodes)

        return sum_over_eigenvalues(function, rules, dimension, atoms, counts, difference=True)

    low = last_that_holds(lambda r: remainder(r).low <= 0, ratio, 0.0)
    high = last_that_holds(lambda r: remainder(r).high >= 0, ratio, 1.0)
    return Estimate(ratio, low, high)


def ratio_value(
    part: Function, whole: Function, rules: Sequence[GaussRule], dimension: int, atoms: np.ndarray, counts: np.ndarray
) -> float | None:
    """The ratio of `ratio_of_sums` without its interval, None where `whole` sums to nothing."""
    numerator = sum_over_eigenvalues(part, rules, dimension, atoms, counts).value
    denominator = sum_over_eigenvalues(whole, rules, dimension, atoms, counts).value
    return None if denominator == 0 else min(max(numerator / denominator, 0.0), 1.0)


def last_that_holds(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """How far from `inside`, where a condition holds, toward `outside` it does, by bisection; rounded outward."""
    if holds(outside):
        return outside
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return outside


def widened(estimate: Estimate, room: float, *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """The estimate with `room` more on each side, within [least, most]."""
    low, high = max(estimate.low - room, least), min(estimate.high + room, most)
    return Estimate(estimate.value, low, high, estimate.resolved, estimate.reason, estimate.products)


def square_root(square: Estimate) -> Estimate:
    """The square root of a non-negative estimate, end by end."""
    low, high = math.sqrt(max(square.low, 0.0)), math.sqrt(max(square.high, 0.0))
    return Estimate(math.sqrt(max(square.value, 0.0)), low, high, square.resolved, square.reason)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate in other units; factor > 0."""
    return Estimate(
        factor * estimate.value, factor * estimate.low, factor * estimate.high, estimate.resolved, estimate.reason
    )


def largest(
    rules: Sequence[GaussRule],
    residuals: Sequence[np.ndarray],
    atoms: np.ndarray,
    atom_residuals: np.ndarray,
    noise: float,
) -> Estimate:
    """The largest eigenvalue. A Ritz value never passes the true end, so the lower bound is the largest one seen, less
    rounding. Above there is room for what has not converged: the node's own residual, and its distance to the typical
    probe's end. A deflated eigenvalue is within its residual, and inexact vectors shift what is left (`leak`)."""
    rounding = ENDS_ROUNDING * noise
    candidates = [(float(a), float(r), float(r)) for a, r in zip(atoms, atom_residuals, strict=True)]
    if rules:
        ends = np.array([rule.nodes[-1] for rule in rules])
        best = int(ends.argmax())
        room = max(float(residuals[best][-1]), float(ends[best] - np.median(ends)))
        rounding += leak(atoms, atom_residuals, float(ends[best]))
        candidates.append((float(ends[best]), rounding, room + rounding))
    value, below, _ = max(candidates)
    low, high = value - below, max(value + room for value, _, room in candidates)
    scale = max([abs(value)] + [abs(float(rule.nodes[0])) for rule in rules] + [abs(float(a)) for a in atoms])
    if (high - low) / 2 <= max(RESOLVED_END * abs(value), 1e-6 * scale):
        return Estimate(value, low, high)
    return Estimate(value, low, high, False, "the end of the spectrum has not converged: use more steps, or topk")


def leak(atoms: np.ndarray, residuals: np.ndarray, point: float) -> float:
    """How far deflating with inexact eigenvectors may shift the eigenvalues near a point.

    sum_i r_i^2 / |theta_i - point| for Ritz pairs with residuals r_i: the second-order effect of the coupling that is
    left between them and the rest (Parlett, The Symmetric Eigenvalue Problem, 1998, chapter 11).
    """
    inexact = residuals > 0
    residuals, distances = residuals[inexact], np.abs(atoms[inexact] - point)
    return float((residuals**2 / np.maximum(distances, residuals)).sum())


def mirrored(rules: Sequence[GaussRule]) -> list[GaussRule]:
    """The rules of -A, so that the smallest eigenvalue is the largest of the mirror."""
    return [GaussRule(-rule.nodes[::-1], rule.weights[::-1], rule.last_components[::-1]) for rule in rules]


def negated(estimate: Estimate) -> Estimate:
    """The estimate of minus the quantity."""
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.resolved, estimate.reason)


def _mean_of(function: Function, rules: Sequence[GaussRule], dimension: int) -> tuple[float, float, float, float]:
    """Mean over probes of f under the rule, its standard deviation, its skewness, and the degrees of freedom with which
    the deviation is known."""
    values = [function(rule.nodes) for rule in rules]
    mean = float(np.mean([rule.weights @ v for rule, v in zip(rules, values, strict=True)]))
    second, third, fourth = (
        float(np.mean([rule.weights @ (v - mean) ** power for rule, v in zip(rules, values, strict=True)]))
        for power in (2, 3, 4)
    )
    variance = 2 * second / (dimension + 2)
    if variance <= 0:
        return mean, 0.0, 0.0, math.inf
    skewness = 8 * third / ((dimension + 2) * (dimension + 4)) / variance**1.5
    freedom = max(len(rules) * dimension * second**2 / fourth, LEAST_FREEDOM)
    return mean, math.sqrt(variance / len(rules)), skewness / math.sqrt(len(rules)), freedom
