"""How many eigenvalues lie beyond a threshold, from the mass of the probe vectors beyond it: bounds sharp for few."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GROWTH = 1.15  # ratio of neighbouring counts at which the mass is bounded
NO_MASS = 1e-12  # mass up to which rounding error may be all there is


@dataclass(frozen=True, eq=False)
class TailBounds:
    """Bounds on the mean mass of probe vectors on the j outermost of n eigenvectors, for some j.

    Attributes:
        dimension: The number n of eigenvalues.
        counts: (l,) ascending values of j.
        least: (l,) the mass is at least this.
        most: (l,) the mass is at most this.
    """

    dimension: int
    counts: np.ndarray
    least: np.ndarray
    most: np.ndarray

    def count(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bound the number of eigenvalues beyond thresholds.

        Args:
            low: (g,) lower bounds of the mean mass beyond each threshold.
            high: (g,) upper bounds.

        Returns:
            Lower and upper bounds of the numbers of eigenvalues, (g,) each.
        """
        too_few = np.searchsorted(self.most, low, side="left")  # so many of the counts have less mass than there is
        too_many = np.searchsorted(self.least, high, side="right")  # from here on they have more
        fewest = np.where(too_few > 0, np.append(0, self.counts)[too_few] + 1, (low > NO_MASS).astype(int))
        return fewest, np.append(self.counts - 1, self.dimension)[too_many]


def tail_bounds(dimension: int, probes: int, failure: float) -> TailBounds:
    """Bound the mean mass of k probe vectors on the j outermost of n eigenvectors, at both ends and for all j at once.

    The mass M_j of a uniform unit vector has the beta distribution with parameters j/2 and (n - j)/2. The mean over
    probe vectors is smaller in convex order than a chi-squared variable with k j degrees of freedom over k n: the mean
    of beta variables is a conditional expectation of their weighted mean, which has the beta distribution with
    parameters k j/2 and k (n - j)/2, and that is a conditional expectation of the gamma variable. So Chernoff's bound
    of the chi-squared distribution holds, for every n and k: with x > 1, and with <= for x < 1,

        P(mean M_j >= x j / n) <= exp(-(k j / 2) (x - 1 - log x)).

    A union bound over geometrically spaced j, both signs and both ends of the spectrum makes it hold at all of these.
    Between them M_j is monotonic. The relative error for a few eigenvalues is that of a chi-squared variable, where
    `simultaneous_error` would leave them below an error of order sqrt(n / k).

    Args:
        dimension: The dimension n of the space that the probe vectors were drawn from.
        probes: The number k of probe vectors.
        failure: The probability, at most, that some bound fails.

    Returns:
        The bounds, which are the same for the smallest and for the largest eigenvalues.
    """
    from scipy.special import lambertw  # half a second to load, needed for curves only

    steps = np.arange(math.ceil(math.log(max(dimension, 1)) / math.log(GROWTH)) + 1)
    counts = np.unique(np.minimum(np.round(GROWTH**steps), dimension).astype(int))
    exponent = math.log(4 * len(counts) / failure) * 2 / (probes * counts)
    argument = -np.exp(-1 - exponent)  # x - 1 - log x = c where x = -W(-exp(-1 - c))
    least, most = (-np.real(lambertw(argument, branch)) * counts / dimension for branch in (0, -1))
    return TailBounds(dimension, counts, np.maximum.accumulate(least), np.minimum.accumulate(most[::-1])[::-1])
