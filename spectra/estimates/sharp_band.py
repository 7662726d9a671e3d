"""The narrowest band of the cumulative share that a density allows, for figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.band import CumulativeBand, cumulative_band
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import CONFIDENCE, Estimate

COUNT_PART = 0.2  # part of the probability of a failure that the count below zero takes


def sharp_band(
    density: SpectralDensity, *, level: float = CONFIDENCE, thresholds: np.ndarray, zeros: bool = True
) -> CumulativeBand:
    """Bound the share of eigenvalues below t for all t at once, with all that is known of them.

    To `SpectralDensity.band` it adds the sharper bounds of few eigenvalues (`tail_counts`), and the count below zero
    after a change of variables where the density has one. The count takes a fifth of the probability of a failure.

    Args:
        density: The density.
        level: The probability that the whole curve lies inside the band.
        thresholds: (p,) thresholds that the band has among others.
        zeros: Whether known zeros count. If not, the shares are those of the other eigenvalues.

    Returns:
        The band.

    Raises:
        InputError: If the level is outside (0, 1).

    Example:
        >>> density = SpectralDensity.from_eigenvalues(np.array([-1.0, 0.0, 1.0]))
        >>> low, high = sharp_band(density, thresholds=np.array([0.5]), zeros=False).at(np.array([0.5]))
        >>> low.tolist(), high.tolist()
        ([0.5], [0.5])
    """
    zero_share = density.zero_share()
    measured = density if zeros or not zero_share else density.without_known_zeros()
    if density.count is not None and 0 < level < 1:
        failure = COUNT_PART * (1 - level)
        ends = cumulative_band(density.count.measure, level=1 - failure).at(np.zeros(1))
        low, high = (float(end[0]) * density.dimension / measured.dimension for end in ends)
        known = {0.0: Estimate((low + high) / 2, low, min(high, 1.0))}
        try:
            band = measured.band(level + failure, known=known, thresholds=thresholds, tails=True)
            return replace(band, level=level)
        except InputError:  # one of the two has failed, as they do with probability 1 - level
            pass
    return measured.band(level, thresholds=thresholds, tails=True)
