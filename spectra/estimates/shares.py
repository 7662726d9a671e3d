"""Shares of eigenvalues with intervals: what a quadrature rule can and cannot say about a count."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates.brackets import Bracket, bracket
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile

SETTLED = 1.5  # a smooth measure halves its unplaced mass at every doubling of the steps, a ratio of 2


@dataclass(frozen=True)
class Measure:
    """What several probes saw of an operator's spectrum, apart from what is known exactly.

    jacobi: a pair (alphas, betas) a probe. dimension: of the space the probes were drawn from. atoms, counts and
    errors: eigenvalues known one by one, how many of each, and how far each may be off. noise: how far rounding may
    have moved the others.
    """

    jacobi: list[tuple[np.ndarray, np.ndarray]]
    dimension: int
    atoms: np.ndarray
    counts: np.ndarray
    errors: np.ndarray
    noise: float

    @property
    def total(self) -> int:
        """All eigenvalues, those of the probed space and the atoms."""
        return self.dimension + int(self.counts.sum())


@dataclass(frozen=True)
class _Crossing:
    """The probed space's mass below a threshold: a point estimate, and bounds that hold in exact arithmetic.

    strictly and including: estimates of the mass below, and of the mass up to and including, the threshold; they
    differ by an atom there. low, high: bounds of the first and the second.
    """

    strictly: float
    including: float
    low: float
    high: float


def share_inside(measure: Measure, low: float, high: float) -> Estimate:
    """The share of eigenvalues with low < lambda < high; either bound may be infinite.

    The interval adds up: the Chebyshev-Markov-Stieltjes bracket at each bound, averaged over probes, which holds
    whatever the finite recurrence has not seen; the noise of the products, by moving each bound outward and inward;
    and the spread of the probes, whose variance for probes uniform on the sphere is known,
    2 p (1 - p) / ((n + 2) k) for a share p of n eigenvalues and k probes. Resolved where its half-width is at most
    .05. The value is the difference of the brackets' middles, less what looks like an atom at a bound itself.
    An eigenvalue known to an error that reaches across a bound widens the interval by its share.
    """
    n, total = measure.dimension, measure.total
    known, surely, possibly = _known_inside(measure, low, high)
    if n == 0 or not measure.jacobi:
        return _judged(
            Estimate(known / total, surely / total, possibly / total), "rounding hides the signs of the rest"
        )
    at_low, at_high = (_crossing(measure, bound) for bound in (low, high))
    value = max(at_high.strictly - at_low.including, 0.0)
    least, most = max(at_high.low - at_low.high, 0.0), min(at_high.high - at_low.low, 1.0)
    widest = min(max(0.5, least), most)  # the share inside the bracket whose sampling error is largest
    spread = normal_quantile() * math.sqrt(2 * widest * (1 - widest) / ((n + 2) * len(measure.jacobi)))
    if math.isinf(low) and math.isinf(high):
        spread = 0.0
    least, most = max(least - spread, 0.0), min(most + spread, 1.0)
    value = (known + n * value) / total
    least, most = min((surely + n * least) / total, value), max((possibly + n * most) / total, value)
    steps = max(len(alphas) for alphas, _ in measure.jacobi)
    bracket_part = (at_high.high - at_high.low + at_low.high - at_low.low) / 2
    cause = (
        f"{steps} steps leave {min(2 * bracket_part, 1):.2f} of the mass near the bounds unplaced: "
        "use more steps, or deflate"
        if bracket_part > spread
        else f"{len(measure.jacobi)} probes of {n} eigenvalues leave +-{spread:.2f}: use more probes"
    )
    return _judged(Estimate(value, least, most), cause)


def _judged(estimate: Estimate, cause: str) -> Estimate:
    """The estimate, marked unresolved for the cause given where its interval is too wide."""
    if estimate.half_width <= RESOLVED_HALF_WIDTH:
        return estimate
    return replace(estimate, resolved=False, reason=cause)


def _known_inside(measure: Measure, low: float, high: float) -> tuple[float, float, float]:
    """How many of the atoms lie inside by their values, for certain, and possibly."""
    atoms, errors = measure.atoms, measure.errors
    inside = (atoms > low) & (atoms < high)
    surely = (atoms - errors > low) & (atoms + errors < high) & inside
    possibly = inside | ((errors > 0) & (atoms + errors > low) & (atoms - errors < high))
    return tuple(float(measure.counts[chosen].sum()) for chosen in (inside, surely, possibly))  # type: ignore[return-value]


def _crossing(measure: Measure, bound: float) -> _Crossing:
    if math.isinf(bound):
        side = 0.0 if bound < 0 else 1.0
        return _Crossing(side, side, side, side)
    each = [_probe_crossing(alphas, betas, bound, measure.noise) for alphas, betas in measure.jacobi]
    return _Crossing(*(float(np.mean(part)) for part in zip(*each, strict=True)))


def _probe_crossing(
    alphas: np.ndarray, betas: np.ndarray, bound: float, noise: float
) -> tuple[float, float, float, float]:
    here = bracket(alphas, betas, bound)
    below = bracket(alphas, betas, bound - noise) if noise > 0 else here
    above = bracket(alphas, betas, bound + noise) if noise > 0 else here
    atom = _atom(alphas, betas, bound, here)
    middle = here.below + here.at / 2
    low, high = min(here.below, below.below), max(here.below + here.at, above.below + above.at)
    return middle - atom / 2, middle + atom / 2, low, high


def _atom(alphas: np.ndarray, betas: np.ndarray, bound: float, here: Bracket) -> float:
    """The mass that seems to sit exactly at the bound. Where the measure is smooth the node's weight falls like 1/m,
    at an atom it stays: extrapolating from m/4, m/2 and m to infinity (Aitken) leaves the atom. Where the weight does
    not settle, as for masses spread over decades, nothing is claimed."""
    if betas[-1] <= 0:
        return here.at
    quarter, half = (
        bracket(alphas[:m], betas[:m], bound).at if m else 1.0 for m in (len(alphas) // 4, len(alphas) // 2)
    )
    ratio = (quarter - half) / (half - here.at) if half > here.at else 0.0
    if ratio < SETTLED:
        return 0.0
    return float(np.clip(here.at - (half - here.at) / (ratio - 1), 0.0, here.at))


def cumulative(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """A rule's cumulative weight at each grid point, half of a node's weight counting at the node, interpolated
    monotonically (PCHIP) between nodes: a curve to draw. Shares come from `share_inside`."""
    from scipy.interpolate import PchipInterpolator  # half a second to load, for a curve alone

    nodes, weights = merged(nodes, weights)
    middle = np.cumsum(weights) - weights / 2
    if len(nodes) == 1:
        return np.where(grid < nodes[0], 0.0, np.where(grid > nodes[0], 1.0, 0.5))
    curve = PchipInterpolator(nodes, middle, extrapolate=False)(grid)
    curve = np.where(grid < nodes[0], 0.0, np.where(grid > nodes[-1], 1.0, curve))
    return np.clip(curve, 0.0, 1.0)


def merged(nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes closer than rounding, such as copies of a converged outlier, as one."""
    closeness = 1e-12 * max(float(np.abs(nodes).max()), 1e-300)
    starts = np.concatenate([[True], np.diff(nodes) > closeness])
    return nodes[starts], np.bincount(np.cumsum(starts) - 1, weights=weights)
