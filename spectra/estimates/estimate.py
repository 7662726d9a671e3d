"""A number measured with random probe vectors, and the interval that goes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from spectra.backend import markup
from spectra.estimates.digits import rounded

CONFIDENCE = 0.95
RESOLVED_HALF_WIDTH = 0.05  # a share with a wider interval is called unresolved
RESOLVED_SPAN = 0.5  # length of an interval, relative to the value, above which a sum or a norm is called unresolved
NEGLIGIBLE = 1e-6  # half-width, relative to the sum of the absolute values of the terms, up to which a sum is exact


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval [low, high].

    Attributes:
        value: The estimate.
        low: Lower end of the interval; -inf where nothing bounds it.
        high: Upper end of the interval; inf where nothing bounds it.
        resolved: Whether the measurement supports the number. Where it does not, the interval still holds.
        reason: Why the estimate is unresolved; empty where it is resolved.
        products: How many operator-vector products the estimate cost, where that is known; else 0.

    Example:
        >>> print(Estimate(2.0, 1.5, 2.5))
        2.00 [1.50, 2.50]
    """

    value: float
    low: float
    high: float
    resolved: bool = True
    reason: str = ""
    products: int = 0

    @property
    def half_width(self) -> float:
        """Half the length of the interval, (high - low) / 2."""
        return (self.high - self.low) / 2

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        mark = "" if self.resolved else " (unresolved)"
        value, low, high = self.rounded()
        return f"{value} [{low}, {high}]{mark}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the value, and paler its interval and why it is unresolved."""
        value, *ends = self.rounded()
        return markup.sentence(value, f"[{', '.join(ends)}]" + ("" if self.resolved else f" unresolved: {self.reason}"))

    def rounded(self, *, sign: str = "") -> tuple[str, str, str]:
        """Write value, low and high in the digits that the interval warrants, the ends rounded outward.

        Args:
            sign: "+" writes the sign of a positive value too.

        Returns:
            The three numbers as text.

        Example:
            >>> Estimate(33.8475, 31.26, 36.41).rounded()
            ('33.8', '31.2', '36.5')
        """
        return rounded(self.value, self.low, self.high, sign=sign)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in plain types for JSON; a number that is not finite becomes None."""
        return {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "resolved": bool(self.resolved),
            "reason": self.reason,
            "products": int(self.products),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Estimate:
        """Build an estimate from what `to_dict` returned.

        Args:
            fields: The dictionary; a missing or None value reads as NaN, a missing end of the interval as infinite.

        Returns:
            The estimate.
        """
        value, low, high = fields.get("value"), fields.get("low"), fields.get("high")
        return cls(
            value=math.nan if value is None else float(value),
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            resolved=bool(fields.get("resolved", True)),
            reason=str(fields.get("reason", "")),
            products=int(fields.get("products", 0)),
        )


def certain(value: float, *, rounding: float = 0.0) -> Estimate:
    """Return a number without sampling error.

    Args:
        value: The number.
        rounding: Bound on its rounding error, the half-width of the interval.

    Returns:
        The estimate, with the interval value +- rounding.
    """
    return Estimate(float(value), float(value - rounding), float(value + rounding))


def student_interval(samples: Sequence[float] | np.ndarray, *, confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean of independent samples with Student's interval, mean +- t_{k-1} s / sqrt(k).

    Args:
        samples: (k,) one value for each probe vector.
        confidence: Probability that the interval covers the mean, for normal samples.

    Returns:
        The estimate. One sample leaves the interval unbounded and the estimate unresolved.
    """
    samples = np.asarray(samples, dtype=float)
    mean = float(samples.mean())
    if len(samples) < 2:
        return Estimate(mean, -math.inf, math.inf, False, "one probe vector gives no variance: use two or more")
    half = student_quantile(len(samples) - 1, confidence) * float(samples.std(ddof=1)) / math.sqrt(len(samples))
    return Estimate(mean, mean - half, mean + half)


