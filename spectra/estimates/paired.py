"""Intervals of a difference between two spectra, narrower where both were seen by the same probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates import moments
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate, normal_quantile, sampling_interval, student_interval

Limits = Callable[[float], tuple[float, float]]  # factor > 0 -> the interval of after - factor * before


MOST_SKEWED = math.sqrt(8)  # of one eigenvalue alone, whose weight is chi-squared with one degree of freedom


POWERS = {"negative_energy_share": 2, "negative_magnitude_share": 1}


def difference_of_intervals(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """What holds however the two depend on each other."""
    return after.low - factor * before.high, after.high - factor * before.low


def independent_difference(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """Of independent estimates, side by side (Zou and Donner, Statistics in Medicine 27, 2008)."""
    difference = after.value - factor * before.value
    below = math.hypot(after.value - after.low, factor * (before.high - before.value))
    above = math.hypot(after.high - after.value, factor * (before.value - before.low))
    return difference - below, difference + above


@dataclass(frozen=True)
class MeanOverProbes:
    """A quantity as a mean over probes, linear in the measure that each probe saw.

    values: (k,) what each probe says, up to a constant. spectra: for each probe the eigenvalues (m,) of the matrix that
    the quantity is the trace of, centred, and how many (m,) of each. dimension: n of the sampled space. drift: by how
    much half the steps would have it otherwise. rounding: what the arithmetic may have lost.
    """

    estimate: Estimate
    values: np.ndarray
    spectra: list[tuple[np.ndarray, np.ndarray]]
    dimension: int
    drift: float
    rounding: float


class PairedMeans:
    """Two quantities seen by the same probes. a: before, b: after."""

    def __init__(self, a: MeanOverProbes, b: MeanOverProbes):
        self.a, self.b, self.count = a, b, len(a.values)
        self._n = max(a.dimension, b.dimension)
        each = [_coupled(x, y, self._n) for x, y in zip(a.spectra, b.spectra, strict=True)]
        self._before, self._after, self._counts = (np.concatenate(part) for part in zip(*each, strict=True))
        self._correlation = _correlation(a.values, b.values)

    def limits(self, factor: float) -> tuple[float, float]:
        """The interval of after - factor * before."""
        return self._limits(factor, factor)

    def ratio_limits(self, factor: float) -> tuple[float, float]:
        """The same where little is known of pairs: only what the measured ratio leaves of `after` varies as the pairs
        do, the rest is a multiple of `before`, whose variance is known."""
        return self._limits(factor, self.b.estimate.value / self.a.estimate.value)

    def _limits(self, factor: float, pivot: float) -> tuple[float, float]:
        a, b = self.a, self.b
        value = b.estimate.value - factor * a.estimate.value
        student = student_interval(b.values - pivot * a.values).half_width
        first, second = self._mean(self._before)[0], self._mean(self._after)[0]
        seen = max((pivot * first) ** 2 + second**2 - 2 * self._correlation * pivot * first * second, 0.0)
        half = max(student, normal_quantile() * math.sqrt(seen))
        half = math.hypot(half, normal_quantile() * (factor - pivot) * first)
        bound = sampling_interval(value, *self._mean(self._after - factor * self._before))
        room = abs(b.drift - factor * a.drift) + b.rounding + factor * a.rounding
        low, high = min(bound.low, value - half) - room, max(bound.high, value + half) + room
        lowest, highest = difference_of_intervals(a.estimate, b.estimate, factor)
        return max(low, lowest), min(high, highest)

    def _mean(self, eigenvalues: np.ndarray) -> tuple[float, float]:
        """Standard deviation and skewness of the mean over probes of v . D v, from D's centred eigenvalues."""
        n, counts = self._n, self._counts / self.count
        variance = 2 * n / (n + 2) * float(counts @ eigenvalues**2)
        if variance <= 0:
            return 0.0, 0.0
        third = 8 * n * n / ((n + 2) * (n + 4)) * float(counts @ eigenvalues**3)
        skewness = min(max(third / variance**1.5, -MOST_SKEWED), MOST_SKEWED)
        return math.sqrt(variance / self.count), skewness / math.sqrt(self.count)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / size, -1, 1)) if size > 0 else 0.0


def _coupled(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both spectra in ascending order, one eigenvalue of each beside the other, and how many there are of each pair."""
    (x, heights_x), (y, heights_y) = (_staircase(values, counts, total) for values, counts in (a, b))
    cuts = np.sort(np.concatenate([heights_x, heights_y]))
    counts = np.diff(cuts, prepend=0.0)
    middle = cuts - counts / 2
    at_x, at_y = (np.searchsorted(heights, middle) for heights in (heights_x, heights_y))
    return x[np.minimum(at_x, len(x) - 1)], y[np.minimum(at_y, len(y) - 1)], counts


def _staircase(values: np.ndarray, counts: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in ascending order and how many eigenvalues lie up to each, `total` in all: dimensions that only the other
    spectrum samples are added at the mean, 0."""
    values, counts = np.append(values, 0.0), np.append(counts, max(total - counts.sum(), 0.0))
    order = np.argsort(values, kind="stable")
    heights = np.cumsum(counts[order])
    return values[order], heights * (total / heights[-1])


def mean_over_probes(density: SpectralDensity, name: str, estimate: Estimate) -> MeanOverProbes:
    n = density.sampled
    function = _linearised(density, name, estimate)
    images = [function(rule.nodes) for rule in density.rules]
    values = np.array([rule.weights @ image for rule, image in zip(density.rules, images, strict=True)])
    spectra = [
        ((image - values.mean()) / n, n * rule.weights) for rule, image in zip(density.rules, images, strict=True)
    ]
    size = float(np.mean([rule.weights @ np.abs(image) for rule, image in zip(density.rules, images, strict=True)]))
    size += float(density.counts @ np.abs(function(density.atoms))) / n
    drift = _drift(density, name, estimate) if name in POWERS else 0.0
    return MeanOverProbes(estimate, values, spectra, n, drift, density.rounding * size)


def _linearised(density: SpectralDensity, name: str, estimate: Estimate) -> moments.Function:
    """The function whose mean over eigenvalues varies with the probes as the quantity does."""
    n = density.sampled
    if name == "trace":
        return lambda theta: n * theta
    if name in POWERS:
        power = POWERS[name]

        def whole(theta: np.ndarray) -> np.ndarray:
            return np.abs(theta) ** power

        known = (density.rules, n, density.atoms, density.counts)
        total = moments.sum_over_eigenvalues(whole, *known).value
        return lambda theta: n / (total or 1.0) * whole(theta) * ((theta < 0) - estimate.value)
    norm = density.frobenius().value
    scale = 2 * (norm or 1.0) * (math.sqrt(density.dimension) if name == "rms" else 1.0)
    return lambda theta: n * theta * theta / scale


def _drift(density: SpectralDensity, name: str, estimate: Estimate) -> float:
    """What half the steps would have changed."""
    halves = np.where(density.lengths > 0, np.maximum(density.lengths // 2, 1), 0)
    return estimate.value - getattr(replace(density, lengths=halves), name)().value
