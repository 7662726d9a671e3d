"""The bit-widths of quantized weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from numbers import Real
from typing import Any

from spectra.backend.errors import InputError

BITS = (1, 1.58, 2, 3, 4, 8)
NAMES = {"binary": 1, "ternary": 1.58}
LOG2_OF_3 = math.log2(3)  # 1.58496..., the bits of three levels


def parse_bits(value: Any) -> float:
    """The bit-width that a number or a text stands for.

    Args:
        value: A number, a number as text, "binary" or "ternary". What rounds log2(3) to two digits or more is 1.58.

    Returns:
        One of `BITS`, an int where it is whole.

    Raises:
        InputError: It is none of them.
    """
    number = math.nan
    value = NAMES.get(value, value) if isinstance(value, str) else value
    if is_real(value) or isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    if round(LOG2_OF_3, 3) == round(number, 3):
        return 1.58
    for bits in BITS:
        if number == bits:
            return bits
    raise InputError(f"bits must be one of {listed(BITS)}; got {value}")


def is_real(value: Any) -> bool:
    """Whether it is a real number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def listed(values: Iterable[Any]) -> str:
    """The values in words, with commas between."""
    return ", ".join(str(value) for value in values)
