"""Symmetric linear operators that are known through their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch

from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.float32 import float32_products
from spectra.backend.random_vectors import gaussian
from spectra.backend.shards import Shards
from spectra.backend.vectors import dot, norm
from spectra.estimates.vector import VectorEstimate, vector_interval

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

UNITS_OF_ROUNDING = 4  # smallest rounding error that a product is taken to have, in units of the dtype's epsilon
# The bound on the error of an eigenvalue is this factor times the linearity gap, which holds the rounding errors of
# three products. An eigenvalue moves by at most the norm of the error of the matrix.
GAP_TO_ROUNDING = 2
DENSE_BLOCK_BYTES = 1 << 26  # largest size of the unit vectors that `to_dense` multiplies at once
DENSE_BLOCK = 64  # most unit vectors at once: an operator's batched product holds memory for each
EXACT_DIAGONAL_LIMIT = 4096  # dimension up to which `diagonal` takes n products by default


@dataclass(frozen=True)
class Preflight:
    """What a few products and gradients show about an operator before its numbers are used.

    Attributes:
        symmetry_gap: See `LinearOperator.symmetry_gap`.
        linearity_gap: See `LinearOperator.linearity_gap`.
        repeatability: Relative difference of the gradient computed twice from scratch; 0 for a deterministic loss.
        precision_error: See `LinearOperator.precision_error`.
    """

    symmetry_gap: float
    linearity_gap: float
    repeatability: float
    precision_error: float = 0.0


@dataclass(frozen=True)
class Block:
    """The coordinates of a diagonal block of an operator, such as those of the parameters of a layer.

    Attributes:
        name: What results call it.
        ranges: (start, stop) of each run of consecutive coordinates, in ascending order and disjoint.
        positions: Positions of its parameters among those of the operator; empty for an operator without parameters.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    positions: tuple[int, ...] = ()

    @property
    def dimension(self) -> int:
        """The number of coordinates, n_b."""
        return sum(stop - start for start, stop in self.ranges)

    def take(self, vectors: torch.Tensor) -> torch.Tensor:
        """The coordinates of the block in vectors of the whole space: (..., n) -> (..., n_b)."""
        return torch.cat([vectors[..., start:stop] for start, stop in self.ranges], dim=-1)

    def embed(self, vectors: torch.Tensor, n: int) -> torch.Tensor:
        """Vectors of the block as vectors of the whole space, zero elsewhere: (..., n_b) -> (..., n)."""
        whole = vectors.new_zeros(*vectors.shape[:-1], n)
        first = 0
        for start, stop in self.ranges:
            whole[..., start:stop] = vectors[..., first : first + stop - start]
            first += stop - start
        return whole


def check_is_operator(op: Any) -> None:
    """Refuse what is no operator, with the one that can be made of it.

    Args:
        op: What was given.

    Raises:
        InputError: For anything but a `LinearOperator`.
    """
    if isinstance(op, LinearOperator):
        return
    if isinstance(op, torch.nn.Module):
        advice = "make one of the model and its batches, HessianOperator(model, batches)"
    elif isinstance(op, torch.Tensor | np.ndarray):
        advice = "make one of the matrix, DenseOperator(matrix)"
    else:
        advice = "such as HessianOperator(model, batches), or a subclass of LinearOperator with your own product"
    raise InputError(f"an operator is expected, got a {type(op).__name__}: {advice}")


