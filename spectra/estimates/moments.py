"""Sums over eigenvalues and ratios of sums, with intervals.

For a probe vector v uniform on the unit sphere of n dimensions, v . f(A) v has mean m = mean f(lambda), variance
2 Var f(lambda) / (n + 2) and third central moment 8 mean (f - m)^3 / ((n + 2)(n + 4)), because the squared coordinates
of v are Dirichlet(1/2, ..., 1/2). The moments of f on the right are estimated from the same quadrature rules, so one
probe vector is enough for an interval.

p probe vectors give the variance with p n (mean (f - m)^2)^2 / mean (f - m)^4 degrees of freedom (Satterthwaite,
Biometrics Bulletin 2, 1946). They are many unless a few eigenvalues dominate the sum. In that case a sum of terms of
one sign is skewed, and the skewness widens the interval. A sum of terms of both signs may not be skewed, so its
interval uses Student's quantile for the degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from spectra.estimates.estimate import (
    RESOLVED_HALF_WIDTH,
    Estimate,
    certain,
    sampling_interval,
    unresolved,
    with_margin,
)
from spectra.estimates.measure import FLOAT64_ERROR, SpectralMeasure

Function = Callable[[np.ndarray], np.ndarray]  # eigenvalues (m,) -> values (m,)
BISECTIONS = 50
FEWEST_DEGREES_OF_FREEDOM = 3.0  # below this, Satterthwaite's approximation is too rough to be used


def sum_over_eigenvalues(
    function: Function,
    measure: SpectralMeasure,
    *,
    relative_rounding_error: float = FLOAT64_ERROR,
    both_signs: bool = False,
) -> Estimate:
    """Estimate sum_k f(lambda_k): exact over the known eigenvalues, by quadrature over the others.

    Args:
        function: The function f, from eigenvalues (m,) to values (m,).
        measure: The Jacobi matrices and the known eigenvalues.
        relative_rounding_error: Rounding error of the sum, relative to sum_k |f(lambda_k)|.
        both_signs: Whether f has both signs. A sum that few eigenvalues dominate may then have no skewness, and the
            interval uses the degrees of freedom of the variance instead.

    Returns:
        The sum with its interval.
    """
    known = measure.known
    known_sum = float(known.counts @ function(known.values))
    rounding_error = relative_rounding_error * float(known.counts @ np.abs(function(known.values)))
    if not measure.rules:
        return certain(known_sum, rounding=rounding_error)
    n = measure.sampled_dimension
    mean, deviation, skewness, freedom = _mean_over_probes(function, measure)
    freedom = freedom if both_signs else math.inf
    sampled = sampling_interval(n * mean, n * deviation, skewness, freedom=freedom)
    size = np.mean([rule.weights @ np.abs(function(rule.nodes)) for rule in measure.rules])
    rounding_error += relative_rounding_error * n * float(size)
    return Estimate(
        known_sum + sampled.value, known_sum + sampled.low - rounding_error, known_sum + sampled.high + rounding_error
    )


def ratio_of_sums(part: Function, whole: Function, measure: SpectralMeasure) -> Estimate:
    """Estimate sum_k part(lambda_k) / sum_k whole(lambda_k), for 0 <= part <= whole.

    A ratio r is in the interval if 0 is in the interval of sum_k (part - r whole)(lambda_k) (Fieller, J. R. Stat. Soc.
    B 16, 1954). Probe vectors with too much weight on a few large eigenvalues make both the ratio and its standard
    error too small. Fieller's interval computes the standard error for each r, and so extends further above the ratio.

    Args:
        part: The function of an eigenvalue that the numerator sums.
        whole: The function that the denominator sums.
        measure: The Jacobi matrices and the known eigenvalues.

    Returns:
        The ratio in [0, 1] with its interval; unresolved where every eigenvalue is zero.
    """
    ratio = ratio_value(part, whole, measure)
    if ratio is None:
        return Estimate(0.0, 0.0, 0.0, False, "every eigenvalue is zero")
    if not measure.rules:
        return with_margin(certain(ratio), FLOAT64_ERROR, lower=0.0, upper=1.0)

    def difference(r: float) -> Estimate:
        def function(eigenvalues: np.ndarray) -> np.ndarray:
            return part(eigenvalues) - r * whole(eigenvalues)

        return sum_over_eigenvalues(function, measure, both_signs=True)

    low = bisect_to_edge(lambda r: difference(r).low <= 0, ratio, 0.0)
    high = bisect_to_edge(lambda r: difference(r).high >= 0, ratio, 1.0)
    return Estimate(ratio, low, high)


def ratio_value(part: Function, whole: Function, measure: SpectralMeasure) -> float | None:
    """Return the value of `ratio_of_sums` without its interval; None where the denominator is zero."""
    numerator = sum_over_eigenvalues(part, measure).value
    denominator = sum_over_eigenvalues(whole, measure).value
    return None if denominator == 0 else min(max(numerator / denominator, 0.0), 1.0)


def negative_part_share(measure: SpectralMeasure, power: int) -> Estimate:
    """Estimate sum over lambda < 0 of |lambda|^power, divided by the sum over all eigenvalues.

    The negative part of |lambda|^power has a kink at zero, where quadrature with few nodes is inexact. The interval
    therefore has a margin for what more Lanczos steps would change, estimated from a quarter, half and all of them.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        power: 1 for the magnitude, 2 for the energy.

    Returns:
        The share. It is unresolved where its interval extends more than .05 to either side. Both sides count, because a
        share that is small by chance has a small standard error too.
    """
    part, whole = negative_power(power), absolute_power(power)
    estimate = ratio_of_sums(part, whole, measure)
    if not measure.rules or not estimate.resolved:
        return estimate
    quarter, half = (ratio_value(part, whole, measure.shortened(divisor)) or 0.0 for divisor in (4, 2))
    estimate = with_margin(estimate, _distance_to_limit(quarter, half, estimate.value), lower=0.0, upper=1.0)
    if max(estimate.high - estimate.value, estimate.value - estimate.low) <= RESOLVED_HALF_WIDTH:
        return estimate
    remedy = "use more" if measure.known.any_deflated else "use more, or deflate"
    count = len(measure.rules)
    few = "1 probe vector is" if count == 1 else f"{count} probe vectors are"
    return unresolved(estimate, f"{few} too few: {remedy}")


def absolute_power(power: int) -> Function:
    """Return the function lambda -> |lambda|^power."""
    return lambda eigenvalues: np.abs(eigenvalues) ** power


def negative_power(power: int) -> Function:
    """Return the function lambda -> |lambda|^power for lambda < 0, and 0 elsewhere."""
    return lambda eigenvalues: np.where(eigenvalues < 0, np.abs(eigenvalues) ** power, 0.0)


def bisect_to_edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Find by bisection where a condition ceases to hold.

    Args:
        holds: The condition on a number.
        inside: A number for which it holds.
        outside: The other end of the search.

    Returns:
        `outside` where the condition holds there too; else the number where it ceases to hold, on the side of
        `outside`.
    """
    if holds(outside):
        return outside
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return outside


