"""QuEST: a uniform grid that fits normal numbers, in the coordinates of a Hadamard transform."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, largest_magnitude
from qat.layers.quantizers.hadamard import hadamard
from qat.layers.quantizers.linearization import clamped, held
from qat.layers.quantizers.rounding import floor_scale, straight_through
from qat.layers.quantizers.uniform_grid import UniformGrid

# The largest level, in standard deviations, of the uniform grid with the least squared error for normal numbers.
LARGEST_LEVEL = {1: 0.7978846, 1.58: 1.2240090, 2: 1.4935346, 3: 2.0510684, 4: 2.5139306, 8: 3.9222046}


class QuEST(Quantizer):
    """q = H^T s level(H w / s), with H orthonormal, s = c rms(w) of the row, and n levels evenly between -1 and 1.

    H is the Hadamard transform in blocks of 128, see `hadamard`; n = 2^b, and 3 at 1.58 bits. c minimises the squared
    error for normal numbers. dq/dw = H^T M H with the trust mask M: |level - H w / s| <= 1 / (n - 1), half a spacing,
    that is |H w / s| <= n / (n - 1). No gradient passes through s.

    Codes and mask belong to the transformed weights, not to the weights at the same place; so do `levels`. Codes(q) =
    codes(w), to rounding error, at one scale, and w moved toward q keeps its codes, since (1 - a) w + a q is
    H^T((1 - a) H w + a s level(H w / s)). But a reset changes the row's rms, and with it s, codes and loss.

    Source: QuEST (arXiv 2502.05003, section 3). The code released with it has no level 0 at 1.58 bits, and so two
    levels; here there are the three that c = 1.224 is the best scale of. At 8 bits it has c = 3.885; the least error is
    at 3.922.
    """

    name = "quest"
    supported_bits = (1, 1.58, 2, 3, 4, 8)
    learned_scale = False

    def __init__(self, bits: float) -> None:
        super().__init__(bits)
        self.grid = UniformGrid(self.bits)
        self.trusted = self.grid.count / (self.grid.count - 1)

    @property
    def levels(self) -> tuple[float, ...]:
        return self.grid.levels

    def initial_scale(self, weight: Tensor) -> Tensor:
        # The transform keeps the norm of a row. Squares of the weights themselves could overflow.
        largest = floor_scale(largest_magnitude(weight))
        squares = (weight.detach() / largest).square().sum(dim=-1, keepdim=True)
        return floor_scale(LARGEST_LEVEL[self.bits] * largest * (squares / max(weight.shape[-1], 1)).sqrt())

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.grid.codes(hadamard(weight.detach()) / floor_scale(scale.detach())).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return hadamard(floor_scale(scale) * self.grid.values(codes.to(scale.dtype)))

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        return hadamard(weight.detach()).abs() <= self.trusted * floor_scale(scale.detach())

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        scale = floor_scale(held(scale))
        transformed = hadamard(weight)
        bound = self.trusted * scale
        value = scale * self.grid.values(self.grid.codes(transformed / scale))
        return hadamard(straight_through(value, clamped(transformed, -bound, bound)))
