"""The interface that every weight quantizer has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from qat.layers.config import SUPPORTED_BITS, check_quantizer, parse_bits
from qat.layers.quantizers.rounding import floor_scale


class Quantizer(ABC):
    """A scheme: weights w become q = s * level, with one scale s for each row and few levels.

    Shapes: weight (rows, columns), with a row for each output feature; scale (rows, 1) of the same dtype; codes
    (rows, columns), int8. `quantizer(w, s)` has the value of `dequantize(codes(w, s), s)`, bit for bit, and the
    derivatives of the scheme's straight-through estimator. Every code is monotone in w, and codes(q) = codes(w). So a
    weight that moves part of the way toward q keeps its code if the scale does not change.

    Args:
        bits: The bit-width.

    Raises:
        InputError: The scheme is not defined at this bit-width.
    """

    name: ClassVar[str]
    learned_scale: ClassVar[bool]

    def __init__(self, bits: float) -> None:
        self.bits = parse_bits(bits)
        check_quantizer(self.name, self.bits)

    @property
    def supported_bits(self) -> tuple[float, ...]:
        """The bit-widths that the scheme is defined at."""
        return SUPPORTED_BITS[self.name]

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The values of q / scale, ascending."""

    @abstractmethod
    def initial_scale(self, weight: Tensor) -> Tensor:
        """The scale to start from, (rows, 1), positive, without a graph."""

    @abstractmethod
    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The integer code of each weight, (rows, columns) int8."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The value that each code stands for, (rows, columns) in the scale's dtype."""

    @abstractmethod
    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Where the gradient reaches the weight: True inside the clip bounds, bounds included. (rows, columns) bool."""

    @abstractmethod
    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The quantized weight with its straight-through derivatives, (rows, columns)."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits})"


def gradient_scale(weight: Tensor, top: float) -> float:
    """The factor on a scale's gradient, 1 / sqrt(number of weights * top).

    It brings the gradient of a scale to the size of that of a weight (LSQ, arXiv 1902.08153, section 2.2). All weights
    of the tensor are counted, as in ParetoQ (arXiv 2502.02631), not those of the row that a scale belongs to.

    Args:
        weight: (rows, columns).
        top: The largest level.

    Returns:
        The factor.
    """
    return 1.0 / math.sqrt(weight.numel() * top)


def largest_magnitude_scale(weight: Tensor, top: float) -> Tensor:
    """The scale max|w| / top of each row: the largest weight of a row lies on the clip bound and is not clipped.

    If the division rounded down, the next larger float is used. Otherwise rounding error would clip the largest weight,
    and it would have no gradient, here or in a float64 copy of the layer.

    Args:
        weight: (rows, columns).
        top: The largest level.

    Returns:
        (rows, 1), without a graph.
    """
    largest = weight.detach().abs().amax(dim=1, keepdim=True)
    scale = largest / top
    short = (scale.double() * top < largest.double()) | (largest / scale > top)
    above = torch.nextafter(scale, torch.full_like(scale, math.inf))
    return floor_scale(torch.where(short, above, scale))
