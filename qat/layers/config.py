"""What to quantize and how: the settings of a conversion, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from qat.layers.bits import BITS, is_real, listed, parse_bits
from qat.layers.quantizers.registry import AUTO_QUANTIZER, QUANTIZERS, SUPPORTED_BITS, check_quantizer
from qat.layers.quantizers.scale_search import INITIAL_SCALES
from spectra.backend.errors import InputError

__all__ = ["AUTO_QUANTIZER", "BITS", "INITIAL_SCALES", "SUPPORTED_BITS", "QuantConfig", "check_quantizer", "is_real"]
__all__ += ["parse_bits"]


@dataclass(frozen=True)
class QuantConfig:
    """Which weights become low-bit, at which width and by which scheme.

    Args:
        bits: 1, 1.58, 2, 3, 4 or 8, as a number or as text.
        quantizer: A scheme in `SUPPORTED_BITS`, or "auto": "binary" at 1 bit, "seq" at 1.58 and 2, "lsq" from 3.
        group_size: How many neighbouring columns of a row share a scale, 2 or more; None is one scale a row. The width
            of every quantized weight has to be a multiple of it.
        initial_scale: What learned scales start from. "max" is the scheme's own start: the largest magnitude of the row
            or group, and at 1 bit the mean magnitude. "mse" searches the scale with the least squared error of Q(W).
        activation_bits: 16; activations are not quantized.
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
    group_size: int | None = None
    initial_scale: str = "max"
    activation_bits: int = 16
    quantize_head: bool = False
    quantize_embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits = parse_bits(self.bits)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "skip", _globs(self.skip))
        check_quantizer(self.quantizer, bits)
        self._check_scales()
        if self.activation_bits != 16:
            raise InputError(
                f"activation_bits must be 16 (activations stay in full precision); got {self.activation_bits!r}"
            )
        for name in ("quantize_head", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False; got {getattr(self, name)!r}")

    def _check_scales(self) -> None:
        """Raises InputError for a group size or a start of the scales that the scheme does not have."""
        scheme, size = QUANTIZERS[self.scheme], self.group_size
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 2:
                raise InputError(
                    f"group_size must be a whole number of columns, 2 or more, or None for one scale a row; "
                    f"got {size!r}"
                )
            object.__setattr__(self, "group_size", int(size))
            if not scheme.grouped:
                raise InputError(
                    f"quantizer {scheme.name!r} has one scale for the whole tensor, and got group_size={size}: "
                    "leave group_size out, or use another quantizer"
                )
        if self.initial_scale not in INITIAL_SCALES:
            raise InputError(f"initial_scale must be one of {listed(INITIAL_SCALES)}; got {self.initial_scale!r}")
        if self.initial_scale == "mse" and not scheme.learned_scale:
            raise InputError(
                f"initial_scale='mse' is where a learned scale starts; quantizer {scheme.name!r} computes its scale "
                "from the weights: leave initial_scale at 'max'"
            )

    @property
    def scheme(self) -> str:
        """The name of the quantizer in use, with "auto" resolved."""
        return AUTO_QUANTIZER[self.bits] if self.quantizer == "auto" else self.quantizer


def _globs(skip: Any) -> tuple[str, ...]:
    """The globs as a tuple; one string is one glob."""
    if isinstance(skip, str):
        return (skip,)
    patterns = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"skip must be a list of globs of module names, such as ('*.mlp.*',); got {skip!r}")
    return patterns
