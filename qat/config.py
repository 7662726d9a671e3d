"""What to quantize and how, and when to reset: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from spectra.errors import InputError

BITS = (1, 1.58, 2, 3, 4, 8)

# The bit-widths that each scheme is defined for; the schemes themselves are in qat/quantizers.
SUPPORTED_BITS: dict[str, tuple[float, ...]] = {
    "rtn": (2, 3, 4, 8),
    "lsq": (3, 4, 8),
    "seq": (1.58, 2),
    "binary": (1,),
}

# What quantizer="auto" stands for.
AUTO_QUANTIZER: dict[float, str] = {1: "binary", 1.58: "seq", 2: "seq", 3: "lsq", 4: "lsq", 8: "lsq"}


@dataclass(frozen=True)
class QuantConfig:
    """Which weights become low-bit, at which width and by which scheme.

    bits: 1, 1.58, 2, 3, 4 or 8, as a number or as text. quantizer: a name in `SUPPORTED_BITS`, or "auto" for binary
    at 1 bit, seq at 1.58 and 2, lsq from 3. activation_bits: 16, activations are left alone. quantize_head,
    quantize_embeddings: also the output head, the token embeddings. skip: globs of module names to leave in full
    precision; a glob that matches a parent takes everything below it.
    Raises InputError where a value is not supported, naming those that are.
    """

    bits: float = 2
    quantizer: str = "auto"
    activation_bits: int = 16
    quantize_head: bool = False
    quantize_embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits = parse_bits(self.bits)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "skip", _globs(self.skip))
        check_quantizer(self.quantizer, bits)
        if self.activation_bits != 16:
            raise InputError(
                f"activation_bits must be 16 (activations stay in full precision); got {self.activation_bits!r}"
            )
        for name in ("quantize_head", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False; got {getattr(self, name)!r}")

    @property
    def scheme(self) -> str:
        """The name of the quantizer in use, with "auto" resolved."""
        return AUTO_QUANTIZER[self.bits] if self.quantizer == "auto" else self.quantizer


@dataclass(frozen=True)
class WinQConfig:
    """When WinQ resets the weights, how far, and how much noise it trains with (arXiv 2605.17471).

    every: a whole number of steps (resets at each multiple), or a fraction of the run strictly between 0 and 1
    (0.25 resets at 1/4, 1/2 and 3/4 of it). alpha: the share of the way that a reset moves the weights toward
    Q(W). sigma: the standard deviation of the weight noise, in units of the weights. noise_scales: the same noise on
    the learned scales. Raises InputError where a value is out of range.
    """

    every: float = 0.25
    alpha: float = 0.4
    sigma: float = 1e-3
    noise_scales: bool = False

    def __post_init__(self) -> None:
        check_every(self.every)
        if not _is_real(self.alpha) or not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must lie between 0 (no reset) and 1 (onto the grid); got {self.alpha!r}")
        if not _is_real(self.sigma) or not 0 <= self.sigma < math.inf:
            raise InputError(f"sigma must be 0 (no noise) or a finite positive number; got {self.sigma!r}")
        if not isinstance(self.noise_scales, bool):
            raise InputError(f"noise_scales must be True or False; got {self.noise_scales!r}")


def parse_bits(value: Any) -> float:
    """The bit-width that a number or a text stands for: one of `BITS`, an int where it is whole.

    Raises InputError for anything else.
    """
    number = math.nan
    if _is_real(value) or isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    for bits in BITS:
        if number == bits:
            return bits
    raise InputError(f"bits must be one of {_listed(BITS)}; got {value}")


def check_quantizer(name: Any, bits: float) -> None:
    """Raises InputError unless `name` is "auto" or a scheme that is defined at this bit-width."""
    if name == "auto":
        return
    if not isinstance(name, str) or name not in SUPPORTED_BITS:
        raise InputError(f"quantizer must be one of auto, {_listed(SUPPORTED_BITS)}; got {name!r}")
    if bits not in SUPPORTED_BITS[name]:
        able = [other for other, widths in SUPPORTED_BITS.items() if bits in widths]
        raise InputError(
            f"quantizer {name!r} supports {_listed(SUPPORTED_BITS[name])} bits; got {bits}: "
            f"use quantizer={' or '.join(repr(other) for other in ['auto', *able])}"
        )


def check_every(every: Any) -> None:
    """Raises InputError unless `every` is a whole number of steps from 1 or a fraction strictly between 0 and 1."""
    whole = isinstance(every, Integral) and not isinstance(every, bool) and int(every) >= 1
    fraction = _is_real(every) and not isinstance(every, Integral) and 0 < every < 1
    if not (whole or fraction):
        raise InputError(
            "every must be a whole number of steps, 1 or more, or a fraction of the run between 0 and 1; "
            f"got {every!r}: use every=1000 for steps or every=0.25 for quarters"
        )


def _globs(skip: Any) -> tuple[str, ...]:
    if isinstance(skip, str):
        return (skip,)
    patterns = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"skip must be a list of globs of module names, such as ('*.mlp.*',); got {skip!r}")
    return patterns


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
