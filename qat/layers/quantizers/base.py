"""The interface that every weight quantizer has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qat.layers.bits import listed, parse_bits
from qat.layers.quantizers.rounding import SCALE_FLOOR, floor_scale
from spectra.backend.errors import InputError


class Quantizer(ABC):
    """A scheme: weights w become q = s * level, with one scale s for each row and few levels.

    Shapes: weight (rows, columns), with a row for each output feature; scale (rows, 1) of the same dtype; codes
    (rows, columns), int8. `quantizer(w, s)` has the value of `dequantize(codes(w, s), s)`, bit for bit, and the
    derivatives of the scheme's straight-through estimator. Every code is monotone in w, and codes(q) = codes(w). So a
    weight that moves part of the way toward q keeps its code if the scale does not change.

    Args:
        bits: The bit-width.

    Attributes:
        name: What `QuantConfig(quantizer=)` calls it.
        supported_bits: The bit-widths that it is defined at.
        learned_scale: Whether its scale is a parameter, and not computed from the weights.
        grouped: Whether it can have a scale for each group of columns.
        anneals: Whether training computes with `annealed`.

    Raises:
        InputError: The scheme is not defined at this bit-width.
    """

    name: str
    supported_bits: tuple[float, ...]
    learned_scale: bool
    grouped: bool = True
    anneals: bool = False

    def __init__(self, bits: float) -> None:
        self.bits = parse_bits(bits)
        if self.bits not in self.supported_bits:
            raise InputError(
                f"quantizer {self.name!r} supports {listed(self.supported_bits)} bits; got {self.bits}: "
                "use quantizer='auto'"
            )

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

    def annealed(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that the forward pass of training computes with, (rows, columns).

        It is `self(weight, scale)`, unless the scheme begins in full precision and is annealed to its grid.
        """
        return self(weight, scale)

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
    return 1.0 / math.sqrt(max(weight.numel(), 1) * top)


def largest_magnitude(weight: Tensor) -> Tensor:
    """max|w| of each row, (rows, 1), without a graph; the floor of the scales for rows without columns."""
    if weight.shape[-1] == 0:
        return weight.new_full((*weight.shape[:-1], 1), SCALE_FLOOR)
    return weight.detach().abs().amax(dim=-1, keepdim=True)


def mean_magnitude(weight: Tensor) -> Tensor:
    """mean|w| of each row, (rows, 1), without a graph; the floor of the scales for rows without columns."""
    if weight.shape[-1] == 0:
        return largest_magnitude(weight)
    return weight.detach().abs().mean(dim=-1, keepdim=True)


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
    largest = largest_magnitude(weight)
    scale = largest / top
    short = (scale.double() * top < largest.double()) | (largest / scale > top)
    above = torch.nextafter(scale, torch.full_like(scale, math.inf))
    return floor_scale(torch.where(short, above, scale))
