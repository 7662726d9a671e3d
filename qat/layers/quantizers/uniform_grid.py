"""Evenly spaced levels between -1 and 1, for schemes whose scale is the largest quantized value."""

from __future__ import annotations

import torch
from torch import Tensor


class UniformGrid:
    """The levels (code + shift) / half between -1 and 1, both included, none at 0 where their count is even.

    Args:
        bits: The bit-width: 2^bits levels, or 3 at 1.58 bits.
    """

    def __init__(self, bits: float) -> None:
        self.count = 3 if bits == 1.58 else 2 ** int(bits)
        self.lowest, self.highest = -(self.count // 2), (self.count - 1) // 2
        self.shift = 0.0 if self.count % 2 else 0.5
        self.half = (self.count - 1) / 2  # in spacings, from 0 to 1

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels, ascending."""
        return tuple((code + self.shift) / self.half for code in range(self.lowest, self.highest + 1))

    def codes(self, position: Tensor) -> Tensor:
        """The code of the nearest level, in the dtype of `position`.

        Args:
            position: Values in the unit of the levels, of any shape.

        Returns:
            Codes. Where two levels are equally near: the upper one, but 0 for three levels. So 0 has a code above it
            in the grids that have no level 0.
        """
        steps = position * self.half
        return (torch.floor(steps) if self.shift else torch.round(steps)).clamp(self.lowest, self.highest)

    def values(self, codes: Tensor) -> Tensor:
        """The level of each code."""
        return (codes + self.shift) / self.half
