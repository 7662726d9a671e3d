"""Numbers in as many digits as their interval knows."""

from __future__ import annotations

import math

from spectra.estimates.estimate import Estimate

MOST_DIGITS = 4  # of a number in words or in a table, however narrow its interval is
SECOND_DIGIT_BELOW = 3.55  # first digits of a half-width below which the next digit of the number says something too


def rounded(estimate: Estimate, *, sign: str = "") -> tuple[str, str, str]:
    """Write a value and its interval in the digits that the interval warrants, and four at most.

    The last digit is the one that the half-width has as its first, or the next one where the half-width begins with a
    small digit. The value keeps at least one digit.

    Args:
        estimate: What to write.
        sign: "+" writes the sign of a positive value too.

    Returns:
        The value, the lower and the upper end of its interval.

    Example:
        >>> rounded(Estimate(33.8475, 31.2, 36.5))
        ('33.8', '31.2', '36.5')
        >>> rounded(Estimate(338.475, 200.0, 480.0))
        ('340', '200', '480')
    """
    position = _last_known_digit(estimate)
    if position is None:
        return f"{estimate.value:{sign}z.4g}", f"{estimate.low:z.4g}", f"{estimate.high:z.4g}"
    return (
        _number(estimate.value, position, sign),
        _number(estimate.low, position),
        _number(estimate.high, position),
    )


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


def _number(number: float, position: int, sign: str = "") -> str:
    """The number with its last digit at a power of ten."""
    if position >= -MOST_DIGITS and abs(number) < 1e6:
        return f"{round(number, -position):{sign}z.{max(-position, 0)}f}"
    digits = math.floor(math.log10(abs(number))) - position + 1 if number else 1
    return f"{number:{sign}z.{max(digits, 1)}g}"
