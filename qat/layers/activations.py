"""Quantized activations: each token on a grid of its own, whose range is measured at every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.layers.quantizers.linearization import clamped, held
from qat.layers.quantizers.rounding import round_ste


def quantize_activations(x: Tensor, bits: int, *, symmetric: bool = True) -> Tensor:
    """Activations rounded to a uniform grid over the range of each token, the last dimension.

    Symmetric: q = s round(x / s), s = max|x| / (2^(b-1) - 1). No value is clipped, so dq/dx = 1 everywhere.
    Asymmetric: q = s (clamp(round(x / s + z), 0, 2^b - 1) - z), s = (max(x, 0) - min(x, 0)) / (2^b - 1), with the zero
    point z = round(-min(x, 0) / s), a whole number as integer kernels need it. Since z is rounded, an end of the range
    may lie beyond the last level by up to half a step: it is clipped, and dq/dx = 0 there, else 1.
    Scale and zero point are held constant: no gradient passes through them.

    The arithmetic is in float32 for 16-bit activations. Source of the symmetric form: LLM-QAT (arXiv 2305.17888, the
    `SymQuantizer` of its released code). The asymmetric form there has the minimum itself as offset.

    Args:
        x: (..., features).
        bits: Levels are 2^bits - 1 about zero where symmetric, else 2^bits; 2 or more.
        symmetric: Whether the grid is symmetric about zero.

    Returns:
        The quantized activations, in the shape and dtype of x.

    Example:
        >>> quantize_activations(torch.tensor([[-7.0, 0.4, 2.6, 0.0]]), 4)
        tensor([[-7.,  0.,  3.,  0.]])
    """
    if x.shape[-1] == 0:
        return x
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    quantized = _symmetric(wide, bits) if symmetric else _asymmetric(wide, bits)
    return quantized.to(x.dtype)


def _symmetric(x: Tensor, bits: int) -> Tensor:
    scale = held(_positive(x.detach().abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)))
    return scale * round_ste(x / scale)


def _asymmetric(x: Tensor, bits: int) -> Tensor:
    top = 2**bits - 1
    lowest, highest = x.detach().amin(dim=-1, keepdim=True), x.detach().amax(dim=-1, keepdim=True)
    lowest = lowest.clamp(max=0)
    scale = held(_positive((highest.clamp(min=0) - lowest) / top))
    zero = held(torch.round(-lowest / scale))
    return scale * (round_ste(clamped(x / scale + zero, 0, top)) - zero)


def _positive(scale: Tensor) -> Tensor:
    """A scale that a token of zeros can be divided by."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


@dataclass(frozen=True)
class ActivationQuantizer:
    """`quantize_activations` with its settings, as a layer holds it.

    Args:
        bits: The bit-width.
        symmetric: Whether the grid is symmetric about zero.
    """

    bits: int
    symmetric: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """The quantized activations."""
        return quantize_activations(x, self.bits, symmetric=self.symmetric)
