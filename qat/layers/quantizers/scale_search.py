"""The scale of least squared error, for learned scales to start from."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.rounding import floor_scale

INITIAL_SCALES = ("max", "mse")  # the scheme's own start, and that of this module
COARSE = 2.0 ** (-torch.arange(25, dtype=torch.float64) / 4)  # 1 to 1/64: a group may hold one large outlier
FINE = 2.0 ** (torch.arange(-7, 8, dtype=torch.float64) / 32)  # between two coarse factors
POLISHING = 4
CHUNK = 1 << 20  # weights at once, so that they stay in the cache


@torch.no_grad()
def least_error_scale(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """The scale s of each row that minimises ||w - Q(w; s)||^2, found by search.

    The scheme's own start is shrunk by factors from 1 to 1/64, four an octave, then by finer ones around the best. Then
    the levels stay and s is their least-squares fit, <w, level> / <level, level>, as long as that lowers the error. The
    error is piecewise quadratic in s, with many minima at many bits; the one that is found is at least as good as the
    start.

    Args:
        quantizer: A scheme with one scale a row and q = s * level.
        weight: (rows, columns).

    Returns:
        (rows, 1), positive, without a graph.
    """
    if weight.numel() == 0:
        return quantizer.initial_scale(weight)
    rows = max(1, CHUNK // weight.shape[1])
    return torch.cat([_search(quantizer, part) for part in weight.detach().split(rows)])


def _search(quantizer: Quantizer, weight: Tensor) -> Tensor:
    unit = quantizer.initial_scale(weight)
    weight = weight / unit  # so that squares neither overflow nor vanish
    best = torch.ones_like(unit)
    error = _error(quantizer, weight, best)
    for factors in (COARSE[1:], FINE):
        around = best
        for factor in factors:
            best, error = _better(quantizer, weight, best, error, around * factor)
    for _ in range(POLISHING):
        levels = quantizer.dequantize(quantizer.codes(weight, best), torch.ones_like(best))
        fit = (weight * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        best, error = _better(quantizer, weight, best, error, torch.where(fit > 0, fit, best))
    return floor_scale(best * unit)


def _better(quantizer: Quantizer, weight: Tensor, best: Tensor, error: Tensor, trial: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two scales for each row, with its error."""
    trial = trial.to(best)
    found = _error(quantizer, weight, trial)
    lower = found < error
    return torch.where(lower, trial, best), torch.where(lower, found, error)


def _error(quantizer: Quantizer, weight: Tensor, scale: Tensor) -> Tensor:
    quantized = quantizer.dequantize(quantizer.codes(weight, scale), scale)
    return (weight - quantized).square().sum(1, keepdim=True)
