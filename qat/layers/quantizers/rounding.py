"""The straight-through step that every quantizer shares.

Only the rounding itself is straight-through; everything around it is ordinary torch arithmetic. So the Jacobian of the
gradient is symmetric, in every mode of differentiation (double backward, forward over reverse, vmap). With learned
scales this is not so for a hand-written autograd.Function whose backward recomputes w / s: its vector field is no
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.linearization import held

SCALE_FLOOR = 1e-5


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """The value of one tensor with the derivative of another: value.detach() + (carrier - carrier.detach()).

    The parenthesis is exactly zero, so the result has no rounding error. The form carrier + (value - carrier).detach()
    may be off by one unit in the last place.

    Args:
        value: Gives the value.
        carrier: Gives the derivative; of the same shape.

    Returns:
        A tensor equal to `value`, bit for bit, where `carrier` is finite.
    """
    return held(value) + (carrier - held(carrier))


def round_ste(x: Tensor) -> Tensor:
    """round(x), halves to even, with the derivative of x (Bengio et al., arXiv 1308.3432)."""
    return straight_through(torch.round(x), x)


def sign(x: Tensor) -> Tensor:
    """The signs of the entries, +1 for 0, so that one bit has two levels and not three."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def floor_scale(scale: Tensor) -> Tensor:
    """The scale in use, max(scale, 1e-5): training may push a scale to zero or below."""
    return scale.clamp(min=SCALE_FLOOR)


def trained_scale(scale: Tensor, gradient_scale: float) -> Tensor:
    """The value of `floor_scale(scale)`, bit for bit, with the constant derivative `gradient_scale`.

    The derivative is the same below the floor. Otherwise a scale that fell below it could never rise again.
    """
    return straight_through(floor_scale(scale), scale * gradient_scale)
