"""Symmetric linear operators known through their products with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from spectra.errors import InputError, NonFiniteError
from spectra.vectors import dot, gaussian, norm, orthonormal_rows, take_out_

if TYPE_CHECKING:
    from spectra.scipy_view import ScipyView


ROUNDING_STEPS = 4  # roundings that a product may have gone through, each of the dtype's floating-point spacing
GAP_TO_ROUNDING = 2  # three products round in a linearity gap; an eigenvalue moves by at most the norm of the error


@dataclass(frozen=True)
class Preflight:
    """What a few products tell about an operator before it is trusted.

    symmetry_gap, linearity_gap: see `LinearOperator`. repeatability: relative difference of the gradient computed
    twice from scratch; zero for a deterministic loss. precision_error: what products in a lower precision are off.
    """

    symmetry_gap: float
    linearity_gap: float
    repeatability: float
    precision_error: float = 0.0


class LinearOperator:
    """A symmetric n x n matrix A, seen only as v -> A v.

    A subclass sets `shape`, `dtype` and `device` and defines `_matvec(v)` for v: (n,) on that device and in that
    dtype; where several vectors at once are cheaper it defines `_matrows(V)` too, for vectors in the rows of V: (k, n).
    `products` counts the vectors multiplied so far. spread: "batches" where a product is a sum over the ranks of
    torch.distributed, which then have to ask for the same products.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    products: int = 0
    spread: str = "none"

    @property
    def vector_bytes(self) -> int:
        """What a vector of n numbers in the operator's dtype takes."""
        return self.shape[0] * torch.finfo(self.dtype).bits // 8

    def __matmul__(self, other: Any) -> Any:
        """A v for (n,), A V for (n, k). A NumPy array comes back as one; a tensor keeps the operator's dtype.

        Raises InputError for another shape, NonFiniteError where the product holds NaN or infinity.
        """
        if isinstance(other, np.ndarray):
            return (self @ torch.from_numpy(np.ascontiguousarray(other))).cpu().numpy()
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            raise InputError(
                f"a vector ({self.shape[1]},) or matrix ({self.shape[1]}, k) is expected, got {tuple(other.shape)}"
            )
        if other.ndim == 2 and other.shape[1] == 0:
            return other.new_empty(self.shape[0], 0, dtype=self.dtype, device=self.device)
        other = other.detach().to(device=self.device, dtype=self.dtype)
        vectors = other[None] if other.ndim == 1 else other.T.contiguous()
        images = self.finite_rows(vectors)
        return images[0] if other.ndim == 1 else images.T

    def finite_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """`rows`, whose images are looked at: a NaN or an infinity is blamed."""
        images = self.rows(vectors)
        # one sum meets every NaN and infinity; only if it overflows itself is every entry looked at
        if not torch.isfinite(images.sum()) and not torch.isfinite(images).all():
            self.blame(vectors)
        return images

    def rows(self, vectors: torch.Tensor) -> torch.Tensor:
        """A applied to each row of `vectors`: (k, n), on the operator's device and in its dtype. What recurrences
        call: no copies, and no checks, since those wait for the device; `blame` says what went wrong."""
        self.products += len(vectors)
        return self._matrows(vectors)

    def blame(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the NonFiniteError that names what made the products of these rows NaN or infinite."""
        broken = "the vector is not finite itself" if not torch.isfinite(vectors).all() else "the vector is finite"
        raise NonFiniteError(f"the operator's product is not finite ({broken}); check what it multiplies")

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        if len(vectors) == 1:
            return self._matvec(vectors[0])[None]
        images = torch.empty_like(vectors)
        for image, vector in zip(images, vectors, strict=True):
            image.copy_(self._matvec(vector))
        return images

    def to_scipy(self) -> ScipyView:
        """The same operator for scipy.sparse.linalg (eigsh, lobpcg, ...), in NumPy's dtype of the same width."""
        from spectra.scipy_view import ScipyView

        return ScipyView(self)

    def symmetry_gap(self, *, probes: int = 1, seed: int = 0) -> float:
        """Relative difference |u.Av - v.Au| / (||Av|| ||u||) for random u, v; the largest over `probes` pairs.

        Zero for an exactly symmetric operator; rounding level for a sound Hessian. Costs two products a pair.
        """
        gaps = []
        for index in range(probes):
            u = gaussian(self, seed=seed, index=2 * index, stream="symmetry")
            v = gaussian(self, seed=seed, index=2 * index + 1, stream="symmetry")
            au, av = self @ u, self @ v
            scale = max(norm(av) * norm(u), norm(au) * norm(v))
            gaps.append(abs(dot(u, av) - dot(v, au)) / scale if scale > 0 else 0.0)
        return max(gaps)

    def linearity_gap(self, *, seed: int = 0) -> float:
        """||A(u + v) - A u - A v|| / ||A(u + v)|| for random u, v: what the arithmetic of a product loses.

        Rounding level of the precision that products are computed in, whatever dtype they come in; larger where they
        are not repeatable. Costs three products.
        """
        u = gaussian(self, seed=seed, index=0, stream="linearity")
        both = gaussian(self, seed=seed, index=1, stream="linearity").add_(u)
        gap = self @ both
        scale = norm(gap)
        del both
        gap = gap - self @ u
        del u
        gap = gap - self @ gaussian(self, seed=seed, index=1, stream="linearity")  # drawn again: memory peaks here
        return norm(gap) / scale if scale > 0 else 0.0

    def precision_error(self) -> float:
        """What products in a lower precision than the vectors' are off, relative to them; 0 where there is none."""
        return 0.0

    def rounding(self) -> float:
        """How far rounding may move an eigenvalue, relative to the norm of what a recurrence sees."""
        return max(ROUNDING_STEPS * torch.finfo(self.dtype).eps, GAP_TO_ROUNDING * self.linearity_gap())


class DenseOperator(LinearOperator):
    """A symmetric matrix held in memory. matrix: (n, n) tensor or array, symmetric to rounding."""

    def __init__(self, matrix: torch.Tensor | np.ndarray):
        matrix = _real(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise InputError(f"a square matrix is expected, got shape {tuple(matrix.shape)}")
        if not torch.isfinite(matrix).all():
            raise InputError("the matrix holds NaN or infinity; every entry must be finite")
        scale = matrix.abs().max()
        if (matrix - matrix.T).abs().max() > 1e3 * torch.finfo(matrix.dtype).eps * scale:
            raise InputError("the matrix is not symmetric; pass (A + A.T) / 2 if that is what you mean")
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[0])
        self.dtype, self.device = matrix.dtype, matrix.device

    def rounding(self) -> float:
        """One product is one round of roundings: nothing to measure."""
        return ROUNDING_STEPS * torch.finfo(self.dtype).eps

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matrix @ vector

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors @ self.matrix.T


class DiagonalOperator(LinearOperator):
    """diag(values). values: (n,); the eigenvalues, which makes it the oracle of choice at large n."""

    def __init__(self, values: torch.Tensor | np.ndarray):
        values = _real(values)
        if values.ndim != 1 or not len(values):
            raise InputError(f"a vector of eigenvalues is expected, got shape {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise InputError("the values hold NaN or infinity; every one must be finite")
        self.values = values
        self.shape = (len(values), len(values))
        self.dtype, self.device = values.dtype, values.device

    def rounding(self) -> float:
        """One product is one round of roundings: nothing to measure."""
        return ROUNDING_STEPS * torch.finfo(self.dtype).eps

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.values * vector

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.values * vectors


class MeanOperator(LinearOperator):
    """The mean of operators of one shape, (A_1 + ... + A_k) / k, such as a Hessian averaged over noise draws.

    Where the members are Hessians, `loss`, `gradient`, `preflight`, `engine_used`, `notes` and `close` answer for all.
    """

    def __init__(self, operators: Sequence[LinearOperator]):
        self.operators = tuple(operators)
        if not self.operators:
            raise InputError("at least one operator is expected, got none")
        shapes = {op.shape for op in self.operators}
        if len(shapes) > 1:
            raise InputError(f"operators of one shape are expected, got {sorted(shapes)}")
        first = self.operators[0]
        self.shape, self.dtype, self.device, self.spread = first.shape, first.dtype, first.device, first.spread

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        total = self.operators[0].rows(vectors)
        for operator in self.operators[1:]:
            total += operator.rows(vectors)
        return total / len(self.operators)

    def precision_error(self) -> float:
        """The largest of the members'."""
        return max(op.precision_error() for op in self.operators)

    def rounding(self) -> float:
        """The largest of the members'."""
        return max(op.rounding() for op in self.operators)

    def blame(self, vectors: torch.Tensor) -> NoReturn:
        """The blame of the member whose product is not finite."""
        for operator in self.operators:
            if not torch.isfinite(operator.rows(vectors)).all():
                operator.blame(vectors)
        super().blame(vectors)

    def loss(self) -> float:
        """The mean of the members' losses."""
        return sum(op.loss() for op in self._hessians()) / len(self.operators)

    def gradient(self) -> torch.Tensor:
        """The mean of the members' gradients: (n,)."""
        return torch.stack([op.gradient() for op in self._hessians()]).mean(dim=0)

    def preflight(self) -> Preflight:
        """The worst of the members' checks."""
        checks = [op.preflight() for op in self._hessians()]
        return Preflight(*(max(gaps) for gaps in zip(*map(astuple, checks), strict=True)))

    @property
    def engine_used(self) -> str:
        """The first member's."""
        return self._hessians()[0].engine_used

    @property
    def notes(self) -> list[str]:
        """Every note of a member, once."""
        return list(dict.fromkeys(note for op in self._hessians() for note in op.notes))

    def close(self) -> None:
        """Give back the members' memory."""
        for op in self._hessians():
            op.close()

    def _hessians(self) -> tuple[Any, ...]:
        for op in self.operators:
            if not hasattr(op, "gradient"):
                raise InputError(f"a loss is known for Hessian operators only, this one averages a {type(op).__name__}")
        return self.operators


class DeflatedOperator(LinearOperator):
    """P A P with P = I - U U^T: A without the eigenpairs whose vectors are the columns of U.

    vectors: (n, k), orthonormalised here unless they are `orthonormal` already. On the complement of U the result acts
    as A does; on U it is zero. Vectors that are eigenvectors only to a residual r leave an eigenvalue of order
    r^2 / |lambda| behind. A product costs one of A and 8 n k further operations, or 4 n k with `inputs="orthogonal"`,
    which is for callers whose vectors have no part in U, as in a recurrence that started so. Products are counted by
    `inner`, the operator deflated, too.
    """

    def __init__(self, inner: LinearOperator, vectors: torch.Tensor, *, inputs: str = "any", orthonormal: bool = False):
        if vectors.ndim != 2 or vectors.shape[0] != inner.shape[0]:
            raise InputError(f"vectors ({inner.shape[0]}, k) are expected, got {tuple(vectors.shape)}")
        if inputs not in ("any", "orthogonal"):
            raise InputError(f"inputs must be 'any' or 'orthogonal', got {inputs!r}")
        self.inner, self._orthogonal_inputs = inner, inputs == "orthogonal"
        self.shape, self.dtype, self.device, self.spread = inner.shape, inner.dtype, inner.device, inner.spread
        rows = vectors.T.to(device=inner.device, dtype=inner.dtype)
        self._rows = rows if orthonormal else orthonormal_rows(rows)[1]

    @property
    def vectors(self) -> torch.Tensor:
        """U, orthonormal columns: (n, k)."""
        return self._rows.T

    def project(self, vector: torch.Tensor) -> torch.Tensor:
        """The part orthogonal to U, twice for rounding. (n,), or a vector in each row (k, n)."""
        projected = torch.atleast_2d(vector).clone()
        for _ in range(2):
            take_out_(projected, self._rows)
        return projected.view_as(vector)

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        if not self._orthogonal_inputs:
            vectors = take_out_(vectors.clone(), self._rows)
        return take_out_(self.inner.rows(vectors), self._rows)

    def blame(self, vectors: torch.Tensor) -> NoReturn:
        """The blame of the operator deflated."""
        self.inner.blame(vectors)

    def precision_error(self) -> float:
        """That of the operator deflated."""
        return self.inner.precision_error()

    def rounding(self) -> float:
        """That of the operator deflated."""
        return self.inner.rounding()


def _real(values: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A tensor in float32 or float64; integers and narrower floats are widened, complex numbers refused."""
    tensor = torch.as_tensor(values).detach()
    if tensor.is_complex():
        raise InputError(f"real numbers are expected, got {tensor.dtype}")
    if tensor.dtype == torch.float64 or tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
