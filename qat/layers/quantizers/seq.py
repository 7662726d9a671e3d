"""Stretched elastic quantization: evenly spaced levels in [-s, s], for 1.58 and 2 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, gradient_scale, largest_magnitude_scale
from qat.layers.quantizers.linearization import clamped
from qat.layers.quantizers.rounding import floor_scale, round_ste, trained_scale

# Less than 1, since rounding at 1 would give a fifth level at 2 bits.
CLIP = 0.99


class StretchedElastic(Quantizer):
    """q = s (round(n clamp(w / s, -.99, .99) - h) + h) / n, s learned, starting at max|w| of the row.

    2 bits: n = 2, h = 1/2, levels -3/4, -1/4, 1/4, 3/4. 1.58 bits: n = 3/2, h = 0, levels -2/3, 0, 2/3.
    dq/dw = 1 where |w / s| <= .99, else 0. dq/ds = g * (q / s - w / s) there, else g times the outermost level, with
    g = 1 / sqrt(number of weights). Source: ParetoQ (arXiv 2502.02631, section 3). This differs from the code released
    with ParetoQ at 1.58 bits: there dq/ds of a clipped weight is +-1; the derivative is +-2/3, the outermost level.
    """

    name = "seq"
    supported_bits = (1.58, 2)
    learned_scale = True

    def __init__(self, bits: float) -> None:
        super().__init__(bits)
        self.stretch, self.shift = (2.0, 0.5) if self.bits == 2 else (1.5, 0.0)

    @property
    def levels(self) -> tuple[float, ...]:
        codes = (-2, -1, 0, 1) if self.bits == 2 else (-1, 0, 1)
        return tuple((code + self.shift) / self.stretch for code in codes)

    def initial_scale(self, weight: Tensor) -> Tensor:
        return largest_magnitude_scale(weight, 1)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        position = (weight.detach() / floor_scale(scale.detach())).clamp(-CLIP, CLIP)
        return torch.round(self.stretch * position - self.shift).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return floor_scale(scale) * ((codes.to(scale.dtype) + self.shift) / self.stretch)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        position = weight.detach() / floor_scale(scale.detach())
        return (position >= -CLIP) & (position <= CLIP)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        scale = trained_scale(scale, gradient_scale(weight, 1))
        position = clamped(weight / scale, -CLIP, CLIP)
        return scale * ((round_ste(self.stretch * position - self.shift) + self.shift) / self.stretch)