def sampling_interval(
    mean: float,
    deviation: float,
    skewness: float,
    *,
    freedom: float = math.inf,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return the interval of an estimator with a given standard deviation and skewness.

    On each side the wider of two intervals is used: the symmetric one, mean +- z deviation, and Hall's interval for a
    skewed mean, mean - deviation g(+-z) with g(z) = (3 / s) ((1 + s (z - s / 6))^(1/3) - 1) for skewness s (Hall, J. R.
    Stat. Soc. B 54, 1992). In simulations over spectra with few and many outliers the wider one covers 94 to 99 % from
    four probe vectors on, where Student's interval falls to 86 %.

    Args:
        mean: The estimated mean.
        deviation: Standard deviation of the estimator.
        skewness: Skewness of the estimator.
        freedom: Degrees of freedom with which the deviation is known; z is Student's quantile for them.
        confidence: Nominal coverage.

    Returns:
        The mean with its interval.
    """
    z = student_quantile(freedom, confidence)
    low, high = mean - z * deviation, mean + z * deviation
    if deviation > 0 and abs(skewness) > 1e-9:
        up, down = (3 / skewness * (np.cbrt(1 + skewness * (q - skewness / 6)) - 1) for q in (z, -z))
        low, high = min(low, mean - deviation * up), max(high, mean - deviation * down)
    return Estimate(float(mean), float(low), float(high))


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """Return z with P(|Z| <= z) = confidence for a standard normal Z."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def student_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return t with P(|T| <= t) = confidence for Student's T.

    Args:
        freedom: Degrees of freedom; fewer than one count as one, infinitely many give the normal quantile.
        confidence: The probability.

    Returns:
        The two-sided quantile.
    """
    if math.isinf(freedom):
        return normal_quantile(confidence)
    from scipy.special import stdtrit  # half a second to load, needed for few degrees of freedom only

    return float(stdtrit(max(freedom, 1.0), 0.5 + confidence / 2))


def with_margin(estimate: Estimate, margin: float, *, lower: float = -math.inf, upper: float = math.inf) -> Estimate:
    """Widen an interval by `margin` on each side, clipped to [lower, upper]."""
    low, high = max(estimate.low - margin, lower), min(estimate.high + margin, upper)
    return Estimate(estimate.value, low, high, estimate.resolved, estimate.reason, estimate.products)


def unresolved(estimate: Estimate, reason: str) -> Estimate:
    """Return the estimate marked as unresolved for a reason; as it is where the reason is empty."""
    return replace(estimate, resolved=False, reason=reason) if reason else estimate


def judged_by_size(estimate: Estimate, *, scale: float = 0.0) -> Estimate:
    """Mark a sum or a norm as unresolved where its interval is too wide. The interval itself does not change.

    It is unresolved where the interval holds zero, so that neither sign nor size is known, and where the interval is
    longer than half of the value.

    Args:
        estimate: The sum or norm.
        scale: The sum of the absolute values of the terms. A half-width up to 1e-6 of it is rounding error. So the sum
            is resolved where the terms cancel to zero.

    Returns:
        The estimate.
    """
    if not estimate.resolved or estimate.half_width <= NEGLIGIBLE * scale:
        return estimate
    span = estimate.high - estimate.low
    if span > 0 and estimate.low <= 0 <= estimate.high:
        return unresolved(estimate, "the interval holds zero, so not even the sign is known: use more probe vectors")
    if span > RESOLVED_SPAN * abs(estimate.value):
        part = f"{span / abs(estimate.value):.0%}".replace("%", " %")
        return unresolved(estimate, f"the interval spans {part} of the value: use more probe vectors")
    return estimate


def square_root(square: Estimate) -> Estimate:
    """Return the square root of a non-negative quantity: of the value and of both ends of the interval."""
    low, high = math.sqrt(max(square.low, 0.0)), math.sqrt(max(square.high, 0.0))
    return Estimate(math.sqrt(max(square.value, 0.0)), low, high, square.resolved, square.reason)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Multiply the value and the interval by a positive factor."""
    return Estimate(
        factor * estimate.value, factor * estimate.low, factor * estimate.high, estimate.resolved, estimate.reason
    )


def negated(estimate: Estimate) -> Estimate:
    """Return the estimate of minus the quantity."""
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.resolved, estimate.reason)


def _finite(number: float) -> float | None:
    """The number, or None where it is NaN or infinite."""
    return float(number) if math.isfinite(number) else None
