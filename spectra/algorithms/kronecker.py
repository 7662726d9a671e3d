"""A linear map that multiplies each weight matrix from the left and from the right: a Kronecker product per matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

LARGEST_SIDE = 2048  # longest side of a matrix with a dense factor; longer ones get a diagonal one
FEWEST_COLUMNS = 8  # rows and columns that make a 3-D parameter a stack of matrices; with fewer it is a 1-D convolution


@dataclass(frozen=True)
class Block:
    """A part of a vector, seen as `count` matrices of one size.

    Attributes:
        start: The index of its first entry.
        count: Number of matrices.
        rows: Rows of each matrix.
        columns: Columns of each matrix.
    """

    start: int
    count: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """The index after its last entry."""
        return self.start + self.count * self.rows * self.columns

    def matrices(self, vectors: torch.Tensor) -> torch.Tensor:
        """View this part of each row of (k, n) as matrices (k, count, rows, columns)."""
        return vectors[:, self.start : self.stop].unflatten(1, (self.count, self.rows, self.columns))


def blocks_of(shapes: Sequence[Sequence[int]]) -> tuple[Block, ...]:
    """Divide a vector of parameters, laid end to end, into matrices.

    A convolution is taken as a matrix with a row for each output channel, a stack of matrices (such as the experts of a
    mixture) as several matrices, and a vector as a matrix of one column.

    Args:
        shapes: The shapes of the parameters, in the order of the vector.

    Returns:
        A block for each parameter that has entries.
    """
    blocks, start = [], 0
    for shape in shapes:
        block = Block(start, *_matrix_sizes(tuple(shape)))
        if block.stop > start:
            blocks.append(block)
        start = block.stop
    return tuple(blocks)


def _matrix_sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Number, rows and columns of the matrices that a parameter of this shape holds."""
    if len(shape) == 3 and min(shape[1:]) >= FEWEST_COLUMNS:
        return shape
    return 1, math.prod(shape[:1]), math.prod(shape[1:])


@dataclass(frozen=True, eq=False)
class KroneckerTransform:
    """P: X -> L X R^T for every matrix X of every block. Each matrix has its own factors L and R.

    Attributes:
        blocks: The matrices.
        left: L for each block in float64, (count, rows, rows), or its diagonal (count, rows).
        right: R for each block, (count, columns, columns), or its diagonal (count, columns).
    """

    blocks: tuple[Block, ...]
    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    _cast: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def identity(cls, blocks: tuple[Block, ...], device: torch.device) -> KroneckerTransform:
        """Return the identity map."""
        left = tuple(_identity(block.count, block.rows, block.columns, device) for block in blocks)
        right = tuple(_identity(block.count, block.columns, block.rows, device) for block in blocks)
        return cls(blocks, left, right)

    def to(self, device: torch.device) -> KroneckerTransform:
        """The same map with its factors on another device."""
        left, right = (tuple(factor.to(device) for factor in factors) for factors in (self.left, self.right))
        return KroneckerTransform(self.blocks, left, right)

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """P applied to each row of (k, n)."""
        return self._multiply(vectors, transposed=False)

    def apply_transposed(self, vectors: torch.Tensor) -> torch.Tensor:
        """P^T applied to each row of (k, n)."""
        return self._multiply(vectors, transposed=True)

    def _multiply(self, vectors: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        images = torch.empty_like(vectors)
        for block, left, right in self._factors(vectors.dtype):
            image = _from_the_left(left, block.matrices(vectors), transposed=transposed)
            block.matrices(images).copy_(_from_the_right(image, right, transposed=transposed))
        return images

    def _factors(self, dtype: torch.dtype) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
        """The blocks with their factors in another precision, which are kept for the next product."""
        if dtype not in self._cast:
            self._cast[dtype] = [f.to(dtype) for f in self.left], [f.to(dtype) for f in self.right]
        yield from zip(self.blocks, *self._cast[dtype], strict=True)


def _identity(count: int, side: int, other: int, device: torch.device) -> torch.Tensor:
    """The identity as a factor of a side: dense, or its diagonal if the side is long or the other one has length 1."""
    if side > LARGEST_SIDE or other == 1:
        return torch.ones(count, side, dtype=torch.float64, device=device)
    return torch.eye(side, dtype=torch.float64, device=device).repeat(count, 1, 1)


def _from_the_left(factor: torch.Tensor, matrices: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """L X, or L^T X."""
    if factor.ndim == 2:
        return factor[..., None] * matrices
    return (factor.mT if transposed else factor) @ matrices


def _from_the_right(matrices: torch.Tensor, factor: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """X R^T, or X R."""
    if factor.ndim == 2:
        return matrices * factor[:, None]
    return matrices @ (factor if transposed else factor.mT)
