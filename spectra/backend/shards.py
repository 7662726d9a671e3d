"""Vectors that lie over the ranks of torch.distributed: each rank holds a part of every vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from spectra.backend import ranks


@dataclass(frozen=True)
class Shards:
    """Vectors of n numbers, cut into contiguous parts of ceil(n / ranks) numbers, one a rank; the last may be shorter.

    Every method is called by all ranks at the same time, except `take`.

    Attributes:
        dimension: n.
        rank: The number of this rank.
        count: The number of ranks.
    """

    dimension: int
    rank: int
    count: int

    @staticmethod
    def of_this_rank(dimension: int) -> Shards:
        """The parts of vectors of so many numbers over all ranks."""
        return Shards(dimension, ranks.rank(), ranks.rank_count())

    @property
    def length(self) -> int:
        """The length of a part, apart from the last ones."""
        return -(-self.dimension // self.count)

    @property
    def start(self) -> int:
        """Position of the first number of this rank's part."""
        return min(self.rank * self.length, self.dimension)

    @property
    def stop(self) -> int:
        """Position after the last number of this rank's part."""
        return min((self.rank + 1) * self.length, self.dimension)

    @property
    def entries(self) -> int:
        """How many numbers of each vector this rank holds."""
        return self.stop - self.start

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of whole vectors: (..., n) -> (..., entries)."""
        return whole[..., self.start : self.stop].clone()

    def gather(self, parts: torch.Tensor) -> torch.Tensor:
        """Whole vectors from the parts of all ranks, by one all-gather a vector.

        Args:
            parts: This rank's part of a vector (entries,), or of several, (k, entries).

        Returns:
            The vectors, (n,) or (k, n), the same on every rank.
        """
        rows = torch.atleast_2d(parts)
        whole = rows.new_empty(len(rows), self.count * self.length)
        for target, part in zip(whole, rows, strict=True):
            ranks.all_gather_into(target, self._padded(part, self.length))
        found = whole[:, : self.dimension]
        return found[0] if parts.ndim == 1 else found

    def sum_of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over the ranks of whole vectors, by one reduce-scatter a vector.

        Args:
            whole: A vector (n,) or several, (k, n), of which each rank has its own.

        Returns:
            The part of the sum, (entries,) or (k, entries).
        """
        rows = torch.atleast_2d(whole)
        parts = rows.new_empty(len(rows), self.length)
        for target, row in zip(parts, rows, strict=True):
            ranks.reduce_scatter_into(target, self._padded(row, self.count * self.length))
        found = parts[:, : self.entries].contiguous()
        return found[0] if whole.ndim == 1 else found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of small tensors, such as dot products of parts; `tensor` is overwritten."""
        return ranks.all_reduce_sum_(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        return ranks.all_reduce_min(0 if flag else 1, device) == 0

    @staticmethod
    def _padded(vector: torch.Tensor, length: int) -> torch.Tensor:
        return vector.contiguous() if len(vector) == length else functional.pad(vector, (0, length - len(vector)))
