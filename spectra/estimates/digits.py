"""Numbers in as many digits as their interval knows."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

MOST_DIGITS = 4  # of a number in words or in a table, however narrow its interval is
HALF_WIDTH_DIGITS = 2  # of the half-width of the interval, whose last one is the last digit of the number
EXACT_DIGITS = 12  # of a number; those after them are the rounding error of its arithmetic


def rounded(value: float, low: float, high: float, *, sign: str = "") -> tuple[str, str, str]:
    """Write a value and its interval in the digits that the interval warrants, and four at most.

    The last digit written is the second digit of the half-width. The value keeps at least one digit of its own, and is
    rounded to the nearest number. The ends of the interval are rounded outward, so that the interval as written
    contains the interval as measured. What an end has after its twelfth digit is taken for rounding error: 0.1 + 0.2
    is written as 0.3.

    Args:
        value: The number.
        low: Lower end of its interval.
        high: Upper end of its interval.
        sign: "+" writes the sign of a positive value too.

    Returns:
        The value, the lower and the upper end of its interval.

    Example:
        >>> rounded(33.8475, 31.26, 36.41)
        ('33.8', '31.2', '36.5')
        >>> rounded(338.475, 195.1, 482.5)
        ('340', '190', '490')
    """
    half, largest = (high - low) / 2, max(abs(value), abs(low), abs(high))
    position = _last_known_digit(half, largest)
    low, high = _outward(low, position, ROUND_FLOOR), _outward(high, position, ROUND_CEILING)
    if position is None:
        return f"{value:{sign}z.{MOST_DIGITS}g}", f"{low:z.{MOST_DIGITS}g}", f"{high:z.{MOST_DIGITS}g}"
    of_value = min(position, _first_digit(value)) if math.isfinite(value) and value else position
    return _number(value, of_value, sign), _number(low, position), _number(high, position)


def _last_known_digit(half: float, largest: float) -> int | None:
    """The power of ten of the last digit to write; None where the interval knows more digits than are written."""
    if not (math.isfinite(half) and half > 0 and math.isfinite(largest)):
        return None
    position = _first_digit(half) - HALF_WIDTH_DIGITS + 1
    return None if position < _first_digit(largest) - MOST_DIGITS + 1 else position


def _first_digit(number: float) -> int:
    """The power of ten of the first digit."""
    return math.floor(math.log10(abs(number)))


def _outward(end: float, position: int | None, rounding: str) -> float:
    """An end of an interval, rounded away from its middle at a power of ten; None stands for the fourth digit."""
    if not math.isfinite(end) or end == 0:
        return end
    last = _first_digit(end) - MOST_DIGITS + 1 if position is None else position
    return float(Decimal(f"{end:.{EXACT_DIGITS}g}").quantize(Decimal((0, (1,), int(last))), rounding=rounding))


def _number(number: float, position: int, sign: str = "") -> str:
    """The number with its last digit at a power of ten."""
    if position >= -MOST_DIGITS and abs(number) < 1e6:
        return f"{round(number, -position):{sign}z.{max(-position, 0)}f}"
    digits = _first_digit(number) - position + 1 if number else 1
    return f"{number:{sign}z.{max(digits, 1)}g}"
