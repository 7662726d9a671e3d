"""How far from zero the signs of the eigenvalues are known, for spectra whose negative share is unresolved."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates.band import known_below, sampled_below
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile
from spectra.estimates.measure import SpectralMeasure
from spectra.estimates.shares import share_inside

DECADES = 8  # decades below the largest |lambda| in which the threshold is searched


@dataclass(frozen=True)
class DecidedSigns:
    """The shares of eigenvalues whose sign is known because they lie far enough from zero.

    Attributes:
        beyond: The threshold t, in the units of the eigenvalues; inf if there is none.
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
    """Find the smallest threshold t for which the shares below -t and above t both have a narrow interval.

    The threshold is 0 or a number of two digits. A few quadrature rules bound the shares at all these numbers, and show
    which thresholds are possible. The shares at the threshold found then come from `share_inside`, whose intervals are
    no wider.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        half_width: Largest half-width of the 95 % interval of each share.

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
    """Add to the reason of an unresolved negative share which signs are known.

    Args:
        share: The share of negative eigenvalues.
        measure: The Jacobi matrices and the known eigenvalues.

    Returns:
        The share with the longer reason; unchanged if it is resolved or no sign is known.
    """
    if share.resolved:
        return share
    found = decided_signs(measure)
    return share if math.isinf(found.beyond) else replace(share, reason=f"{share.reason}; {found}")


def _candidates(measure: SpectralMeasure) -> np.ndarray:
    """The possible thresholds: 0, and the numbers of two digits up to the largest |lambda|, rounded up."""
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
