"""What to quantize and how: the settings of a conversion, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

from spectra.backend.errors import InputError

BITS = (1, 1.58, 2, 3, 4, 8)
ACTIVATION_BITS = (16, 8, 4)  # 16: not quantized

# The bit-widths that each scheme is defined for; the schemes themselves are in qat/layers/quantizers.
SUPPORTED_BITS: dict[str, tuple[float, ...]] = {
    "rtn": (2, 3, 4, 8),
    "lsq": (3, 4, 8),
    "seq": (1.58, 2),
    "binary": (1,),
}

# The scheme that quantizer="auto" chooses.
AUTO_QUANTIZER: dict[float, str] = {1: "binary", 1.58: "seq", 2: "seq", 3: "lsq", 4: "lsq", 8: "lsq"}


@dataclass(frozen=True)
class QuantConfig:
    """Which weights become low-bit, at which width and by which scheme.

    Args:
        bits: 1, 1.58, 2, 3, 4 or 8, as a number or as text.
        quantizer: A scheme in `SUPPORTED_BITS`, or "auto": "binary" at 1 bit, "seq" at 1.58 and 2, "lsq" from 3.
        activation_bits: 16, 8 or 4: the width of the inputs of quantized layers, quantized per token; 16 leaves them
            in full precision (`qat.layers.activations`).
        activation_symmetric: Whether their grids, and those of the cache, are symmetric about zero.
        cache_bits: 16, 8 or 4: the width of keys and values, quantized per token and head; 16 leaves them in full
            precision (`qat.layers.cache`).
        quantize_head: Whether to quantize the output head.
        quantize_embeddings: Whether to quantize the token embeddings.
        skip: Globs of module names to leave in full precision. A glob that matches a module leaves out everything
            below it, too.

    Raises:
        InputError: A value is not supported; the message names those that are.

    Example:
        >>> QuantConfig(bits="1.58").scheme
        'seq'
    """

    bits: float = 2
    quantizer: str = "auto"
    activation_bits: int = 16
    activation_symmetric: bool = True
    cache_bits: int = 16
    quantize_head: bool = False
    quantize_embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits = parse_bits(self.bits)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "skip", _globs(self.skip))
        check_quantizer(self.quantizer, bits)
        for name in ("activation_bits", "cache_bits"):
            width = getattr(self, name)
            if isinstance(width, bool) or width not in ACTIVATION_BITS:
                raise InputError(f"{name} must be {_listed(ACTIVATION_BITS)} (16: full precision); got {width!r}")
            object.__setattr__(self, name, int(width))
        for name in ("activation_symmetric", "quantize_head", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False; got {getattr(self, name)!r}")

    @property
    def scheme(self) -> str:
        """The name of the quantizer in use, with "auto" resolved."""
        return AUTO_QUANTIZER[self.bits] if self.quantizer == "auto" else self.quantizer


def parse_bits(value: Any) -> float:
    """The bit-width that a number or a text stands for.

    Args:
        value: A number, or a number as text.

    Returns:
        One of `BITS`, an int where it is whole.

    Raises:
        InputError: It is none of them.
    """
    number = math.nan
    if is_real(value) or isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    for bits in BITS:
        if number == bits:
            return bits
    raise InputError(f"bits must be one of {_listed(BITS)}; got {value}")


def check_quantizer(name: Any, bits: float) -> None:
    """Check the name of a scheme.

    Args:
        name: What a user gave.
        bits: One of `BITS`.

    Raises:
        InputError: It is neither "auto" nor a scheme that is defined at this bit-width.
    """
    if name == "auto":
        return
    if not isinstance(name, str) or name not in SUPPORTED_BITS:
        raise InputError(f"quantizer must be one of auto, {_listed(SUPPORTED_BITS)}; got {name!r}")
    if bits not in SUPPORTED_BITS[name]:
        fitting = [other for other, widths in SUPPORTED_BITS.items() if bits in widths]
        raise InputError(
            f"quantizer {name!r} supports {_listed(SUPPORTED_BITS[name])} bits; got {bits}: "
            f"use quantizer={' or '.join(repr(other) for other in ['auto', *fitting])}"
        )


def _globs(skip: Any) -> tuple[str, ...]:
    """The globs as a tuple; one string is one glob."""
    if isinstance(skip, str):
        return (skip,)
    patterns = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"skip must be a list of globs of module names, such as ('*.mlp.*',); got {skip!r}")
    return patterns


def is_real(value: Any) -> bool:
    """Whether it is a real number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _listed(values: Iterable[Any]) -> str:
    """The values in words, with commas between."""
    return ", ".join(str(value) for value in values)
