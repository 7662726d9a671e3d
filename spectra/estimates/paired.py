"""Intervals of the difference between two spectra, which are narrower with the same probe vectors for both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spectra.estimates import moments
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate, normal_quantile, sampling_interval, student_interval
from spectra.estimates.quantities import Kind, describe

Limits = Callable[[float], tuple[float, float]]  # factor > 0 -> the interval of after - factor * before
LARGEST_SKEWNESS = math.sqrt(8)  # skewness of a single eigenvalue's weight, chi-squared with one degree of freedom


def difference_of_intervals(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """Bound after - factor * before, whatever the dependence between the two estimates.

    Args:
        before: The first estimate.
        after: The second estimate.
        factor: Multiple of the first, positive.

    Returns:
        Lower and upper limit, [low_after - factor high_before, high_after - factor low_before].
    """
    return after.low - factor * before.high, after.high - factor * before.low


def independent_difference(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """Bound after - factor * before for independent estimates.

    On each side the distances from value to limit add in quadrature (Zou and Donner, Statistics in Medicine 27, 2008).

    Args:
        before: The first estimate.
        after: The second estimate.
        factor: Multiple of the first, positive.

    Returns:
        Lower and upper limit.
    """
    difference = after.value - factor * before.value
    below = math.hypot(after.value - after.low, factor * (before.high - before.value))
    above = math.hypot(after.high - after.value, factor * (before.value - before.low))
    return difference - below, difference + above


@dataclass(frozen=True, eq=False)
class MeanOverProbes:
    """A quantity as the mean over probe vectors of v . F v, with F a function of the operator.

    Attributes:
        estimate: The quantity with its own interval.
        values: (probes,) v . F v of each probe vector, up to a constant.
        eigenvalues: For each probe vector the eigenvalues (m,) of F at its nodes, less the mean over probe vectors and
            divided by n.
        counts: For each probe vector how many eigenvalues (m,) each node stands for.
        dimension: Dimension n of the sampled space.
        truncation: How much the quantity changed with the second half of the Lanczos steps.
        rounding_error: Bound on the rounding error of the quantity.
    """

    estimate: Estimate
    values: np.ndarray
    eigenvalues: list[np.ndarray]
    counts: list[np.ndarray]
    dimension: int
    truncation: float
    rounding_error: float


def mean_over_probes(density: SpectralDensity, key: str, estimate: Estimate) -> MeanOverProbes:
    """Write a quantity as a mean over probe vectors, to first order in their sampling errors.

    Args:
        density: The measured density.
        key: The quantity, one with `is_mean_over_probes`.
        estimate: The quantity as read from the density.

    Returns:
        The value for each probe vector, and the spectrum that its variance follows from.
    """
    measure = density.measure
    n, rules, known = measure.sampled_dimension, measure.rules, measure.known
    function = _influence(density, key, estimate)
    at_nodes = [function(rule.nodes) for rule in rules]
    values = np.array([rule.weights @ f for rule, f in zip(rules, at_nodes, strict=True)])
    size = float(np.mean([rule.weights @ np.abs(f) for rule, f in zip(rules, at_nodes, strict=True)]))
    size += float(known.counts @ np.abs(function(known.values))) / n
    return MeanOverProbes(
        estimate=estimate,
        values=values,
        eigenvalues=[(f - values.mean()) / n for f in at_nodes],
        counts=[n * rule.weights for rule in rules],
        dimension=n,
        truncation=_truncation(density, key, estimate),
        rounding_error=measure.relative_rounding_error * size,
    )


def _influence(density: SpectralDensity, key: str, estimate: Estimate) -> moments.Function:
    """The function f of an eigenvalue whose mean over eigenvalues changes as the quantity does, to first order."""
    quantity, n = describe(key), density.measure.sampled_dimension
    if quantity.kind is Kind.SUM:
        return lambda theta: n * theta
    if quantity.power is not None:
        whole = moments.absolute_power(quantity.power)
        total = moments.sum_over_eigenvalues(whole, density.measure).value
        return lambda theta: n / (total or 1.0) * whole(theta) * ((theta < 0) - estimate.value)
    norm = density.frobenius().value
    scale = 2 * (norm or 1.0) * (math.sqrt(density.dimension) if key == "rms" else 1.0)
    return lambda theta: n * theta * theta / scale


def _truncation(density: SpectralDensity, key: str, estimate: Estimate) -> float:
    """How much the second half of the Lanczos steps changed; 0 for polynomials, which quadrature integrates exactly."""
    power = describe(key).power
    if power is None:
        return 0.0
    part, whole = moments.negative_power(power), moments.absolute_power(power)
    return estimate.value - (moments.ratio_value(part, whole, density.measure.shortened(2)) or 0.0)


class PairedMeans:
    """The difference of two means over the same probe vectors.

    Args:
        before: The quantity in the first spectrum.
        after: The same quantity in the second spectrum, from the same probe vectors in the same order.
    """

    def __init__(self, before: MeanOverProbes, after: MeanOverProbes):
        self._a, self._b, self._probes = before, after, len(before.values)
        self._n = max(before.dimension, after.dimension)
        each = [
            _coupled_by_quantiles(*spectra, self._n)
            for spectra in zip(before.eigenvalues, before.counts, after.eigenvalues, after.counts, strict=True)
        ]
        self._before, self._after, self._counts = (np.concatenate(part) for part in zip(*each, strict=True))
        self._correlation = _correlation(before.values, after.values)

    def limits(self, factor: float) -> tuple[float, float]:
        """Return the interval of after - factor * before, for factor > 0."""
        return self._limits(factor, factor)

    def ratio_limits(self, factor: float) -> tuple[float, float]:
        """Return the interval of after - factor * before from which the interval of the ratio follows.

        after - factor before = (after - pivot before) + (pivot - factor) before, with the measured ratio as pivot. The
        standard error of the first term is estimated from the few pairs, that of the second from the first spectrum.
        """
        return self._limits(factor, self._b.estimate.value / self._a.estimate.value)

    def error_with_common_eigenvectors(self, factor: float) -> tuple[float, float]:
        """Return the smallest standard error that after - factor * before can have, whatever the eigenvectors.

        It is that of two operators with the same eigenvectors in the same order (Hoffman and Wielandt, Duke Math. J.
        20, 1953).

        Args:
            factor: Multiple of the first spectrum.

        Returns:
            Standard error and skewness of the mean over probe vectors.
        """
        return self._error_and_skewness(self._after - factor * self._before)

    def error_from_correlation(self, factor: float) -> float:
        """Return the standard error of after - factor * before from those of both sides and the pairs' correlation."""
        first, second = (self._error_and_skewness(spectrum)[0] for spectrum in (self._before, self._after))
        variance = (factor * first) ** 2 + second**2 - 2 * self._correlation * factor * first * second
        return math.sqrt(max(variance, 0.0))

    def _limits(self, factor: float, pivot: float) -> tuple[float, float]:
        """The interval of (after - pivot * before) + (pivot - factor) * before."""
        a, b = self._a, self._b
        value = b.estimate.value - factor * a.estimate.value
        student = student_interval(b.values - pivot * a.values).half_width
        half = max(student, normal_quantile() * self.error_from_correlation(pivot))
        half = math.hypot(half, normal_quantile() * (factor - pivot) * self._error_and_skewness(self._before)[0])
        smallest = sampling_interval(value, *self.error_with_common_eigenvectors(factor))
        margin = abs(b.truncation - factor * a.truncation) + b.rounding_error + factor * a.rounding_error
        low, high = min(smallest.low, value - half) - margin, max(smallest.high, value + half) + margin
        lowest, highest = difference_of_intervals(a.estimate, b.estimate, factor)
        return max(low, lowest), min(high, highest)

    def _error_and_skewness(self, eigenvalues: np.ndarray) -> tuple[float, float]:
        """Standard error and skewness of the mean over probe vectors of n v . D v, from D's centred eigenvalues."""
        n, counts = self._n, self._counts / self._probes
        variance = 2 * n / (n + 2) * float(counts @ eigenvalues**2)
        if variance <= 0:
            return 0.0, 0.0
        third = 8 * n * n / ((n + 2) * (n + 4)) * float(counts @ eigenvalues**3)
        skewness = min(max(third / variance**1.5, -LARGEST_SKEWNESS), LARGEST_SKEWNESS)
        return math.sqrt(variance / self._probes), skewness / math.sqrt(self._probes)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / size, -1, 1)) if size > 0 else 0.0


def _coupled_by_quantiles(
    values_a: np.ndarray, counts_a: np.ndarray, values_b: np.ndarray, counts_b: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pair two spectra of `total` eigenvalues in ascending order: the values of both, and the count of each pair."""
    (x, ranks_x), (y, ranks_y) = (
        _quantile_function(values, counts, total) for values, counts in ((values_a, counts_a), (values_b, counts_b))
    )
    cuts = np.sort(np.concatenate([ranks_x, ranks_y]))
    counts = np.diff(cuts, prepend=0.0)
    middle = cuts - counts / 2
    at_x, at_y = (np.searchsorted(ranks, middle) for ranks in (ranks_x, ranks_y))
    return x[np.minimum(at_x, len(x) - 1)], y[np.minimum(at_y, len(y) - 1)], counts


def _quantile_function(values: np.ndarray, counts: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in ascending order, and the number of eigenvalues up to and including each; `total` for the last.

    Dimensions that only the other spectrum samples are added with the mean value, which is 0.
    """
    values, counts = np.append(values, 0.0), np.append(counts, max(total - counts.sum(), 0.0))
    order = np.argsort(values, kind="stable")
    ranks = np.cumsum(counts[order])
    return values[order], ranks * (total / ranks[-1])
