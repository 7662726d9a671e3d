"""The share of eigenvalues below every threshold at once, as a band that holds the whole curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.brackets import mass_bounds
from spectra.estimates.estimate import CONFIDENCE, Estimate
from spectra.estimates.measure import SpectralMeasure
from spectra.estimates.tail_counts import tail_bounds

MOST_NODES = 400  # most quadrature nodes that become thresholds
DECADES, PER_DECADE = 8, 24  # decades, and thresholds in each, of the logarithmically spaced thresholds
TAIL_PART = 0.1  # part of the probability of a failure that the bounds on the tails take


@dataclass(frozen=True, eq=False)
class CumulativeBand:
    """Bounds on the share of eigenvalues below t, #{lambda < t} / n, that hold for all t at once.

    Attributes:
        thresholds: (g,) ascending, in the units of the eigenvalues.
        low: (g,) lower bounds of the share below each threshold, which never fall.
        high: (g,) upper bounds, which never fall.
        level: The probability, at least, that the whole curve lies inside.
        reason: Why the band cannot be relied on; empty if it can.

    Example:
        >>> from spectra.estimates.density import SpectralDensity
        >>> band = SpectralDensity.from_eigenvalues(np.array([-1.0, 1.0, 3.0, 5.0])).band()
        >>> low, high = band.at(np.array([0.0, 4.0]))
        >>> low.tolist(), high.tolist()
        ([0.25, 0.75], [0.25, 0.75])
    """

    thresholds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    reason: str = ""

    def at(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds at any thresholds. Between the thresholds of the band they follow from monotonicity.

        Args:
            thresholds: (p,) in the units of the eigenvalues.

        Returns:
            The lower and the upper bounds, (p,) each.
        """
        left = np.searchsorted(self.thresholds, thresholds, side="right")
        right = np.searchsorted(self.thresholds, thresholds, side="left")
        return np.append(0.0, self.low)[left], np.append(self.high, 1.0)[right]


def cumulative_band(
    measure: SpectralMeasure,
    *,
    level: float = CONFIDENCE,
    known: Mapping[float, Estimate] | None = None,
    thresholds: np.ndarray | None = None,
    tails: bool = False,
) -> CumulativeBand:
    """Bound the share of eigenvalues below t for all t at once.

    The band adds up three errors at every threshold:

    * The bracket of each probe vector's mass, averaged over probe vectors. It holds at all thresholds with certainty.
    * The rounding error: the bracket is taken at the threshold moved by it both ways.
    * The sampling error at all thresholds at once, see `simultaneous_error`.

    Eigenvalues that are known one by one are counted. If the error of one reaches across a threshold, it counts as
    possibly below.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        level: The probability that the whole curve lies inside the band, between 0 and 1.
        known: Intervals of the share below some thresholds from other measurements, by threshold. They narrow the band
            at other thresholds too, because the share is monotonic. Each may fail with probability .05, which is
            subtracted from the level of the band; an interval of width 0 is certain.
        thresholds: (p,) further thresholds of the band, such as the points of a figure.
        tails: Whether few eigenvalues beyond a threshold are counted with a relative error (`tail_counts`). The bounds
            take a tenth of the probability of a failure, so the error elsewhere is 1 to 2 % larger.

    Returns:
        The band.

    Raises:
        InputError: If the level is outside (0, 1), a threshold is not finite, or an interval misses the band.
    """
    if not 0 < level < 1:
        raise InputError(f"a level between 0 and 1 is expected, got {level}")
    known = known or {}
    if not all(math.isfinite(threshold) for threshold in known):
        raise InputError(f"finite thresholds are expected in known=, got {', '.join(map(str, known))}")
    total = measure.dimension
    exactly_at = np.array([0.0, *known])
    given = [] if thresholds is None else np.asarray(thresholds, dtype=float)
    thresholds = _thresholds(measure, np.concatenate([exactly_at, given]))
    fewest, most = _counted(measure, *sampled_below(measure, thresholds, exactly_at=exactly_at), level, tails=tails)
    certainly, possibly = known_below(measure, thresholds)
    low, high = _never_falling((certainly + fewest) / total, (possibly + most) / total)
    for threshold, share in sorted(known.items()):
        low, high = _cut(thresholds, low, high, threshold, share)
        level -= (1 - CONFIDENCE) if share.half_width > 0 else 0.0
    return CumulativeBand(thresholds, low, high, max(level, 0.0))


def simultaneous_error(dimension: int, probes: int, level: float) -> float:
    """Bound the difference between the mean mass of probe vectors and the share of eigenvalues, for all thresholds.

    Let W_i be the mass of a uniform unit vector on the first i of n eigenvectors. Its increments have the Dirichlet
    distribution with all parameters 1/2, whatever the eigenvalues are. So for i <= l

        E W_i = i / n,    Cov(W_i, W_l) = (2 / (n + 2)) (i / n) (1 - l / n).

    This is the covariance of a Brownian bridge at the times i / n, divided by N = (n + 2) / 2, as for the empirical
    distribution of N points. As the increments are exchangeable, the process tends to that bridge (Billingsley,
    Convergence of Probability Measures, 1968, theorem 24.2). The mean over k probe vectors has k N in place of N. So
    the error has the Kolmogorov-Smirnov distribution of k N points, whose tail Massart bounded (Ann. Probab. 18, 1990):

        P(max_i |mean W_i - i / n| > h) <= 2 exp(-2 k N h^2) = 2 exp(-k (n + 2) h^2).

    At a single i the bound holds for every n and k: a beta variable with parameters a and b is sub-Gaussian with
    variance proxy 1 / (4 (a + b + 1)) (Marchal and Arbel, Electron. Commun. Probab. 22, 2017), which here is
    1 / (2 (n + 2)). If all eigenvalues come in equal pairs, W is an order statistic of uniform points, and the bound is
    Massart's inequality. In general it holds for all i at once in the limit of large k n. Simulations for n from 2 to
    1,000, k from 1 to 20 and levels from .5 to .999 found no coverage below the level beyond the error of the
    simulation. The coverage tends to the level as n grows, so the bound is tight. A union bound over n + 1 thresholds
    would multiply the tail by n.

    Args:
        dimension: The dimension n of the space that the probe vectors were drawn from.
        probes: The number k of probe vectors.
        level: The probability that no threshold has a larger error.

    Returns:
        h, the largest error of a share of the n eigenvalues.
    """
    return math.sqrt(math.log(2 / (1 - level)) / (probes * (dimension + 2)))


