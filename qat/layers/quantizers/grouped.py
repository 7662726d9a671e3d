"""One scale for each group of neighbouring columns, for any scheme with one scale a row."""

from __future__ import annotations

from torch import Tensor

from qat.layers.quantizers.base import Quantizer


class Grouped(Quantizer):
    """A scheme that gets each row cut into groups of columns, as rows of their own.

    Shapes: weight (rows, columns), scale (rows, groups), columns = groups * size. The gradient of a learned scale is
    scaled by the number of all weights of the tensor, as without groups.

    Args:
        scheme: The quantizer of a group.
        size: Columns of a group.
    """

    def __init__(self, scheme: Quantizer, size: int) -> None:
        self.name, self.supported_bits, self.learned_scale = scheme.name, scheme.supported_bits, scheme.learned_scale
        super().__init__(scheme.bits)
        self.scheme, self.size = scheme, size

    @property
    def levels(self) -> tuple[float, ...]:
        return self.scheme.levels

    def initial_scale(self, weight: Tensor) -> Tensor:
        groups = weight.shape[-1] // self.size
        return self.scheme.initial_scale(self._cut(weight)).reshape(*weight.shape[:-1], groups)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.scheme.codes(self._cut(weight), _column(scale)).reshape(weight.shape)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self.scheme.dequantize(self._cut(codes), _column(scale)).reshape(codes.shape)

    def mask(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.scheme.mask(self._cut(weight), _column(scale)).reshape(weight.shape)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.scheme(self._cut(weight), _column(scale)).reshape(weight.shape)

    def annealed(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.scheme.annealed(self._cut(weight), _column(scale)).reshape(weight.shape)

    def _cut(self, rows: Tensor) -> Tensor:
        """(rows, columns) as (rows * groups, size)."""
        return rows.reshape(rows.numel() // self.size, self.size)

    def __repr__(self) -> str:
        return f"{type(self.scheme).__name__}(bits={self.bits}, group_size={self.size})"


def _column(scale: Tensor) -> Tensor:
    """(rows, groups) as (rows * groups, 1)."""
    return scale.reshape(scale.numel(), 1)
