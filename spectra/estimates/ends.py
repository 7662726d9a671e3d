"""The largest and the smallest eigenvalue, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.estimates.estimate import Estimate, negated
from spectra.estimates.measure import KnownEigenvalues, SpectralMeasure

ROUNDING_FACTOR = 16  # of one product's rounding error: a recurrence and an eigensolver add theirs
RESOLVED_END = 0.05  # relative half-width up to which an extreme eigenvalue counts as resolved


def largest_eigenvalue(measure: SpectralMeasure) -> Estimate:
    """Estimate the largest eigenvalue.

    A Ritz value never passes the end of the spectrum, so the largest one is a lower bound, less rounding. Above it the
    interval has room for what has not converged: the residual norm of that Ritz pair, and its distance to the median
    over probe vectors. A deflated eigenvalue is known to within its residual norm, and the inexact vectors it was
    deflated with shift the others (`KnownEigenvalues.deflation_shift`).

    Args:
        measure: What the probe vectors saw.

    Returns:
        The eigenvalue; unresolved where its half-width is above 5 % of it.
    """
    ends = _Ends(
        np.array([rule.nodes[-1] for rule in measure.rules]),
        np.array([rule.nodes[0] for rule in measure.rules]),
        np.array([residuals[-1] for residuals in measure.residuals]),
    )
    return _largest(ends, measure.known, measure.rounding_error)


def smallest_eigenvalue(measure: SpectralMeasure) -> Estimate:
    """Estimate the smallest eigenvalue, as minus the largest one of -A (see `largest_eigenvalue`)."""
    ends = _Ends(
        np.array([-rule.nodes[0] for rule in measure.rules]),
        np.array([-rule.nodes[-1] for rule in measure.rules]),
        np.array([residuals[0] for residuals in measure.residuals]),
    )
    return negated(_largest(ends, measure.known.negated(), measure.rounding_error))


@dataclass(frozen=True)
class _Ends:
    """Of each probe vector's rule: the largest node, the smallest one, and the residual norm of the largest."""

    largest: np.ndarray
    smallest: np.ndarray
    residuals: np.ndarray


def _largest(ends: _Ends, known: KnownEigenvalues, rounding_error: float) -> Estimate:
    rounding = ROUNDING_FACTOR * rounding_error
    # value, room below and room above of each candidate for the largest eigenvalue
    candidates = [(float(value), float(r), float(r)) for value, r in zip(known.values, known.errors, strict=True)]
    if len(ends.largest):
        best = int(ends.largest.argmax())
        end = float(ends.largest[best])
        unconverged = max(float(ends.residuals[best]), float(ends.largest[best] - np.median(ends.largest)))
        rounding += known.deflation_shift(end)
        candidates.append((end, rounding, unconverged + rounding))
    value, below, _ = max(candidates)
    low, high = value - below, max(value + above for value, _, above in candidates)
    scale = max(abs(value), *(float(np.abs(seen).max(initial=0.0)) for seen in (ends.smallest, known.values)))
    if (high - low) / 2 <= max(RESOLVED_END * abs(value), 1e-6 * scale):
        return Estimate(value, low, high)
    return Estimate(value, low, high, False, "the end of the spectrum has not converged: use more steps, or topk")
