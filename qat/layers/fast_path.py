"""Quantized weights for training in few passes over the memory: the built-in schemes with a hand-written backward.

As a chain of torch operations, a quantizer reads and writes a whole weight ten to fifteen times, and again in the
backward pass. In an eager training step with few tokens that takes up to half of the time. `quantize` computes the same
values and derivatives with a third of these passes.

The chain is used wherever more than values and derivatives is asked for: by torch.compile, which fuses it; under
torch.func and forward-mode differentiation; and while `spectra` records a linearization. It is used for every scheme
that has no entry in `SCHEMES`, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qat.layers.quantizers import linearization
from qat.layers.quantizers.base import Quantizer, gradient_scale
from qat.layers.quantizers.binary import BinaryElastic
from qat.layers.quantizers.lsq import LearnedStepSize
from qat.layers.quantizers.rounding import floor_scale
from qat.layers.quantizers.rtn import RoundToNearest
from qat.layers.quantizers.seq import CLIP, StretchedElastic


@dataclass(frozen=True)
class Scheme:
    """How one scheme is computed without its chain.

    Attributes:
        forward: From (quantizer, weight, scale): the quantized weight q, and a number x for each weight. The weight is
            not clipped, and gets a gradient, where low <= x <= high.
        bounds: From a quantizer: low and high.
        top: From a quantizer: the largest level that `gradient_scale` counts with; None where no scale is learned.
        follows: Whether x is w / s, and dq/ds = q / s - x where the weight is not clipped; else dq/ds = q / s.
    """

    forward: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    bounds: Callable[[Any], tuple[float, float]]
    top: Callable[[Any], float] | None = None
    follows: bool = True


def quantize(quantizer: Quantizer, weight: Tensor, scale: Tensor) -> Tensor:
    """The quantized weight with its straight-through derivatives: `quantizer(weight, scale)`, computed faster.

    For finite weights the value is the same, bit for bit; gradients differ by rounding errors at most. In the backward
    pass, clip mask and levels are constants, as in the chain. So it can be differentiated twice, and the Hessian in
    weights and scales is symmetric.

    Args:
        quantizer: The scheme.
        weight: (rows, columns).
        scale: (rows, 1).

    Returns:
        (rows, columns).
    """
    scheme = SCHEMES.get(type(quantizer))
    if scheme is None or scale.shape != (weight.shape[0], 1) or not weight.numel() or _needs_chain():
        return quantizer(weight, scale)
    if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad):
        return _Quantize.apply(weight, scale, quantizer, scheme)[0]  # type: ignore[index]
    return scheme.forward(quantizer, weight, floor_scale(scale))[0]


def _needs_chain() -> bool:
    """Whether something is at work that differentiates, fuses or records the single operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or linearization._current is not None
    )


class _Quantize(torch.autograd.Function):
    """The quantized weight q and x of `Scheme`, of which only q has derivatives."""

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, quantizer: Quantizer, scheme: Scheme) -> tuple[Tensor, Tensor]:
        return scheme.forward(quantizer, weight, floor_scale(scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, scale, ctx.quantizer, ctx.scheme = inputs
        quantized, x = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(x)
        ctx.save_for_backward(quantized, x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        grad, scheme = grads[0], ctx.scheme
        if grad is None:
            return None, None, None, None
        # Constants, also when this is differentiated: a graph through them would make the Hessian unsymmetric.
        quantized, x, scale = (tensor.detach() for tensor in ctx.saved_tensors)
        low, high = scheme.bounds(ctx.quantizer)
        # The gradient where low < x < high: the next floats outward make it low <= x <= high.
        within = _outward(low, -math.inf, x.dtype), _outward(high, math.inf, x.dtype)
        of_weight = torch.ops.aten.hardtanh_backward(grad, x, *within)
        if scheme.top is None or not ctx.needs_input_grad[1]:
            return of_weight, None, None, None
        slope = (grad * quantized).sum(dim=1, keepdim=True) / floor_scale(scale)
        if scheme.follows:
            slope = slope - (of_weight * x).sum(dim=1, keepdim=True)
        return of_weight, gradient_scale(x, scheme.top(ctx.quantizer)) * slope, None, None


@functools.cache
def _outward(bound: float, direction: float, dtype: torch.dtype) -> float:
    """The next float of this dtype after the bound, toward -inf or inf. Next to zero, the smallest that is normal."""
    if bound == 0:
        return math.copysign(torch.finfo(dtype).tiny, direction)
    return torch.nextafter(torch.tensor(bound, dtype=dtype), torch.tensor(direction, dtype=dtype)).item()


def _uniform(quantizer: RoundToNearest, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s round(clamp(w / s)), and w / s."""
    position = weight / scale
    return position.clamp(quantizer.lowest, quantizer.highest).round_().mul_(scale), position


def _stretched(quantizer: StretchedElastic, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s (round(n clamp(w / s) - h) + h) / n, and w / s."""
    position = weight / scale
    level = position.clamp(-CLIP, CLIP).mul_(quantizer.stretch).sub_(quantizer.shift).round_()
    return level.add_(quantizer.shift).div_(quantizer.stretch).mul_(scale), position


def _binary(quantizer: BinaryElastic, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s sign(w), and s - |w|. It is NaN where the weight is, as in the chain: a broken training should be seen."""
    room = scale - weight.abs()
    return torch.copysign(scale, weight + 0.0).add_(room - room), room  # + 0.0: the sign of -0.0 is + here


_OF_UNIFORM = {"forward": _uniform, "bounds": lambda quantizer: (quantizer.lowest, quantizer.highest)}

SCHEMES: dict[type[Quantizer], Scheme] = {
    RoundToNearest: Scheme(**_OF_UNIFORM),
    LearnedStepSize: Scheme(**_OF_UNIFORM, top=lambda quantizer: quantizer.highest),
    StretchedElastic: Scheme(_stretched, lambda quantizer: (-CLIP, CLIP), lambda quantizer: 1.0),
    BinaryElastic: Scheme(_binary, lambda quantizer: (0.0, math.inf), lambda quantizer: 1.0, follows=False),
}
