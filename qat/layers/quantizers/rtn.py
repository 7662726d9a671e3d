"""Round to nearest: a uniform grid whose scale is computed from the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, largest_magnitude_scale
from qat.layers.quantizers.linearization import clamped, held
from qat.layers.quantizers.rounding import floor_scale, round_ste


class RoundToNearest(Quantizer):
    """q = s clamp(round(w / s), -2^(b-1), 2^(b-1) - 1), with s = max|w| / (2^(b-1) - 1) of the row held constant.

    dq/dw = 1 where w / s lies within the bounds, which is everywhere as long as s is computed from the row. No
    gradient passes through s. For 2, 3, 4 and 8 bits.
    """

    name = "rtn"
    supported_bits = (2, 3, 4, 8)
    learned_scale = False

    def __init__(self, bits: float) -> None:
        super().__init__(bits)
        self.lowest = -(2 ** (int(bits) - 1))
        self.highest = 2 ** (int(bits) - 1) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(float(level) for level in range(self.lowest, self.highest + 1))

    def initial_scale(self, weight: Tensor) -> Tensor:
        return largest_magnitude_scale(weight, self.highest)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        position = weight.detach() / floor_scale(scale.detach())
        return torch.round(position.clamp(self.lowest, self.highest)).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return floor_scale(scale) * codes.to(scale.dtype)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        position = weight.detach() / floor_scale(scale.detach())
        return (position >= self.lowest) & (position <= self.highest)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self._quantize(weight, floor_scale(held(scale)))

    def _quantize(self, weight: Tensor, scale: Tensor) -> Tensor:
        """scale * clamp(round(weight / scale)) with straight-through rounding."""
        return scale * round_ste(clamped(weight / scale, self.lowest, self.highest))
