"""Symmetric linear operators known through their products with vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.vectors import dot, gaussian, norm

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


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

    def to_scipy(self) -> ScipyOperator:
        """The same operator for scipy.sparse.linalg (eigsh, lobpcg, ...), in NumPy's dtype of the same width."""
        from scipy.sparse import linalg  # half a second to load

        make: Any = linalg.LinearOperator  # whose declared arguments are those of subclasses

        dtype = np.dtype(np.float64 if self.dtype == torch.float64 else np.float32)

        def multiply(columns: np.ndarray) -> np.ndarray:
            return (self @ np.asarray(columns, dtype=dtype)).astype(dtype, copy=False)

        def multiply_vector(vector: np.ndarray) -> np.ndarray:
            return multiply(vector.reshape(-1))

        return make(
            self.shape, matvec=multiply_vector, rmatvec=multiply_vector, matmat=multiply, rmatmat=multiply, dtype=dtype
        )

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
