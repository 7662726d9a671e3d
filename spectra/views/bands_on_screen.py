"""The band of a cumulative share at the points of a screen, and what is said of each point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate
from spectra.estimates.sharp_band import sharp_band


@dataclass(frozen=True, eq=False)
class BandOnScreen:
    """A band of the share of eigenvalues below each point.

    Attributes:
        points: (p,) ascending eigenvalues.
        low: (p,) lower bounds of the share of eigenvalues below each point.
        high: (p,) upper bounds.
        dimension: The number of all eigenvalues.
    """

    points: np.ndarray
    low: np.ndarray
    high: np.ndarray
    dimension: int

    @property
    def middle(self) -> np.ndarray:
        """(p,) the middle of the band where its half-width is at most .05, NaN where the share is not resolved."""
        return np.where(self.high - self.low <= 2 * RESOLVED_HALF_WIDTH, (self.low + self.high) / 2, np.nan)

    def words(self) -> list[str]:
        """For each point the eigenvalue, the share below it with its interval, and the number above it."""
        resolved = ~np.isnan(self.middle)
        rows = zip(self.points.tolist(), self.low.tolist(), self.high.tolist(), resolved.tolist(), strict=True)
        return [self._words(*row) for row in rows]

    def _words(self, point: float, low: float, high: float, resolved: bool) -> str:
        """What is said of one point. A share that is not resolved has no value, only an interval."""
        share = Estimate((low + high) / 2, low, high)
        _, least, most = share.rounded()
        below = str(share) if resolved else f"between {least} and {most}, not resolved"
        n = self.dimension
        fewest, most_above = math.ceil((1 - high) * n - 1e-6), math.floor((1 - low) * n + 1e-6)
        above = f"{fewest:,}" if fewest == most_above else f"{fewest:,} to {most_above:,}"
        return f"λ = {point:.4g}<br>share below: {below}<br>eigenvalues from here on: {above} of {n:,}"


def band_on_screen(density: SpectralDensity, points: np.ndarray, *, level: float) -> BandOnScreen:
    """Bound the share of eigenvalues below points, from the Lanczos matrices alone.

    The band holds at all thresholds at once, so it may be read at other points after one has looked at it.

    Args:
        density: The spectrum.
        points: (p,) ascending eigenvalues.
        level: The probability that the whole curve lies inside the band.

    Returns:
        The band.
    """
    low, high = sharp_band(density, level=level, thresholds=points).at(points)
    return BandOnScreen(points, low, high, density.dimension)
