"""The axis of eigenvalues on a screen: a scale, the range that one has zoomed to, points and ticks in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectra.backend.errors import InputError
from spectra.runs.record import SpectrumRecord
from spectra.views.axis import EigenvalueAxis, eigenvalue_axis
from spectra.views.curves import Curve

SCALES = ("symlog", "linear", "log")
LOG_DECADES = 3  # below the size where a symmetric-log axis turns linear, at which a logarithmic one begins
MOST_TICKS = 9
FEWEST_TICKS = 3


@dataclass(frozen=True)
class ScreenAxis:
    """An axis of eigenvalues, and the part of it that is seen.

    Attributes:
        scale: "symlog", "linear", or "log", which shows positive eigenvalues alone.
        threshold: Where a symmetric-log axis turns from linear to logarithmic.
        whole: The smallest and the largest eigenvalue of the axis.
        seen: The smallest and the largest eigenvalue that are seen.
    """

    scale: str
    threshold: float
    whole: tuple[float, float]
    seen: tuple[float, float]

    def positions(self, values: np.ndarray) -> np.ndarray:
        """Where eigenvalues stand on the screen, in units that are evenly spaced there."""
        if self.scale == "linear":
            return values
        if self.scale == "symlog":
            return np.arcsinh(values / self.threshold)
        return np.log10(np.maximum(values, np.finfo(float).tiny))

    def values(self, positions: np.ndarray) -> np.ndarray:
        """The eigenvalues at positions on the screen."""
        if self.scale == "linear":
            return positions
        return self.threshold * np.sinh(positions) if self.scale == "symlog" else 10.0**positions

    def zoomed(self, low: float, high: float) -> ScreenAxis:
        """The axis that shows the eigenvalues from one to another.

        Args:
            low: The smallest eigenvalue seen.
            high: The largest.

        Returns:
            The axis.

        Raises:
            InputError: Unless low < high, and 0 < low on a logarithmic axis.
        """
        if not (low < high and math.isfinite(high - low)):
            raise InputError(f"a range with low < high is expected, got [{low}, {high}]")
        if self.scale == "log" and low <= 0:
            raise InputError(f"a logarithmic axis shows positive eigenvalues, got a range from {low}")
        return replace(self, seen=(low, high))

    def points(self, count: int) -> np.ndarray:
        """Points over the part that is seen, evenly spaced on the screen, with both sides of zero; fewer outside it.

        The points outside let one zoom out and move before they are computed anew.

        Args:
            count: How many points are seen.

        Returns:
            (p,) ascending eigenvalues.
        """
        at_zero = np.array([0.0, np.nextafter(0.0, 1.0)])  # known zeros are a step
        both = [self._between(self.seen, count), self._between(self.whole, max(count // 4, 2)), at_zero]
        return np.unique(np.concatenate(both if self.scale != "log" else both[:2]))

    def ticks(self) -> tuple[np.ndarray, list[str]]:
        """Eigenvalues at which the axis has ticks, and their names.

        Decades where three of them are seen, else their multiples by 1, 2 and 5, else evenly spaced round numbers.
        """
        low, high = self.seen
        values = np.zeros(0)
        if self.scale != "linear":
            first, last = self._decades()
            for multiples in ((1.0,), (1.0, 2.0, 5.0)):
                sizes = np.array([m * 10.0**k for k in range(first, last + 1) for m in multiples])
                candidates = sizes if self.scale == "log" else np.concatenate([-sizes[::-1], [0.0], sizes])
                values = candidates[(candidates >= low) & (candidates <= high)]
                if len(values) >= FEWEST_TICKS:
                    break
        if len(values) < FEWEST_TICKS:
            values = _round_numbers(low, high)
        if len(values) > MOST_TICKS:
            stride = math.ceil(len(values) / MOST_TICKS)
            centre = int(np.abs(values).argmin()) if self.scale == "symlog" else 0
            values = values[centre % stride :: stride]
        return values, [f"{value:.6g}".replace("-", "−") for value in values]

    def _decades(self) -> tuple[int, int]:
        """The exponents of the smallest and the largest power of ten that may have a tick."""
        low, high = self.seen
        largest = max(abs(low), abs(high))
        smallest = self.threshold if self.scale == "symlog" else low
        return math.floor(math.log10(smallest)), max(math.ceil(math.log10(largest)), math.floor(math.log10(smallest)))

    def _between(self, ends: tuple[float, float], count: int) -> np.ndarray:
        """Points from one eigenvalue to another, evenly spaced on the screen."""
        first, last = self.positions(np.array(ends)).tolist()
        values = self.values(np.linspace(first, last, count))
        values[0], values[-1] = ends
        return values


def screen_axis(curves: Sequence[Curve], records: Sequence[SpectrumRecord], scale: str) -> ScreenAxis:
    """The axis that shows all eigenvalues of some spectra, and those that their records reach.

    Args:
        curves: Spectra, whose median size of eigenvalues sets where a symmetric-log axis turns.
        records: The records of these and further spectra. The axis reaches as far as their smallest and largest
            eigenvalues do, so that it stays as it is from step to step.
        scale: "symlog", "linear" or "log".

    Returns:
        The axis, of which all is seen.

    Raises:
        InputError: The scale is not known.
    """
    if scale not in SCALES:
        raise InputError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}")
    axis = eigenvalue_axis(curves, "symlog")
    ends = [axis.low, axis.high, *_ends(records)]
    low, high = min(ends), max(ends)
    threshold = _threshold(axis)
    if scale == "log":
        low = threshold * 10.0**-LOG_DECADES
        high = max(high, 10 * threshold)
    return ScreenAxis(scale, threshold, (low, high), (low, high))


def _threshold(axis: EigenvalueAxis) -> float:
    """Where the symmetric-log axis turns; a thousandth of the largest eigenvalue where the spectra have no median."""
    return axis.threshold or 1e-3 * max(abs(axis.low), abs(axis.high))


def _ends(records: Sequence[SpectrumRecord]) -> list[float]:
    """The finite ends of the intervals of the smallest and the largest eigenvalues."""
    ends = []
    for record in records:
        for name in ("lambda_min", "lambda_max"):
            if (found := record.estimates.get(name)) is not None:
                ends += [found.low, found.high, found.value]
    return [end for end in ends if math.isfinite(end)]


def _round_numbers(low: float, high: float) -> np.ndarray:
    """Between three and nine evenly spaced numbers of few digits."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= raw)
    return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)
