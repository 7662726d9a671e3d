"""The axis of eigenvalues: its range, its scale, and points as it shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.quantities import EIGENVALUE_UNIT
from spectra.views.curves import Curve
from spectra.views.style import AXIS_COLOUR, symlog_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALES = ("auto", "linear", "symlog")
MARGIN = 0.02  # of the axis, beyond the smallest and the largest eigenvalue


@dataclass(frozen=True)
class EigenvalueAxis:
    """An axis of eigenvalues.

    Attributes:
        low: The smallest eigenvalue shown.
        high: The largest.
        threshold: Where a symmetric-log axis turns from linear to logarithmic; None for a linear axis.
    """

    low: float
    high: float
    threshold: float | None

    def positions(self, values: np.ndarray) -> np.ndarray:
        """Where the axis shows values, in units of its own, which are evenly spaced."""
        return values if self.threshold is None else np.arcsinh(values / self.threshold)

    def between(self, low: float, high: float, points: int) -> np.ndarray:
        """Points from one value to another, evenly spaced as the axis shows them, (points,)."""
        first, last = self.positions(np.array([low, high])).tolist()
        middle = np.linspace(first, last, points)
        values = middle if self.threshold is None else self.threshold * np.sinh(middle)
        values[0], values[-1] = low, high
        return values

    def apply(self, ax: Axes) -> None:
        """Give the x axis this range and scale, its name, and a line at zero."""
        low, high = self.positions(np.array([self.low, self.high]))
        margin = MARGIN * (high - low)
        ends = np.array([low - margin, high + margin])
        left, right = ends if self.threshold is None else self.threshold * np.sinh(ends)
        if self.threshold is not None:
            symlog_axis(ax, left, right, self.threshold)
        ax.set_xlim(left, right)
        ax.set_xlabel(f"eigenvalue λ ({EIGENVALUE_UNIT})")
        ax.axvline(0, color=AXIS_COLOUR, linewidth=0.8, zorder=0.5)


def eigenvalue_axis(curves: Sequence[Curve], scale: str) -> EigenvalueAxis:
    """The axis that shows all eigenvalues of some spectra.

    Args:
        curves: The spectra.
        scale: "linear", "symlog" or "auto".

    Returns:
        The axis, from the lower end of the smallest eigenvalue's interval to the upper end of the largest one's.

    Raises:
        InputError: The scale is not known.
    """
    if scale not in SCALES:
        raise InputError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}")
    threshold = None if scale == "linear" else _linear_threshold(curves, always=scale == "symlog")
    ends = [ends_of(curve) for curve in curves]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = -1.0, 1.0
    return EigenvalueAxis(low, high, threshold)


def ends_of(curve: Curve) -> tuple[float, float]:
    """The smallest and the largest eigenvalue as far as their intervals reach."""
    low, high = curve.density.lambda_min(), curve.density.lambda_max()
    ends = low.low if math.isfinite(low.low) else low.value, high.high if math.isfinite(high.high) else high.value
    return min(ends), max(ends)


def _linear_threshold(curves: Sequence[Curve], *, always: bool) -> float | None:
    """Where a symmetric-log axis turns linear: the power of ten that is nearest to the median size of an eigenvalue.

    None where the largest eigenvalue is within a hundred times the median size, which a linear axis shows well.
    """
    medians = []
    for curve in curves:
        used = (curve.density.weights > 0) & (curve.density.nodes != 0)
        sizes, weights = np.abs(curve.density.nodes[used]), curve.density.weights[used]
        if len(sizes):
            order = sizes.argsort()
            medians.append(sizes[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)])
    largest = max(float(np.abs(curve.density.nodes).max()) for curve in curves)
    if largest == 0 or not medians:
        return None
    typical = max(float(np.median(medians)), 1e-8 * largest)
    if largest < 100 * typical and not always:
        return None
    return 10.0 ** min(round(math.log10(typical)), math.floor(math.log10(largest)) - 1)
