"""PARQ: piecewise-affine regularized quantization, annealed from full precision to a uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer, largest_magnitude, mean_magnitude
from qat.layers.quantizers.linearization import held
from qat.layers.quantizers.rounding import floor_scale, straight_through
from qat.layers.quantizers.uniform_grid import UniformGrid


class PiecewiseAffine(Quantizer):
    """A uniform grid of n levels between -s and s, s = min(b mean|w|, max|w|) of the row held constant.

    n = 2^b, and 3 at 1.58 bits. q is the nearest level. In training the forward pass computes with `annealed`, the
    proximal map of a piecewise-affine regularizer: between neighbouring levels l < u with midpoint c,
    p = clamp(c + (w - c) / r, l, u), and beyond the outer levels p = -s or s. The inverse slope r falls from 1, where
    p = w everywhere, to 0, where p = q. `qat.PARQ` sets it along a training; outside it is 0.

    dq/dw = dp/dw = 1 everywhere: the gradient is taken at p and applied to w, as the aggregate proximal gradient method
    does. The mask is True. No gradient passes through s, and a reset changes s, and with it codes and loss.

    Source: PARQ (Jin et al., arXiv 2503.15748), with the uniform grid of torchao's implementation.
    """

    name = "parq"
    supported_bits = (1, 1.58, 2, 3, 4, 8)
    learned_scale = False
    anneals = True

    def __init__(self, bits: float) -> None:
        super().__init__(bits)
        self.grid = UniformGrid(self.bits)
        # A tensor, so that a compiled training step sees each new value without being compiled again.
        self.inverse_slope = torch.zeros(())

    @property
    def levels(self) -> tuple[float, ...]:
        return self.grid.levels

    def set_inverse_slope(self, value: float, device: torch.device) -> None:
        """Set r: 1 is full precision, 0 the grid.

        Args:
            value: r, 0 to 1.
            device: Where the weights are.
        """
        if self.inverse_slope.device == device:
            self.inverse_slope.fill_(value)
        else:
            self.inverse_slope = torch.full((), value, device=device)

    def initial_scale(self, weight: Tensor) -> Tensor:
        return floor_scale(torch.minimum(self.bits * mean_magnitude(weight), largest_magnitude(weight)))

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.grid.codes(weight.detach() / floor_scale(scale.detach())).to(torch.int8)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return floor_scale(scale) * self.grid.values(codes.to(scale.dtype))

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        scale = floor_scale(held(scale))
        return straight_through(scale * self.grid.values(self.grid.codes(weight / scale)), weight)

    def annealed(self, weight: Tensor, scale: Tensor) -> Tensor:
        """p with the derivative of w, see the class."""
        scale, inverse_slope = floor_scale(held(scale)), self.inverse_slope
        steps = weight / scale * self.grid.half
        below = torch.floor(steps - self.grid.shift).clamp(self.grid.lowest, self.grid.highest - 1)
        middle = below + (self.grid.shift + 0.5)
        inside = middle + ((steps - middle) / inverse_slope).clamp(-0.5, 0.5)
        on_grid = self.grid.codes(weight / scale) + self.grid.shift
        value = scale * (torch.where(inverse_slope > 0, inside, on_grid) / self.grid.half)
        return straight_through(torch.where(inverse_slope < 1, value, weight), weight)
