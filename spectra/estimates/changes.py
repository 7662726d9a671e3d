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
from dataclasses import dataclass, replace
from functools import partial

from spectra.backend.errors import InputError
from spectra.estimates import moments
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import (
    RESOLVED_HALF_WIDTH,
    Estimate,
)
from spectra.estimates.paired import (
    POWERS,
    Limits,
    PairedMeans,
    difference_of_intervals,
    independent_difference,
    mean_over_probes,
)
from spectra.estimates.quantities import NEAR_ZERO, summarize

SEED_BITS = 0xFFFFFFFFFFFFFFFF  # what probes depend on
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
        limits = ratio_limits = partial(difference_of_intervals, before[name], after[name])
        if name in MEANS and independent:
            limits = ratio_limits = partial(independent_difference, before[name], after[name])
        elif name in MEANS and paired and len(a.rules) > 1:
            pairs = PairedMeans(mean_over_probes(a, name, before[name]), mean_over_probes(b, name, after[name]))
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
