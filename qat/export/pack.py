"""Codes of few bits in bytes: how packed weights are laid out.

The codes of a matrix are taken row by row, as one sequence, and numbered from 0 in ascending order. With L levels:

    L = 2, 4, 16       8, 4 or 2 codes a byte, the first in the lowest bits
    L = 3              5 codes a byte: c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4, which is 1.6 bits a code
    L = 5 ... 8        8 codes in 3 bytes, a little-endian number of 24 bits, the first code in its lowest 3
    L = 9 ... 256      as 16 levels up to 16, else one code a byte

The sequence is padded with zeros to a whole number of bytes (three of them for 3 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.backend.errors import InputError

TERNARY = 5  # codes a byte, since 3 ** 5 <= 256


def bits_per_code(levels: int) -> float:
    """How many bits a packed code takes.

    Args:
        levels: How many different codes there are.

    Returns:
        1, 1.6, 2, 3, 4 or 8.

    Raises:
        InputError: There are more levels than a byte has values.

    Example:
        >>> bits_per_code(3)
        1.6
    """
    for most, bits in ((2, 1), (3, 1.6), (4, 2), (8, 3), (16, 4), (256, 8)):
        if levels <= most:
            return bits
    raise InputError(f"packed weights have 2 to 256 levels, got {levels}")


def pack(codes: Tensor, levels: int) -> Tensor:
    """Codes in bytes.

    Args:
        codes: Integers from 0 to levels - 1, of any shape.
        levels: How many different codes there are.

    Returns:
        uint8, one-dimensional.
    """
    bits = bits_per_code(levels)
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    if bits == 1.6:
        return _weighted(flat, TERNARY, [3**place for place in range(TERNARY)]).to(torch.uint8)
    if bits == 3:
        words = _weighted(flat, 8, [8**place for place in range(8)])
        return torch.stack([(words >> shift) & 255 for shift in (0, 8, 16)], dim=1).reshape(-1).to(torch.uint8)
    each = int(8 // bits)
    return _weighted(flat, each, [1 << int(bits * place) for place in range(each)]).to(torch.uint8)


def unpack(packed: Tensor, count: int, levels: int) -> Tensor:
    """The codes in bytes that `pack` made.

    Args:
        packed: uint8, one-dimensional.
        count: How many codes there are.
        levels: How many different codes there are.

    Returns:
        (count,), uint8, on the device of `packed`.
    """
    bits = bits_per_code(levels)
    if bits == 8:
        return packed[:count]
    if bits == 1.6:
        places = torch.tensor([3**place for place in range(TERNARY)], dtype=torch.uint8, device=packed.device)
        return (packed[:, None] // places % 3).reshape(-1)[:count]
    if bits == 3:
        triples = packed.view(-1, 3).int()
        words = triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=packed.device)
        return ((words[:, None] >> shifts) & 7).to(torch.uint8).reshape(-1)[:count]
    shifts = torch.arange(0, 8, int(bits), dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2 ** int(bits) - 1)).reshape(-1)[:count]


def _weighted(codes: Tensor, each: int, weights: list[int]) -> Tensor:
    """The sums of `each` codes after another times their weights, int32; the last is padded with zeros."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).view(-1, each)
    total = torch.zeros(len(padded), dtype=torch.int32, device=codes.device)
    for place, weight in enumerate(weights):
        total += padded[:, place].int() * weight
    return total
