"""The share of eigenvalues in an interval, estimated from quadrature rules with rigorous bounds on their error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates.brackets import Bracket, bracket
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile
from spectra.estimates.measure import KnownEigenvalues, SpectralMeasure

# Smallest ratio of the changes at two doublings of the Lanczos steps at which an extrapolation is made. For a smooth
# measure the ratio is 2, because the weight of a Radau node halves at each doubling.
SETTLED_RATIO = 1.5


def share_inside(measure: SpectralMeasure, low: float, high: float) -> Estimate:
    """Estimate the share of eigenvalues with low < lambda < high.

    The interval adds up these errors:

    * The Chebyshev-Markov-Stieltjes bracket at each bound, averaged over probe vectors. It contains the mass of every
      spectrum that agrees with the finite recurrence.
    * The rounding error: the brackets are also taken at bounds that are moved by it outward and inward.
    * The sampling error, whose variance is known: 2 p (1 - p) / ((n + 2) k) for a share p of n eigenvalues and k probe
      vectors that are uniform on the sphere.
    * Each known eigenvalue that lies within its error of a bound.

    The value is the difference of the middles of the brackets, without the estimated mass exactly at a bound.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        low: Lower bound, exclusive; may be -inf.
        high: Upper bound, exclusive; may be inf.

    Returns:
        The share, unresolved where its half-width is above .05.
    """
    n, total = measure.sampled_dimension, measure.dimension
    known = _count_known(measure.known, low, high)
    if n == 0 or not measure.jacobi.used:
        estimate = Estimate(known.by_value / total, known.certainly / total, known.possibly / total)
        return _unresolved_if_wide(estimate, "eigenvalues lie within the rounding error of a bound")
    sampled = _sampled_share(measure, low, high)
    value = (known.by_value + n * sampled.value) / total
    lower = min((known.certainly + n * sampled.low) / total, value)
    upper = max((known.possibly + n * sampled.high) / total, value)
    return _unresolved_if_wide(Estimate(value, lower, upper), sampled.reason)


def _unresolved_if_wide(estimate: Estimate, reason: str) -> Estimate:
    """Mark the estimate unresolved for the given reason if its interval is too wide."""
    if estimate.half_width <= RESOLVED_HALF_WIDTH:
        return estimate
    return replace(estimate, resolved=False, reason=reason)


@dataclass(frozen=True)
class _KnownCounts:
    """How many known eigenvalues lie inside an interval: by their values, for certain, and possibly."""

    by_value: float
    certainly: float
    possibly: float


def _count_known(known: KnownEigenvalues, low: float, high: float) -> _KnownCounts:
    """Count the known eigenvalues inside (low, high), with multiplicity."""
    values, errors = known.values, known.errors
    inside = (values > low) & (values < high)
    certainly = (values - errors > low) & (values + errors < high) & inside
    possibly = inside | ((errors > 0) & (values + errors > low) & (values - errors < high))
    return _KnownCounts(*(float(known.counts[chosen].sum()) for chosen in (inside, certainly, possibly)))


def _sampled_share(measure: SpectralMeasure, low: float, high: float) -> Estimate:
    """The share of the sampled space inside (low, high); `reason` names the larger part of the interval."""
    n, probes = measure.sampled_dimension, len(measure.jacobi.used)
    at_low, at_high = (_mass_below(measure, bound) for bound in (low, high))
    value = max(at_high.below - at_low.up_to, 0.0)
    lower, upper = max(at_high.low - at_low.high, 0.0), min(at_high.high - at_low.low, 1.0)
    widest = min(max(0.5, lower), upper)  # the share in [lower, upper] with the largest sampling error
    sampling_error = normal_quantile() * math.sqrt(2 * widest * (1 - widest) / ((n + 2) * probes))
    if math.isinf(low) and math.isinf(high):
        sampling_error = 0.0
    unplaced = (at_high.high - at_high.low + at_low.high - at_low.low) / 2
    if unplaced > sampling_error:
        steps = max(len(alphas) for alphas, _ in measure.jacobi.used)
        remedy = "use more steps" if measure.known.any_deflated else "use more steps, or deflate"
        share = f"{min(2 * unplaced, 1):.0%}".replace("%", " %")
        reason = f"{steps} Lanczos steps do not say whether {share} of the eigenvalues lie inside the bounds: {remedy}"
    else:
        reason = f"the sampling error of {probes} probe vectors is +-{sampling_error:.2f}: use more probe vectors"
    return Estimate(value, max(lower - sampling_error, 0.0), min(upper + sampling_error, 1.0), reason=reason)


@dataclass(frozen=True)
class _MassBelow:
    """The mass of the sampled space below a bound, averaged over probe vectors.

    Attributes:
        below: Estimate of the mass below the bound.
        up_to: Estimate of the mass below and at the bound; larger than `below` by an atom of the measure there.
        low: Lower bound of the mass below, which holds in exact arithmetic.
        high: Upper bound of the mass below and at the bound.
    """

    below: float
    up_to: float
    low: float
    high: float


def _mass_below(measure: SpectralMeasure, bound: float) -> _MassBelow:
    """The mass below a bound, averaged over probe vectors."""
    if math.isinf(bound):
        mass = 0.0 if bound < 0 else 1.0
        return _MassBelow(mass, mass, mass, mass)
    shift = measure.rounding_error + measure.known.deflation_shift(0.0)
    each = [_mass_below_of_probe(alphas, betas, bound, shift) for alphas, betas in measure.jacobi.used]
    return _MassBelow(*(float(np.mean(part)) for part in zip(*each, strict=True)))


def _mass_below_of_probe(
    alphas: np.ndarray, betas: np.ndarray, bound: float, shift: float
) -> tuple[float, float, float, float]:
    """The fields of `_MassBelow` for one probe vector, whose eigenvalues may have been moved by up to `shift`."""
    here = bracket(alphas, betas, bound)
    left = bracket(alphas, betas, bound - shift) if shift > 0 else here
    right = bracket(alphas, betas, bound + shift) if shift > 0 else here
    atom = _atom_at(alphas, betas, bound, here)
    middle = here.below + here.at / 2
    low, high = min(here.below, left.below), max(here.below + here.at, right.below + right.at)
    return middle - atom / 2, middle + atom / 2, low, high


def _atom_at(alphas: np.ndarray, betas: np.ndarray, bound: float, here: Bracket) -> float:
    """Estimate the mass that sits exactly at the bound.

    With the number m of Lanczos steps, the weight of the Radau node at the bound falls like 1/m where the measure is
    smooth. Where the measure has an atom, the weight tends to the atom's mass. Aitken extrapolation from m/4, m/2 and m
    steps estimates that limit. Where the weight does not converge, as for a density over many decades around the bound,
    the estimate is 0.
    """
    if betas[-1] <= 0:
        return here.at
    quarter, half = (
        bracket(alphas[:m], betas[:m], bound).at if m else 1.0 for m in (len(alphas) // 4, len(alphas) // 2)
    )
    ratio = (quarter - half) / (half - here.at) if half > here.at else 0.0
    if ratio < SETTLED_RATIO:
        return 0.0
    return float(np.clip(here.at - (half - here.at) / (ratio - 1), 0.0, here.at))
