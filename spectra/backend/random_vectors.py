"""Random vectors that depend on a seed and an index alone, not on the device or on the order of the calls."""

from __future__ import annotations

import math
import zlib
from typing import Protocol

import numpy as np
import torch

from spectra.backend.shards import Shards
from spectra.backend.vectors import chunk_size, norm


class VectorSpace(Protocol):
    """Anything that says what its vectors look like, such as an operator of shape (n, n)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def shards(self) -> Shards | None:
        """The parts of vectors that the ranks hold; None where vectors are whole."""
        ...


def probe_vector(space: VectorSpace, *, seed: int, index: int) -> torch.Tensor:
    """A probe vector: a direction drawn uniformly from the unit sphere in n dimensions.

    With such vectors the distribution of every estimate depends on the eigenvalues alone and not on the eigenvectors,
    so an interval that covers on a diagonal matrix covers on any. Random signs (Rademacher) lack this: on a diagonal
    matrix their quadratic forms do not vary at all.

    Args:
        space: The operator that the vector is for.
        seed: Seed of the whole family of probe vectors.
        index: Which vector of the family.

    Returns:
        (n,) of norm one, in the dtype and on the device of `space`; this rank's part of it where vectors are sharded.
    """
    vector = gaussian(space, seed=seed, index=index, stream="probe")
    return vector.div_(norm(vector, over=space.shards))


def gaussian(space: VectorSpace, *, seed: int, index: int, stream: str) -> torch.Tensor:
    """A vector of independent standard normal numbers, the same up to rounding error on every device.

    Counters i are hashed to 64 bits. One half of the bits of hash(key + i) becomes a number u in (0, 1), the other half
    an angle a, and the Box-Muller transform with r = sqrt(-2 log u) gives the pair (r cos a, r sin a). The hash is
    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). NumPy's SeedSequence derives the key from (seed, index, stream), so
    neighbouring seeds share no vector. The numbers have the resolution of float32.

    Args:
        space: The operator that the vector is for.
        seed: Seed of the family of vectors.
        index: Which vector of the family.
        stream: Name of the purpose; different names give independent families.

    Returns:
        (n,) in the dtype and on the device of `space`; this rank's part of it where vectors are sharded.
    """
    words = [seed & 0xFFFFFFFFFFFFFFFF, index, zlib.crc32(stream.encode())]
    key = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    n, half = space.shape[0], (space.shape[0] + 1) // 2
    if space.shards is not None:
        return _part_of_gaussian(space, key, half, space.shards)
    numbers = torch.empty(n, dtype=space.dtype, device=space.device)
    size = chunk_size(space.device)
    for start in range(0, half, size):
        stop = min(start + size, half)
        numbers[start:stop], second = _normal_pairs(key, start, stop, space.device)
        numbers[half + start : half + stop] = second[: n - half - start]
    return numbers


def _part_of_gaussian(space: VectorSpace, key: int, half: int, shards: Shards) -> torch.Tensor:
    """This rank's part of a vector whose first half has the first numbers of all pairs, and whose second the others."""
    numbers = torch.empty(shards.entries, dtype=space.dtype, device=space.device)
    size = chunk_size(space.device)
    for first, last, member, shift in ((0, half, 0, 0), (half, shards.dimension, 1, half)):
        begin, end = max(first, shards.start), min(last, shards.stop)
        for start in range(begin, end, size):
            stop = min(start + size, end)
            pair = _normal_pairs(key, start - shift, stop - shift, space.device)
            numbers[start - shards.start : stop - shards.start] = pair[member]
    return numbers


def _normal_pairs(key: int, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of normal numbers of the counters from `start` to `stop`, in float32."""
    z = torch.arange(start, stop, device=device).mul_(_as_int64(0x9E3779B97F4A7C15)).add_(_as_int64(key))
    z ^= _shift_right(z, 30)
    z *= _as_int64(0xBF58476D1CE4E5B9)
    z ^= _shift_right(z, 27)
    z *= _as_int64(0x94D049BB133111EB)
    z ^= _shift_right(z, 31)
    first, second = z.view(torch.int32).view(-1, 2).unbind(dim=1)
    radius = first.float().abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = second.float().mul_(math.pi * 2.0**-31)
    return radius * angle.cos(), radius * angle.sin()


def _as_int64(word: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one."""
    word &= 0xFFFFFFFFFFFFFFFF
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right, which fills with zeros; torch's own shift repeats the sign bit."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
