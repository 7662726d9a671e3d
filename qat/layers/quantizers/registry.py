"""Every weight quantizer by its name."""

from __future__ import annotations

from qat.layers.config import AUTO_QUANTIZER, check_quantizer, parse_bits
from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.binary import BinaryElastic
from qat.layers.quantizers.lsq import LearnedStepSize
from qat.layers.quantizers.rtn import RoundToNearest
from qat.layers.quantizers.seq import StretchedElastic

QUANTIZERS: dict[str, type[Quantizer]] = {
    scheme.name: scheme for scheme in (RoundToNearest, LearnedStepSize, StretchedElastic, BinaryElastic)
}


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
