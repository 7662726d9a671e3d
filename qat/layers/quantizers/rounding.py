"""The straight-through step that every quantizer shares.

Only the step itself is written straight-through; everything around it is ordinary torch arithmetic. A hand-written
autograd.Function whose backward recomputes w / s gives a gradient field that is not a gradient of anything once
scales are learned: its Jacobian is not symmetric. These forms keep it symmetric, to every order and in every mode of
differentiation (double backward, forward over reverse, vmap).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 1e-5


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` going forward, bit for bit, with the derivative of `carrier` going backward.

    value.detach() + (carrier - carrier.detach()): the bracket is exactly zero, so that nothing is rounded, where
    carrier + (value - carrier).detach() may be one unit in the last place off `value`.
    """
    return value.detach() + (carrier - carrier.detach())


def round_ste(x: Tensor) -> Tensor:
    """round(x), halves to even, with the derivative of x (Bengio et al., arXiv 1308.3432)."""
    return straight_through(torch.round(x), x)


def sign(x: Tensor) -> Tensor:
    """The sign of x with sign(0) = +1, so that one bit has two levels and not three."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def floor_scale(scale: Tensor) -> Tensor:
    """The scale in use, max(scale, 1e-5): a scale that a step pushed to zero or below still divides."""
    return scale.clamp(min=SCALE_FLOOR)


def trained_scale(scale: Tensor, gradient_scale: float) -> Tensor:
    """`floor_scale(scale)` going forward, bit for bit, with the derivative `gradient_scale` going backward.

    The derivative holds below the floor too: without it a scale that fell there could never come back.
    """
    return straight_through(floor_scale(scale), scale * gradient_scale)
