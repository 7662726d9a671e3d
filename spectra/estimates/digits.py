"""Numbers in as many digits as their interval knows."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from spectra.estimates.estimate import Estimate

MOST_DIGITS = 4  # of a number in words or in a table, however narrow its interval is
SECOND_DIGIT_BELOW = 3.55  # first digits of a half-width below which the next digit of the number says something too
EXACT_DIGITS = 12  # of a number; those after them are the rounding error of its arithmetic


def rounded(estimate: Estimate, *, sign: str = "") -> tuple[str, str, str]:
    """Write a value and its interval in the digits that the interval warrants, and four at most.

    The last digit is the one that the half-width has as its first, or the next one where the half-width begins with a
    small digit. The value keeps at least one digit. It is rounded to the nearest number, and the ends of the interval
    are rounded outward, so that the interval as written contains the interval as measured.

    Args:
        estimate: What to write.
        sign: "+" writes the sign of a positive value too.

    Returns:
        The value, the lower and the upper end of its interval.

    Example:
        >>> rounded(Estimate(33.8475, 31.26, 36.41))
        ('33.8', '31.2', '36.5')
        >>> rounded(Estimate(338.475, 200.0, 480.0))
        ('340', '200', '480')
    """
    position = _last_known_digit(estimate)
    ends = [_outward(estimate.low, position, ROUND_FLOOR), _outward(estimate.high, position, ROUND_CEILING)]
    if position is None:
        low, high = (f"{end:z.{MOST_DIGITS}g}" for end in ends)
        return f"{estimate.value:{sign}z.{MOST_DIGITS}g}", low, high
    low, high = (_number(end, position) for end in ends)
    return _number(estimate.value, position, sign), low, high


def _last_known_digit(estimate: Estimate) -> int | None:
    """The power of ten of the last digit to write; None where the interval knows more digits than are written."""
    half, value = estimate.half_width, estimate.value
    if not (math.isfinite(half) and half > 0 and math.isfinite(value)):
        return None
    first = math.floor(math.log10(half))
    position = first - (half < SECOND_DIGIT_BELOW * 10.0**first)
    largest = max(abs(value), abs(estimate.low), abs(estimate.high))
    if position < math.floor(math.log10(largest)) - MOST_DIGITS + 1:
        return None
    return min(position, math.floor(math.log10(abs(value)))) if value else position


def _outward(end: float, position: int | None, rounding: str) -> float:
    """An end of an interval, rounded away from its middle at a power of ten; None stands for the fourth digit."""
    if not math.isfinite(end) or end == 0:
        return end
    first = math.floor(math.log10(abs(end)))
    last = first - MOST_DIGITS + 1 if position is None else position
    if first - last >= EXACT_DIGITS:
        return end
    return float(Decimal(f"{end:.{EXACT_DIGITS}g}").quantize(Decimal((0, (1,), int(last))), rounding=rounding))


def _number(number: float, position: int, sign: str = "") -> str:
    """The number with its last digit at a power of ten."""
    if position >= -MOST_DIGITS and abs(number) < 1e6:
        return f"{round(number, -position):{sign}z.{max(-position, 0)}f}"
    digits = math.floor(math.log10(abs(number))) - position + 1 if number else 1
    return f"{number:{sign}z.{max(digits, 1)}g}"
