"""How far from zero the signs of the eigenvalues are known, where the share below zero itself is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates.band import known_below, sampled_below
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile
from spectra.estimates.measure import SpectralMeasure
from spectra.estimates.shares import share_inside

DECADES = 8  # below the largest |lambda|, down to which the threshold is looked for


@dataclass(frozen=True)
class DecidedSigns:
    """The shares of eigenvalues whose sign is known because they lie far enough from zero.

    Attributes:
        beyond: The threshold t, in the units of the eigenvalues; inf where no threshold was found.
        below: The share of eigenvalues with lambda < -t.
        above: The share with lambda > t.

    Example:
        >>> from spectra.estimates.density import SpectralDensity
        >>> density = SpectralDensity.from_eigenvalues(np.array([-4.0, 0.5, 3.0, 5.0]), rounding_error=0.55)
        >>> print(density.decided_signs())
        beyond +-1.1: 25 % below, 50 % above; the rest undecided
    """

    beyond: float
    below: Estimate
    above: Estimate

    def __str__(self) -> str:
        shares = f"{_percent(self.below.value)} below, {_percent(self.above.value)} above"
        return f"beyond +-{self.beyond:.2g}: {shares}; the rest undecided"


def decided_signs(measure: SpectralMeasure, half_width: float = RESOLVED_HALF_WIDTH) -> DecidedSigns:
    """Find the least t for which the shares below -t and above t are each known.

    The threshold is 0 or a number of two digits. Bounds that a few quadrature rules give at all of them find it; the
    intervals of `share_inside` are no wider, and they are returned.

    Args:
        measure: What the probe vectors saw.
        half_width: How well each share is known, as the half-width of its 95 % interval.

    Returns:
        The threshold and both shares.
    """
    candidates = _candidates(measure)
    for t in candidates[_half_widths(measure, candidates) <= half_width].tolist():
        found = DecidedSigns(t, share_inside(measure, -math.inf, -t), share_inside(measure, t, math.inf))
        if max(found.below.half_width, found.above.half_width) <= half_width:
            return found
    return DecidedSigns(math.inf, Estimate(0.0, 0.0, 0.0), Estimate(0.0, 0.0, 0.0))


def with_decided_signs(share: Estimate, measure: SpectralMeasure) -> Estimate:
    """Say in the reason of an unresolved negative share which signs are known.

    Args:
        share: The share of negative eigenvalues.
        measure: What the probe vectors saw.

    Returns:
        The share, as it is where it is resolved or no sign is known.
    """
    if share.resolved:
        return share
    found = decided_signs(measure)
    return share if math.isinf(found.beyond) else replace(share, reason=f"{share.reason}; {found}")


def _candidates(measure: SpectralMeasure) -> np.ndarray:
    """0 and the numbers of two digits up to the largest |lambda|, rounded up."""
    if measure.radius == 0:
        return np.zeros(1)
    last = math.floor(math.log10(measure.radius))
    numbers = [float(f"{digits}e{power}") for power in range(last - DECADES, last + 1) for digits in range(10, 100)]
    return np.array([0.0, *numbers[: np.searchsorted(numbers, measure.radius) + 1]])


def _half_widths(measure: SpectralMeasure, thresholds: np.ndarray) -> np.ndarray:
    """The larger half-width, for each t, of the shares below -t and above t, as `share_inside` makes them."""
    n, total = measure.sampled_dimension, measure.dimension
    both = np.concatenate([-thresholds, thresholds])
    low, high = sampled_below(measure, both, exactly_at=np.zeros(1))
    if measure.jacobi.used:
        widest = np.clip(0.5, low, high)
        error = normal_quantile() * np.sqrt(2 * widest * (1 - widest) / ((n + 2) * len(measure.jacobi.used)))
        low, high = np.maximum(low - error, 0.0), np.minimum(high + error, 1.0)
    certainly, possibly = known_below(measure, both)
    return (possibly - certainly + n * (high - low)).reshape(2, -1).max(axis=0) / total / 2


def _percent(share: float) -> str:
    """A share in percent with two digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
