"""BitNet b1.58: three levels, and one scale for the whole tensor, computed from the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, mean_magnitude
from qat.layers.quantizers.linearization import held
from qat.layers.quantizers.rounding import floor_scale, straight_through


class BitNet(Quantizer):
    """q = b clamp(round(w / b), -1, 1), with b = mean|w| of the whole tensor held constant, at least 1e-5.

    dq/dw = 1 everywhere, outside the levels too: no weight is clipped for good, and the mask is True. No gradient
    passes through b. A reset changes b, and with it codes and loss. Source: BitNet b1.58 (arXiv 2402.17764, section 2).
    """

    name = "bitnet"
    supported_bits = (1.58,)
    learned_scale = False
    grouped = False

    @property
    def levels(self) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0)

    def initial_scale(self, weight: Tensor) -> Tensor:
        return floor_scale(mean_magnitude(weight.flatten(-2)[..., None, :])).expand(*weight.shape[:-1], 1)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        return _rounded(weight.detach(), floor_scale(scale.detach())).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return floor_scale(scale) * codes.to(scale.dtype)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        scale = floor_scale(held(scale))
        return straight_through(scale * _rounded(weight, scale), weight)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.round((weight / scale).clamp(-1, 1))