def _mean_over_probes(function: Function, measure: SpectralMeasure) -> tuple[float, float, float, float]:
    """The mean of f over the probe vectors' rules: its value, standard error, skewness and degrees of freedom."""
    rules, n = measure.rules, measure.sampled_dimension
    values = [function(rule.nodes) for rule in rules]
    mean = float(np.mean([rule.weights @ v for rule, v in zip(rules, values, strict=True)]))
    second, third, fourth = (
        float(np.mean([rule.weights @ (v - mean) ** power for rule, v in zip(rules, values, strict=True)]))
        for power in (2, 3, 4)
    )
    variance = 2 * second / (n + 2)
    if variance <= 0:
        return mean, 0.0, 0.0, math.inf
    skewness = 8 * third / ((n + 2) * (n + 4)) / variance**1.5
    freedom = max(len(rules) * n * second**2 / fourth, FEWEST_DEGREES_OF_FREEDOM)
    return mean, math.sqrt(variance / len(rules)), skewness / math.sqrt(len(rules)), freedom


def _distance_to_limit(quarter: float, half: float, whole: float) -> float:
    """Estimate how far a value is from its limit, from the values after a quarter, half and all Lanczos steps.

    If changes shrink by a ratio r at each doubling of the steps, r / (1 - r) of the last change remains. The ratio is
    measured, and clipped to [1/8, 1/2]; it is 1/8 for |lambda|^2 at a smooth density.
    """
    last, before = abs(whole - half), abs(half - quarter)
    ratio = min(max(last / before if before > 0 else 0.5, 1 / 8), 1 / 2)
    return last * ratio / (1 - ratio)