def _counted(
    measure: SpectralMeasure, lower: np.ndarray, upper: np.ndarray, level: float, *, tails: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on the number of sampled eigenvalues below thresholds, from those on the mass below them."""
    n, probes = measure.sampled_dimension, len(measure.jacobi.used)
    if not probes:
        return n * lower, n * upper
    failure = 1 - level
    error = simultaneous_error(n, probes, level if not tails else 1 - (1 - TAIL_PART) * failure)
    low, high = n * np.maximum(lower - error, 0), n * np.minimum(upper + error, 1)
    if tails:
        bounds = tail_bounds(n, probes, TAIL_PART * failure)
        fewest, most = bounds.count(lower, upper)
        fewest_above, most_above = bounds.count(1 - upper, 1 - lower)
        low, high = (
            np.maximum(low, np.maximum(fewest, n - most_above)),
            np.minimum(high, np.minimum(most, n - fewest_above)),
        )
        low = np.minimum(low, high)  # they cross only where one of them fails
    return low, high


def sampled_below(
    measure: SpectralMeasure, thresholds: np.ndarray, *, exactly_at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bound the mean mass of the probe vectors below each threshold.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        thresholds: (g,) in the units of the eigenvalues.
        exactly_at: (e,) those of the thresholds at which the bounds are as narrow as possible.

    Returns:
        Lower and upper bounds, (g,) each. They allow for eigenvalues that rounding error has moved.
    """
    if not measure.jacobi.used:
        return np.zeros(len(thresholds)), np.full(len(thresholds), 1.0 if measure.sampled_dimension else 0.0)
    shifts = _shifts(measure, thresholds)
    moved = np.concatenate([thresholds - shifts, thresholds + shifts])
    exact = np.unique(moved[np.isin(np.tile(thresholds, 2), exactly_at)]).tolist()
    each = [mass_bounds(alphas, betas, moved, exactly_at=exact) for alphas, betas in measure.jacobi.used]
    low, high = np.mean(each, axis=0)
    return low[: len(thresholds)], high[len(thresholds) :]


def known_below(measure: SpectralMeasure, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the known eigenvalues below each threshold.

    Args:
        measure: The Jacobi matrices and the known eigenvalues.
        thresholds: (g,) in the units of the eigenvalues.

    Returns:
        How many lie below each threshold for certain, and how many possibly, (g,) each.
    """
    known, counts = measure.known, []
    for edges in (known.values + known.errors, known.values - known.errors):
        order = np.argsort(edges, kind="stable")
        totals = np.append(0.0, np.cumsum(known.counts[order]))
        counts.append(totals[np.searchsorted(edges[order], thresholds, side="left")])
    return counts[0], counts[1]


def _thresholds(measure: SpectralMeasure, required: np.ndarray) -> np.ndarray:
    """The thresholds of the band: nodes, logarithmically spaced ones, sides of known eigenvalues, required ones."""
    nodes = np.sort(np.concatenate([np.zeros(0), *(rule.nodes for rule in measure.rules)]))
    thinned = nodes[np.linspace(0, len(nodes) - 1, min(len(nodes), MOST_NODES)).round().astype(int)]
    sizes = measure.radius * np.logspace(-DECADES, 0, DECADES * PER_DECADE + 1) if len(nodes) else nodes
    known = measure.known
    edges = [known.values - known.errors, np.nextafter(known.values + known.errors, np.inf)]
    return np.unique(np.concatenate([thinned, -sizes, sizes, *edges, required]))


def _shifts(measure: SpectralMeasure, thresholds: np.ndarray) -> np.ndarray:
    """How far rounding error and inexact deflation may have moved an eigenvalue near each threshold."""
    own = 64 * np.finfo(float).eps * measure.radius  # rounding error of the nodes themselves, in float64
    at_zero = measure.known.deflation_shift(0.0)  # `share_inside` uses this shift at every bound
    deflation = np.array([max(measure.known.deflation_shift(float(threshold)), at_zero) for threshold in thresholds])
    return np.maximum(measure.rounding_error + deflation, own)


def _never_falling(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds narrowed by those at other thresholds: the share never falls."""
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _cut(
    thresholds: np.ndarray, low: np.ndarray, high: np.ndarray, threshold: float, share: Estimate
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds narrowed by an interval that is known for the share below one of the thresholds."""
    at = int(np.searchsorted(thresholds, threshold))
    if not (share.low <= high[at] and share.high >= low[at]):
        raise InputError(
            f"an interval of the share below {threshold:g} that meets the band, [{low[at]:.4g}, {high[at]:.4g}], is "
            f"expected in known=, got [{share.low:.4g}, {share.high:.4g}]: measure both on the same operator"
        )
    low[at], high[at] = max(low[at], share.low), min(high[at], share.high)
    return _never_falling(low, high)
