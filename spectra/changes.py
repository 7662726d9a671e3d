"""What changed between two spectra, with intervals that profit from the probes they share.

A change of a mean over probes, x_i before and y_i after, has the variance of y_i - x_i, which eigenvectors that stay
make small. Few probes tell little about a variance, and Student's interval falls short where a handful of outliers
makes the y_i - x_i skewed, so the interval is the widest of three, each of which knows something that the others miss:

* Student's over the pairs, mean(y_i - x_i) +- t_{k-1} s / sqrt(k).
* The least that two spectra allow, whatever their eigenvectors: by Hoffman and Wielandt (Duke Math. J. 20, 1953)
  ||F - G||_F^2 >= sum_j (f_j - g_j)^2 with both in ascending order, so the difference varies at least as much as that
  of two matrices with the same eigenvectors. Each probe's rules are coupled by quantiles for it. Variance and skewness
  follow as in `spectra.moments`, without a degree of freedom spent.
* Normal, with the known variances of both sides and the correlation seen in the pairs.

It is never wider than the difference of the two intervals. In simulations with 4 and 10 probes, few and many outliers,
shared, turned and unrelated eigenvectors, it covers 93 % or more in each setting and 98 % over all, where Student's
alone falls to 80 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from spectra import moments
from spectra.density import SpectralDensity
from spectra.errors import InputError
from spectra.estimates import RESOLVED_HALF_WIDTH, Estimate, normal_quantile, sampling_interval, student_interval
from spectra.probe import NEAR_ZERO, summarize

Limits = Callable[[float], tuple[float, float]]  # factor > 0 -> the interval of after - factor * before
SEED_BITS = 0xFFFFFFFFFFFFFFFF  # what probes depend on
MOST_SKEWED = math.sqrt(8)  # of one eigenvalue alone, whose weight is chi-squared with one degree of freedom
POWERS = {"negative_energy_share": 2, "negative_magnitude_share": 1}
MEANS = ("trace", "rms", "frobenius", *POWERS)  # means over probes, to first order
ENDS = ("lambda_max", "lambda_min")


@dataclass(frozen=True)
class Change:
    """A quantity before and after. difference: after - before; ratio: after / before, unresolved where the interval
    before touches zero. paired: whether both were measured with the same probes. `str()` says it in a sentence."""

    quantity: str
    before: Estimate
    after: Estimate
    difference: Estimate
    ratio: Estimate
    paired: bool

    @property
    def measurable(self) -> bool:
        """Whether the interval of the difference leaves zero out."""
        return not self.difference.low <= 0 <= self.difference.high

    @property
    def verdict(self) -> str:
        """What happened to the quantity: "rose by 31 % [27, 35]"."""
        difference, relative = self.difference, self._relative()
        if difference.low == difference.high == 0:
            return "did not change"
        if not self.measurable:
            change, unit = (difference, "") if relative is None else (relative, " %")
            return f"did not change measurably: {_spelled(change, unit, sign='+')}"
        down = difference.value < 0
        if relative is None:
            return f"{'fell' if down else 'rose'} by {_spelled(moments.negated(difference) if down else difference)}"
        size = moments.negated(relative) if relative.value < 0 else relative
        if self.before.value < 0:
            return f"became {'more' if down else 'less'} negative by {_spelled(size, ' %')}"
        return f"{'fell' if down else 'rose'} by {_spelled(size, ' %')}"

    def __str__(self) -> str:
        share = self.quantity.endswith("_share")
        return f"{self.quantity.replace('_', ' ') if share else self.quantity} {self.verdict}"

    def _relative(self) -> Estimate | None:
        """The change in percent; None for shares, and where the ratio says nothing."""
        if self.quantity.endswith("_share") or not self.ratio.resolved or self.ratio.low <= 0:
            return None
        value, low, high = (100 * (end - 1) for end in (self.ratio.value, self.ratio.low, self.ratio.high))
        return Estimate(value, low, high)


def compare(a: SpectralDensity, b: SpectralDensity, *, near_zero_tol: float = NEAR_ZERO) -> dict[str, Change]:
    """What changed from spectrum `a` to spectrum `b`: a `Change` for each quantity that a record keeps.

        print(spectra.compare(before, after)["lambda_max"])  # lambda_max rose by 31 % [27, 35]

    With the same seed, number of probes and dimension, the trace, the norms and the energy and magnitude shares get
    paired intervals (see `spectra.changes`), and a ratio r is in its interval if 0 is in that of after - r * before
    (Fieller, J. R. Stat. Soc. B 16, 1954). The ends of the spectrum and the counted shares get the difference of the
    two intervals, [low_b - high_a, high_b - low_a], as most of their width is no sampling error. Of two different seeds
    the intervals' sides add in quadrature, as for any independent estimates; where only some probes may be shared (an
    unknown seed, another number of probes), they add up. Exact spectra give exact changes.

    near_zero_tol: |lambda| that counts as near zero. Raises InputError unless both are densities and it is positive.
    """
    for density in (a, b):
        if not isinstance(density, SpectralDensity):
            raise InputError(
                f"two densities are expected, got {type(density).__name__}: use slq, or Run.density(record)"
            )
    paired, independent = _same_probes(a, b), _independent(a, b)
    before, after = summarize(a, near_zero_tol), summarize(b, near_zero_tol)
    changes = {}
    for name in before:
        limits = ratio_limits = partial(_apart, before[name], after[name])
        if name in MEANS and independent:
            limits = ratio_limits = partial(_in_quadrature, before[name], after[name])
        elif name in MEANS and paired and len(a.rules) > 1:
            pairs = _Pairs(_sampled(a, name, before[name]), _sampled(b, name, after[name]))
            limits, ratio_limits = pairs.limits, pairs.ratio_limits
        difference = _difference(name, before[name], after[name], limits)
        ratio = _ratio(before[name], after[name], ratio_limits)
        changes[name] = Change(name, before[name], after[name], *_agreed(difference, ratio, before[name]), paired)
    return changes


def _difference(name: str, before: Estimate, after: Estimate, limits: Limits) -> Estimate:
    low, high = limits(1.0)
    value = after.value - before.value
    difference = Estimate(value, min(low, value), max(high, value))
    causes = [estimate.reason for estimate in (before, after) if not estimate.resolved]
    wide = name.endswith("_share") and difference.half_width > RESOLVED_HALF_WIDTH
    if not (wide or (name in ENDS and causes) or not math.isfinite(difference.half_width)):
        return difference
    cause = causes[0] if causes else f"the change is known to +-{difference.half_width:.2g} only: use more probes"
    return replace(difference, resolved=False, reason=cause)


def _ratio(before: Estimate, after: Estimate, limits: Limits) -> Estimate:
    """after / before: the factors whose multiple of `before` cannot be told from `after`."""
    value = after.value / before.value if before.value else math.nan
    ends = (before.low, before.high, after.low, after.high)
    if before.low <= 0 <= before.high or not all(map(math.isfinite, ends)):
        return Estimate(value, -math.inf, math.inf, False, "the value before cannot be told from zero")
    quotients = [end / by for end in (after.low, after.high) for by in (before.low, before.high)]
    low, high = min(quotients), max(quotients)
    if low > 0:

        def possible(factor: float) -> bool:
            least, most = limits(factor)
            return least <= 0 <= most

        low, high = (moments.last_that_holds(possible, value, end) for end in (low, high))
    return Estimate(value, low, high)


def _agreed(difference: Estimate, ratio: Estimate, before: Estimate) -> tuple[Estimate, Estimate]:
    """Where one of them tells a change from none and the other does not, the other takes its word:
    difference = (ratio - 1) * before."""
    if not ratio.resolved or ratio.low <= 0:
        return difference, ratio
    steady, same = difference.low <= 0 <= difference.high, ratio.low <= 1 <= ratio.high
    if steady and not same:
        ends = [(end - 1) * by for end in (ratio.low, ratio.high) for by in (before.low, before.high)]
        difference = replace(difference, low=max(difference.low, min(ends)), high=min(difference.high, max(ends)))
    elif same and not steady:
        ends = [1 + end / by for end in (difference.low, difference.high) for by in (before.low, before.high)]
        ratio = replace(ratio, low=max(ratio.low, min(ends)), high=min(ratio.high, max(ends)))
    return difference, ratio


# -- intervals of after - factor * before


def _apart(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """What holds however the two depend on each other."""
    return after.low - factor * before.high, after.high - factor * before.low


def _in_quadrature(before: Estimate, after: Estimate, factor: float) -> tuple[float, float]:
    """Of independent estimates, side by side (Zou and Donner, Statistics in Medicine 27, 2008)."""
    difference = after.value - factor * before.value
    below = math.hypot(after.value - after.low, factor * (before.high - before.value))
    above = math.hypot(after.high - after.value, factor * (before.value - before.low))
    return difference - below, difference + above


@dataclass(frozen=True)
class _Sampled:
    """A quantity as a mean over probes, linear in the measure that each probe saw.

    values: (k,) what each probe says, up to a constant. spectra: for each probe the eigenvalues (m,) of the matrix that
    the quantity is the trace of, centred, and how many (m,) of each. dimension: n of the sampled space. drift: by how
    much half the steps would have it otherwise. rounding: what the arithmetic may have lost.
    """

    estimate: Estimate
    values: np.ndarray
    spectra: list[tuple[np.ndarray, np.ndarray]]
    dimension: int
    drift: float
    rounding: float


class _Pairs:
    """Two quantities seen by the same probes. a: before, b: after."""

    def __init__(self, a: _Sampled, b: _Sampled):
        self.a, self.b, self.count = a, b, len(a.values)
        self._n = max(a.dimension, b.dimension)
        each = [_coupled(x, y, self._n) for x, y in zip(a.spectra, b.spectra, strict=True)]
        self._before, self._after, self._counts = (np.concatenate(part) for part in zip(*each, strict=True))
        self._correlation = _correlation(a.values, b.values)

    def limits(self, factor: float) -> tuple[float, float]:
        """The interval of after - factor * before."""
        return self._limits(factor, factor)

    def ratio_limits(self, factor: float) -> tuple[float, float]:
        """The same where little is known of pairs: only what the measured ratio leaves of `after` varies as the pairs
        do, the rest is a multiple of `before`, whose variance is known."""
        return self._limits(factor, self.b.estimate.value / self.a.estimate.value)

    def _limits(self, factor: float, pivot: float) -> tuple[float, float]:
        a, b = self.a, self.b
        value = b.estimate.value - factor * a.estimate.value
        student = student_interval(b.values - pivot * a.values).half_width
        first, second = self._mean(self._before)[0], self._mean(self._after)[0]
        seen = max((pivot * first) ** 2 + second**2 - 2 * self._correlation * pivot * first * second, 0.0)
        half = max(student, normal_quantile() * math.sqrt(seen))
        half = math.hypot(half, normal_quantile() * (factor - pivot) * first)
        bound = sampling_interval(value, *self._mean(self._after - factor * self._before))
        room = abs(b.drift - factor * a.drift) + b.rounding + factor * a.rounding
        low, high = min(bound.low, value - half) - room, max(bound.high, value + half) + room
        lowest, highest = _apart(a.estimate, b.estimate, factor)
        return max(low, lowest), min(high, highest)

    def _mean(self, eigenvalues: np.ndarray) -> tuple[float, float]:
        """Standard deviation and skewness of the mean over probes of v . D v, from D's centred eigenvalues."""
        n, counts = self._n, self._counts / self.count
        variance = 2 * n / (n + 2) * float(counts @ eigenvalues**2)
        if variance <= 0:
            return 0.0, 0.0
        third = 8 * n * n / ((n + 2) * (n + 4)) * float(counts @ eigenvalues**3)
        skewness = min(max(third / variance**1.5, -MOST_SKEWED), MOST_SKEWED)
        return math.sqrt(variance / self.count), skewness / math.sqrt(self.count)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / size, -1, 1)) if size > 0 else 0.0


