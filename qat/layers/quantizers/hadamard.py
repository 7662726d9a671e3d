"""The orthonormal fast Hadamard transform, in blocks, of rows of any width."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # as in the code that was released with QuEST (arXiv 2502.05003)


def block_sizes(width: int) -> tuple[int, ...]:
    """The widths of the blocks that a row is cut into: blocks of 128, and for the rest falling powers of two.

    Args:
        width: Columns of a row.

    Returns:
        Powers of two that sum up to the width.

    Example:
        >>> block_sizes(300)
        (128, 128, 32, 8, 4)
    """
    rest = width % BLOCK
    powers = (1 << bit for bit in reversed(range(BLOCK.bit_length())))
    return (BLOCK,) * (width // BLOCK) + tuple(power for power in powers if rest & power)


def hadamard(rows: Tensor) -> Tensor:
    """H x for each row x, with H block-diagonal, symmetric and orthonormal, so that `hadamard` is its own inverse.

    A block of n columns is multiplied by the Hadamard matrix in Sylvester's order over sqrt(n), by additions alone:
    neither TF32 nor autocast changes its precision.

    Args:
        rows: (..., columns), of any width.

    Returns:
        The transformed rows, of the same shape and dtype.
    """
    width = rows.shape[-1]
    whole = width // BLOCK * BLOCK
    parts = [_transform(rows[..., :whole].unflatten(-1, (-1, BLOCK))).flatten(-2)] if whole else []
    start = whole
    for size in block_sizes(width - whole):
        parts.append(_transform(rows[..., start : start + size]))
        start += size
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=-1) if parts else rows


def _transform(x: Tensor) -> Tensor:
    """The transform along the last dimension, whose size is a power of two: sums and differences of pairs."""
    size, distance = x.shape[-1], 1
    while distance < size:
        left, right = x.unflatten(-1, (size // (2 * distance), 2, distance)).unbind(-2)
        x = torch.stack([left + right, left - right], dim=-2).flatten(-3)
        distance *= 2
    return x * size**-0.5
