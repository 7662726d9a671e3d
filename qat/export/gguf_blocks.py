"""GGUF's block types that hold a quantizer's grid: weights that are small integers times one scale a row or group.

Each block stores its scale as float16, which is the one thing that is rounded. The types are those of ggml
(ggml-common.h in github.com/ggml-org/llama.cpp); each encoder here is the inverse of ggml's dequantization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Integers = frozenset[int]


@dataclass(frozen=True)
class BlockType:
    """A block type of GGUF.

    Attributes:
        name: Its name in ggml.
        block: Weights a block, which have one float16 scale.
        holds: Whether it holds a set of integers.
        encode: (integers (blocks, block) int8, scales (blocks, 1) float16) -> (blocks, bytes) uint8.
    """

    name: str
    block: int
    holds: Callable[[Integers], bool]
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _q1_0(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A bit a weight, the first in the lowest bit: 1 for +scale, 0 for -scale."""
    return np.hstack([_bytes(scale), np.packbits(integers > 0, axis=1, bitorder="little")])


def _tq1_0(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Five ternary digits a byte, as the fraction digits / 243 in 256ths, rounded up; four in the last four bytes."""
    digits = (integers + 1).astype(np.uint16)
    parts = []
    for first, last, each, width in ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)):
        weights = np.array([81, 27, 9, 3, 1][:each], dtype=np.uint16).reshape(1, each, 1)
        parts.append((digits[:, first:last].reshape(-1, each, width) * weights).sum(axis=1))
    packed = (np.hstack(parts).astype(np.uint32) * 256 + 242) // 243
    return np.hstack([packed.astype(np.uint8), _bytes(scale)])


def _q2_k(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w = d sc q - dmin m with q from 0 to 3: sc = 2, m = 3 for odd integers from -3, and sc = 1, m = 2 from -2."""
    odd = bool((integers % 2).all())
    step, offset = (2, 3) if odd else (1, 2)
    numbers = ((integers + offset) // step).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = _shifted(numbers, 2).reshape(-1, 64)
    return np.hstack([np.full((len(integers), 16), step | offset << 4, np.uint8), packed, _bytes(scale), _bytes(scale)])


def _q3_k(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w = d (sc - 32) q with q from -4 to 3: sc = 33 in each of the sixteen 6-bit scales."""
    numbers = (integers + 4).astype(np.uint8)
    low = _shifted((numbers & 3).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    high = _shifted((numbers >> 2).reshape(-1, 1, 8, 32), 1).reshape(-1, 32)
    scales = np.tile(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (len(integers), 1))  # low 4 bits: 1, high 2 bits: 2
    return np.hstack([high, low, scales, _bytes(scale)])


def _q4_0(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w = d (q - 8): the first half of the block in the low nibbles, the second in the high ones."""
    numbers = (integers + 8).astype(np.uint8)
    return np.hstack([_bytes(scale), numbers[:, :16] | numbers[:, 16:] << 4])


def _q8_0(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w = d q with a signed byte a weight."""
    return np.hstack([_bytes(scale), integers.astype(np.int8).view(np.uint8)])


def _shifted(numbers: np.ndarray, bits: int) -> np.ndarray:
    """(..., places, n) small numbers -> (..., n) bytes, the first place in the lowest bits."""
    places = numbers.shape[-2]
    shifts = np.arange(0, places * bits, bits, dtype=np.uint8).reshape(places, 1)
    return np.bitwise_or.reduce(numbers << shifts, axis=-2)


def _bytes(scale: np.ndarray) -> np.ndarray:
    """float16 (blocks, 1) -> uint8 (blocks, 2), little-endian."""
    return np.ascontiguousarray(scale.astype("<f2")).view(np.uint8)


def _within(low: int, high: int) -> Callable[[Integers], bool]:
    return lambda integers: low <= min(integers) and max(integers) <= high


# In ascending order of bits a weight: 1.125, 1.69, 2.63, 3.44, 4.5, 8.5.
BLOCK_TYPES = (
    BlockType("Q1_0", 128, lambda integers: integers <= {-1, 1}, _q1_0),
    BlockType("TQ1_0", 256, _within(-1, 1), _tq1_0),
    BlockType("Q2_K", 256, lambda integers: integers <= {-3, -1, 1, 3} or _within(-2, 1)(integers), _q2_k),
    BlockType("Q3_K", 256, _within(-4, 3), _q3_k),
    BlockType("Q4_0", 32, _within(-8, 7), _q4_0),
    BlockType("Q8_0", 32, _within(-128, 127), _q8_0),
)


def choose_type(levels: Integers, columns: int, group: int) -> BlockType | None:
    """The smallest type that holds the levels and whose blocks have one scale each.

    Args:
        levels: Every integer that a weight may be.
        columns: Weights a row, of which a block must be a divisor.
        group: Weights that share a scale.

    Returns:
        The type, or None where there is none.

    Example:
        >>> choose_type(frozenset({-1, 0, 1}), columns=576, group=576).name
        'Q4_0'
    """
    for kind in BLOCK_TYPES:
        if columns % kind.block == 0 and group % kind.block == 0 and kind.holds(levels):
            return kind
    return None


def read_q1_0(stored: np.ndarray) -> np.ndarray:
    """The weights in rows of Q1_0 blocks, which the `gguf` package cannot read.

    Args:
        stored: (rows, bytes), uint8.

    Returns:
        (rows, columns), float32.
    """
    blocks = np.ascontiguousarray(stored).reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return (signs * scale).reshape(len(stored), -1)


def encode(kind: BlockType, integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Integers and their scales in blocks.

    Args:
        kind: The block type.
        integers: (rows, columns), int8.
        scales: (rows, columns), the scale of each weight, the same within a block.

    Returns:
        (rows, bytes), uint8.
    """
    rows = len(integers)
    blocks = integers.reshape(-1, kind.block)
    each = scales.reshape(-1, kind.block)[:, :1].astype(np.float16)
    return kind.encode(blocks, each).reshape(rows, -1)