def _coupled(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both spectra in ascending order, one eigenvalue of each beside the other, and how many there are of each pair."""
    (x, heights_x), (y, heights_y) = (_staircase(values, counts, total) for values, counts in (a, b))
    cuts = np.sort(np.concatenate([heights_x, heights_y]))
    counts = np.diff(cuts, prepend=0.0)
    middle = cuts - counts / 2
    at_x, at_y = (np.searchsorted(heights, middle) for heights in (heights_x, heights_y))
    return x[np.minimum(at_x, len(x) - 1)], y[np.minimum(at_y, len(y) - 1)], counts


def _staircase(values: np.ndarray, counts: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in ascending order and how many eigenvalues lie up to each, `total` in all: dimensions that only the other
    spectrum samples are added at the mean, 0."""
    values, counts = np.append(values, 0.0), np.append(counts, max(total - counts.sum(), 0.0))
    order = np.argsort(values, kind="stable")
    heights = np.cumsum(counts[order])
    return values[order], heights * (total / heights[-1])


# -- quantities as means over probes


def _sampled(density: SpectralDensity, name: str, estimate: Estimate) -> _Sampled:
    n = density.sampled
    function = _linearised(density, name, estimate)
    images = [function(rule.nodes) for rule in density.rules]
    values = np.array([rule.weights @ image for rule, image in zip(density.rules, images, strict=True)])
    spectra = [
        ((image - values.mean()) / n, n * rule.weights) for rule, image in zip(density.rules, images, strict=True)
    ]
    size = float(np.mean([rule.weights @ np.abs(image) for rule, image in zip(density.rules, images, strict=True)]))
    size += float(density.counts @ np.abs(function(density.atoms))) / n
    drift = _drift(density, name, estimate) if name in POWERS else 0.0
    return _Sampled(estimate, values, spectra, n, drift, density.rounding * size)


def _linearised(density: SpectralDensity, name: str, estimate: Estimate) -> moments.Function:
    """The function whose mean over eigenvalues varies with the probes as the quantity does."""
    n = density.sampled
    if name == "trace":
        return lambda theta: n * theta
    if name in POWERS:
        power = POWERS[name]

        def whole(theta: np.ndarray) -> np.ndarray:
            return np.abs(theta) ** power

        known = (density.rules, n, density.atoms, density.counts)
        total = moments.sum_over_eigenvalues(whole, *known).value
        return lambda theta: n / (total or 1.0) * whole(theta) * ((theta < 0) - estimate.value)
    norm = density.frobenius().value
    scale = 2 * (norm or 1.0) * (math.sqrt(density.dimension) if name == "rms" else 1.0)
    return lambda theta: n * theta * theta / scale


def _drift(density: SpectralDensity, name: str, estimate: Estimate) -> float:
    """What half the steps would have changed."""
    halves = np.where(density.lengths > 0, np.maximum(density.lengths // 2, 1), 0)
    return estimate.value - getattr(replace(density, lengths=halves), name)().value


def _same_probes(a: SpectralDensity, b: SpectralDensity) -> bool:
    if a.exact and b.exact:
        return True
    if a.seed is None or b.seed is None or (a.seed - b.seed) & SEED_BITS:
        return False
    return a.dimension == b.dimension and len(a.alphas) == len(b.alphas) and len(a.rules) == len(b.rules)


def _independent(a: SpectralDensity, b: SpectralDensity) -> bool:
    """Whether the probes of one say nothing about those of the other: other seeds, or one drew none."""
    if not a.rules or not b.rules:
        return True
    return a.seed is not None and b.seed is not None and bool((a.seed - b.seed) & SEED_BITS)


def _spelled(estimate: Estimate, unit: str = "", sign: str = "") -> str:
    """Value and interval, in as many digits as the interval warrants."""
    half = estimate.half_width
    style = "z.4g"
    if half > 0 and math.isfinite(half) and max(abs(estimate.low), abs(estimate.high)) < 1e6:
        exponent = math.floor(math.log10(half))
        decimals = max(0, (half < 3.55 * 10**exponent) - exponent)
        style = f"z.{decimals}f" if decimals <= 4 else style
    return f"{estimate.value:{sign}{style}}{unit} [{estimate.low:{style}}, {estimate.high:{style}}]"