class LinearOperator:
    """A symmetric n x n matrix A, known only through its products v -> A v (Hessian-vector products for a Hessian).

    A subclass sets `shape`, `dtype` and `device`, and defines `_matvec(v)` for a vector v (n,) on that device and in
    that dtype. Where multiplying several vectors at once is cheaper, it also defines `_multiply_rows(V)` for vectors in
    the rows of V, (k, n).

    Where the vectors are sharded over the ranks of torch.distributed, (n,) stands for this rank's part of a vector,
    (entries,), in every method. All ranks make the same calls.

    Attributes:
        shape: (n, n).
        dtype: The dtype of the vectors, float32 or float64.
        device: Where the vectors lie.
        products: How many products A v have been computed so far.
        spread: "batches" where a product is a sum over the ranks of torch.distributed. All ranks must then compute
            the same products.
        shards: Which part of every vector this rank holds; None where each process holds whole vectors.
        unverified: Why the products of this operator cannot be relied on; empty if they can. Where it is not empty,
            every estimate from the operator is unresolved and has this reason.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    products: int = 0
    spread: str = "none"
    shards: Shards | None = None
    unverified: str = ""

    @property
    def entries(self) -> int:
        """How many numbers of a vector this process holds: n, or those of its part."""
        return self.shape[0] if self.shards is None else self.shards.entries

    @property
    def vector_bytes(self) -> int:
        """Bytes that a vector takes in this process."""
        numbers = self.shape[0] if self.shards is None else self.shards.length  # the same on every rank
        return numbers * torch.finfo(self.dtype).bits // 8

    def _has_vectors_of(self, other: LinearOperator) -> None:
        """Take over what the vectors of another operator look like."""
        self.shape, self.dtype, self.device = other.shape, other.dtype, other.device
        self.spread, self.shards = other.spread, other.shards

    def __matmul__(self, other: Any) -> Any:
        """The product A v, or A V for several vectors.

        Args:
            other: A vector (n,) or a matrix (n, k), as a tensor or a NumPy array.

        Returns:
            A v or A V in the operator's dtype; a NumPy array where one was given.

        Raises:
            InputError: For another shape.
            NonFiniteError: If the product holds NaN or infinity.
        """
        if isinstance(other, np.ndarray):
            return (self @ torch.from_numpy(np.ascontiguousarray(other))).cpu().numpy()
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.entries:
            part = "" if self.shards is None else f", this rank's part of {self.shape[1]} numbers,"
            raise InputError(
                f"a vector ({self.entries},) or matrix ({self.entries}, k){part} is expected, got {tuple(other.shape)}"
            )
        if other.ndim == 2 and other.shape[1] == 0:
            return other.new_empty(self.entries, 0, dtype=self.dtype, device=self.device)
        other = other.detach().to(device=self.device, dtype=self.dtype)
        vectors = other[None] if other.ndim == 1 else other.T.contiguous()
        with float32_products(self.device):
            products = self.multiply_rows_checked(vectors)
        return products[0] if other.ndim == 1 else products.T

    def multiply_rows_checked(self, vectors: torch.Tensor) -> torch.Tensor:
        """`multiply_rows`, and a NonFiniteError if a product holds NaN or infinity."""
        products = self.multiply_rows(vectors)
        # the sum of all entries is NaN or infinite if one entry is; if only the sum overflowed, every entry is checked
        broken = not torch.isfinite(products.sum()) and not torch.isfinite(products).all()
        if broken if self.shards is None else self.shards.any(bool(broken), self.device):
            self.raise_non_finite(vectors)
        return products

    def multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """A applied to each row of `vectors`, without a check for NaN: on a GPU that would wait for the device.

        Args:
            vectors: (k, n), on the operator's device and in its dtype.

        Returns:
            The products, (k, n).
        """
        self.products += len(vectors)
        return self._multiply_rows(vectors)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the NonFiniteError that says why the products of these rows hold NaN or infinity."""
        finite = "is finite" if torch.isfinite(vectors).all() else "is not finite itself"
        raise NonFiniteError(f"the operator's product is not finite (the vector {finite}); check what it multiplies")

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """A v for a vector (n,)."""
        raise NotImplementedError

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """A applied to each row (k, n)."""
        if len(vectors) == 1:
            return self._matvec(vectors[0])[None]
        products = torch.empty_like(vectors)
        for product, vector in zip(products, vectors, strict=True):
            product.copy_(self._matvec(vector))
        return products

    # -- memory

    def reserve(self, vectors: int) -> None:
        """Announce how many vectors (n,) an algorithm will hold, so that the operator leaves memory for them.

        Args:
            vectors: How many vectors.
        """

    def product_bytes(self) -> int | None:
        """Bytes that a product takes while it runs, None where that is not known."""
        return None

    # -- diagonal blocks

    def multiply_block_rows(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        """The diagonal block A_bb applied to each row, without a check for NaN.

        Args:
            vectors: (k, n_b), on the operator's device and in its dtype.
            block: The coordinates b.

        Returns:
            The products, (k, n_b).
        """
        self.products += len(vectors)
        return self._multiply_block_rows(vectors, block)

    def _multiply_block_rows(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        """A_bb applied to each row; a subclass overrides it where a block costs less than the whole."""
        return block.take(self._multiply_rows(block.embed(vectors, self.shape[0])))

    def block_rounding(self, block: Block) -> float | None:
        """How far rounding error may move an eigenvalue of a block, relative to its norm; None where it is not known.

        An operator that checks its products checks those of the block here.

        Args:
            block: The coordinates b.

        Returns:
            The error, or None: it is then measured as for any operator (`rounding`).
        """
        return None

    # -- other forms of the matrix

    def to_dense(self, *, on_products: Callable[[int], None] | None = None) -> torch.Tensor:
        """The matrix itself, from n products; whole on every rank where vectors are sharded.

        Args:
            on_products: Called with the number of products done, after every block.

        Returns:
            (n, n) in the operator's dtype, symmetrised as (A + A^T) / 2.
        """
        n, shards = self.shape[0], self.shards
        matrix = torch.empty(n, n, dtype=self.dtype, device=self.device)
        block = max(min(DENSE_BLOCK, n, DENSE_BLOCK_BYTES // self.vector_bytes), 1)
        for start in range(0, n, block):
            stop = min(start + block, n)
            units = torch.zeros(stop - start, n, dtype=self.dtype, device=self.device)
            units[:, start:stop].fill_diagonal_(1)
            if shards is None:
                matrix[start:stop] = self.multiply_rows_checked(units)
            else:
                matrix[start:stop] = shards.gather(self.multiply_rows_checked(shards.take(units)))
            if on_products is not None:
                on_products(stop)
        return (matrix + matrix.T) / 2

    def diagonal(self, *, products: int | None = None, seed: int = 0) -> VectorEstimate:
        """The diagonal of A: exact from n products, or estimated from fewer with a 95 % interval for each entry.

        The estimate of entry i is the mean over k vectors z of random signs of z_i (A z)_i, whose expectation is A_ii
        and whose variance is sum_{j != i} A_ij^2 (Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57, 2007).

        Args:
            products: The number k of products. By default n up to n = 4096, else 100. With n or more the diagonal is
                exact.
            seed: Seed of the vectors.

        Returns:
            A `VectorEstimate` of n entries.

        Raises:
            InputError: For fewer than two products of a larger matrix.
        """
        n = self.shape[0]
        wanted = products if products is not None else (n if n <= EXACT_DIAGONAL_LIMIT else 100)
        if wanted >= n:
            exact = torch.diagonal(self.to_dense()).double().cpu().numpy()
            return VectorEstimate(exact, exact, exact)
        if wanted < 2:
            raise InputError(f"two products or more are expected to estimate a diagonal, got products={wanted}")
        total = torch.zeros(self.entries, dtype=torch.float64, device=self.device)
        squares = torch.zeros_like(total)
        for index in range(wanted):
            signs = torch.where(gaussian(self, seed=seed, index=index, stream="diagonal") < 0, -1, 1).to(self.dtype)
            sample = (signs * self.multiply_rows_checked(signs[None])[0]).double()
            total += sample
            squares += sample.square()
        if self.shards is not None:
            total, squares = self.shards.gather(total), self.shards.gather(squares)
        return vector_interval(total.cpu().numpy(), squares.cpu().numpy(), wanted)

    def to_scipy(self) -> ScipyOperator:
        """The same operator for scipy.sparse.linalg (eigsh, lobpcg, ...), in NumPy's dtype of the same width.

        Returns:
            The operator.

        Raises:
            InputError: If the vectors are sharded: SciPy would sum over this rank's parts alone.
        """
        if self.shards is not None:
            raise InputError("SciPy takes whole vectors, and those of a sharded model are not: use spectra.topk or slq")
        from scipy.sparse import linalg  # half a second to load

        make: Any = linalg.LinearOperator  # typed as its subclasses are made, not as it is called with functions
        dtype = np.dtype(np.float64 if self.dtype == torch.float64 else np.float32)

        def multiply(columns: np.ndarray) -> np.ndarray:
            return (self @ np.asarray(columns, dtype=dtype)).astype(dtype, copy=False)

        def multiply_vector(vector: np.ndarray) -> np.ndarray:
            return multiply(vector.reshape(-1))

        return make(
            self.shape, matvec=multiply_vector, rmatvec=multiply_vector, matmat=multiply, rmatmat=multiply, dtype=dtype
        )

    # -- how exact the products are

    def in_float64(self) -> LinearOperator | None:
        """The same operator with products and vectors in float64, None where it has none."""
        return None

    def symmetry_gap(self, *, probes: int = 1, seed: int = 0) -> float:
        """The largest relative difference |u.Av - v.Au| / max(||Av|| ||u||, ||Au|| ||v||) over pairs of random vectors.

        Zero for an exactly symmetric operator, at rounding level for a sound Hessian.

        Args:
            probes: Number of pairs of random vectors; each pair costs two products.
            seed: Seed of the vectors.

        Returns:
            The largest of the differences.
        """
        gaps = []
        for index in range(probes):
            u = gaussian(self, seed=seed, index=2 * index, stream="symmetry")
            v = gaussian(self, seed=seed, index=2 * index + 1, stream="symmetry")
            au, av = self @ u, self @ v
            gaps.append(self.asymmetry(u, v, au, av))
        return max(gaps)

    def asymmetry(self, u: torch.Tensor, v: torch.Tensor, au: torch.Tensor, av: torch.Tensor) -> float:
        """The relative difference |u.Av - v.Au| / max(||Av|| ||u||, ||Au|| ||v||) of two vectors and their products."""
        over = self.shards
        scale = max(norm(av, over=over) * norm(u, over=over), norm(au, over=over) * norm(v, over=over))
        return abs(dot(u, av, over=over) - dot(v, au, over=over)) / scale if scale > 0 else 0.0

    def linearity_gap(self, *, seed: int = 0) -> float:
        """The relative rounding error of a product, ||A(u + v) - A u - A v|| / ||A(u + v)|| for random u and v.

        The gap shows the precision in which products are computed, which may be lower than the dtype of the vectors.
        It is larger where products are not repeatable. Measuring it costs three products.

        Args:
            seed: Seed of the vectors.

        Returns:
            The gap.
        """
        u = gaussian(self, seed=seed, index=0, stream="linearity")
        both = gaussian(self, seed=seed, index=1, stream="linearity").add_(u)
        gap = self @ both
        scale = norm(gap, over=self.shards)
        del both
        gap = gap - self @ u
        del u
        gap = gap - self @ gaussian(self, seed=seed, index=1, stream="linearity")  # drawn again: memory peaks here
        return norm(gap, over=self.shards) / scale if scale > 0 else 0.0

    def precision_error(self) -> float:
        """The relative error of products in a lower precision than the vectors'; 0 where there is none."""
        return 0.0

    def rounding(self) -> float:
        """How far rounding error may move an eigenvalue, relative to the norm of A."""
        return max(UNITS_OF_ROUNDING * torch.finfo(self.dtype).eps, GAP_TO_ROUNDING * self.linearity_gap())


@runtime_checkable
class HasLoss(Protocol):
    """An operator of a loss, such as its Hessian. A `SpectrumProbe` measures such operators."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    products: int

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know of how they were computed."""
        ...

    @property
    def engine_used(self) -> str:
        """The engine that multiplied last."""
        ...

    def loss(self) -> float:
        """The loss at the current weights."""
        ...

    def gradient(self) -> torch.Tensor:
        """The gradient of the loss in the chosen parameters, (n,)."""
        ...

    def preflight(self) -> Preflight:
        """What a few products and gradients show about the operator."""
        ...

    def close(self) -> None:
        """Give back the memory of kept graphs."""
        ...
