"""Elastic binarization: one bit, the sign of the weight times a learned scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, gradient_scale, mean_magnitude
from qat.layers.quantizers.linearization import clamped, held
from qat.layers.quantizers.rounding import floor_scale, sign, trained_scale


class BinaryElastic(Quantizer):
    """q = s sign(w) with sign(0) = +1, s learned, starting at mean|w| of the row.

    dq/dw = 1 where |w| <= s, else 0. dq/ds = g * sign(w) everywhere, with g = 1 / sqrt(number of weights). The codes
    are -1 and +1. Source: BiT (arXiv 2205.13016), in the form that ParetoQ (arXiv 2502.02631) uses at one bit.
    """

    name = "binary"
    supported_bits = (1,)
    learned_scale = True

    @property
    def levels(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    def initial_scale(self, weight: Tensor) -> Tensor:
        return floor_scale(mean_magnitude(weight))

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        return sign(weight.detach()).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return floor_scale(scale) * codes.to(scale.dtype)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.detach().abs() <= floor_scale(scale.detach())

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        # The straight-through part, clamp(w, -s, s) with s held fixed, is added to s * sign(w). If s were not held
        # fixed, dq/ds would be sign(w) - w / s, which is not that of the scheme.
        magnitude = trained_scale(scale, gradient_scale(weight, 1)) * sign(held(weight))
        bound = floor_scale(held(scale))
        clipped = clamped(weight, -bound, bound)
        return magnitude + (clipped - held(clipped))
