"""Every weight quantizer by its name. A new scheme is a file beside this one and its class in `SCHEMES`."""

from __future__ import annotations

from typing import Any

from qat.layers.bits import listed, parse_bits
from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.binary import BinaryElastic
from qat.layers.quantizers.bitnet import BitNet
from qat.layers.quantizers.lsq import LearnedStepSize
from qat.layers.quantizers.parq import PiecewiseAffine
from qat.layers.quantizers.quest import QuEST
from qat.layers.quantizers.rtn import RoundToNearest
from qat.layers.quantizers.seq import StretchedElastic
from spectra.backend.errors import InputError

SCHEMES: tuple[type[Quantizer], ...] = (
    RoundToNearest,
    LearnedStepSize,
    StretchedElastic,
    BinaryElastic,
    BitNet,
    QuEST,
    PiecewiseAffine,
)
QUANTIZERS: dict[str, type[Quantizer]] = {scheme.name: scheme for scheme in SCHEMES}

# The bit-widths that each scheme is defined for.
SUPPORTED_BITS: dict[str, tuple[float, ...]] = {scheme.name: scheme.supported_bits for scheme in SCHEMES}

# The scheme that quantizer="auto" chooses: what ParetoQ (arXiv 2502.02631) uses at each width.
AUTO_QUANTIZER: dict[float, str] = {1: "binary", 1.58: "seq", 2: "seq", 3: "lsq", 4: "lsq", 8: "lsq"}


def make_quantizer(name: str, bits: float) -> Quantizer:
    """The quantizer of that name at that bit-width.

    Args:
        name: A scheme, or "auto" to choose it by bit-width.
        bits: The bit-width.

    Returns:
        The quantizer.

    Raises:
        InputError: The name is unknown, or the scheme is not defined at this bit-width.

    Example:
        >>> make_quantizer("auto", 2)
        StretchedElastic(bits=2)
    """
    bits = parse_bits(bits)
    check_quantizer(name, bits)
    return QUANTIZERS[AUTO_QUANTIZER[bits] if name == "auto" else name](bits)


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
        raise InputError(f"quantizer must be one of auto, {listed(SUPPORTED_BITS)}; got {name!r}")
    if bits not in SUPPORTED_BITS[name]:
        fitting = [other for other, widths in SUPPORTED_BITS.items() if bits in widths]
        raise InputError(
            f"quantizer {name!r} supports {listed(SUPPORTED_BITS[name])} bits; got {bits}: "
            f"use quantizer={' or '.join(repr(other) for other in ['auto', *fitting])}"
        )
