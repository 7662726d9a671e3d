"""Weight quantizers: one scheme a file, one interface, found by name."""

from __future__ import annotations

from qat.config import AUTO_QUANTIZER, check_quantizer, parse_bits
from qat.quantizers.base import Quantizer
from qat.quantizers.binary import BinaryElastic
from qat.quantizers.lsq import LearnedStepSize
from qat.quantizers.rounding import round_ste
from qat.quantizers.rtn import RoundToNearest
from qat.quantizers.seq import StretchedElastic

QUANTIZERS: dict[str, type[Quantizer]] = {
    scheme.name: scheme for scheme in (RoundToNearest, LearnedStepSize, StretchedElastic, BinaryElastic)
}


def make_quantizer(name: str, bits: float) -> Quantizer:
    """The quantizer of that name at that bit-width; "auto" picks the scheme by the bit-width.

    Raises InputError for an unknown name or a bit-width that the scheme is not defined at.
    """
    bits = parse_bits(bits)
    check_quantizer(name, bits)
    return QUANTIZERS[AUTO_QUANTIZER[bits] if name == "auto" else name](bits)


__all__ = [
    "QUANTIZERS",
    "BinaryElastic",
    "LearnedStepSize",
    "Quantizer",
    "RoundToNearest",
    "StretchedElastic",
    "make_quantizer",
    "round_ste",
]
