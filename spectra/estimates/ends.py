"""The largest and the smallest eigenvalue, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.estimates.estimate import Estimate, negated
from spectra.estimates.measure import KnownEigenvalues, SpectralMeasure

ROUNDING_FACTOR = 16  # on the rounding error of a product: the recurrence and the eigensolver add theirs
RESOLVED_END = 0.05  # relative half-width up to which an extreme eigenvalue counts as resolved


def largest_eigenvalue(measure: SpectralMeasure) -> Estimate:
    """Estimate the largest eigenvalue.

    Apart from rounding error, a Ritz value never exceeds the largest eigenvalue, so the largest Ritz value is a lower
    bound. The interval extends above it by what has not converged: the residual norm of that Ritz pair, or its distance
    to the median over probe vectors if that is larger. A deflated eigenvalue is known to within its residual norm.
    Deflation with inexact eigenvectors shifts the other eigenvalues (`KnownEigenvalues.deflation_shift`).

    Args:
        measure: The Jacobi matrices and the known eigenvalues.

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
    """The largest node of each probe vector's rule, its smallest node, and the residual norm of the largest."""

    largest: np.ndarray
    smallest: np.ndarray
    residuals: np.ndarray


def _largest(ends: _Ends, known: KnownEigenvalues, rounding_error: float) -> Estimate:
    """The largest of the nodes and the known eigenvalues, with its interval."""
    rounding = ROUNDING_FACTOR * rounding_error
    # each candidate for the largest eigenvalue: its value, and how far the interval extends below and above
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
