"""Learned step size quantization: the uniform grid of round to nearest, with a scale that is trained."""

from __future__ import annotations

from torch import Tensor

from qat.layers.quantizers.base import gradient_scale
from qat.layers.quantizers.rounding import trained_scale
from qat.layers.quantizers.rtn import RoundToNearest


class LearnedStepSize(RoundToNearest):
    """q = s clamp(round(w / s), Qn, Qp), Qn = -2^(b-1), Qp = 2^(b-1) - 1, s learned, starting at max|w| / Qp.

    dq/dw = 1 where Qn <= w / s <= Qp, else 0. dq/ds = g * (round(w / s) - w / s) there, else g * Qn or g * Qp, with
    g = 1 / sqrt(number of weights * Qp). For 3, 4 and 8 bits. Source: LSQ (arXiv 1902.08153, section 2.1), as ParetoQ
    (arXiv 2502.02631) uses it.
    """

    name = "lsq"
    supported_bits = (3, 4, 8)
    learned_scale = True

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self._quantize(weight, trained_scale(scale, gradient_scale(weight, self.highest)))
