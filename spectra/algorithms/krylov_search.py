"""Thick-restart Lanczos, which finds extreme eigenpairs with a Krylov basis of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
import torch

from spectra.algorithms.basis_size import MEMORY_PART
from spectra.algorithms.missed import MAX_STEPS, rules_out_eigenvalues_beyond
from spectra.backend import memory
from spectra.backend.errors import NonFiniteError
from spectra.backend.random_vectors import gaussian
from spectra.backend.shards import Shards
from spectra.backend.vectors import norm, orthogonalize_, row_dots
from spectra.operators.base import LinearOperator

START_PERTURBATION = 1e-2  # norm of the random vector added to a guess, so that no eigenvector is orthogonal to it
STRICT = 0.1  # residual / tolerance at which an extreme Ritz value counts as the end of the spectrum
SLICE_BYTES = 1 << 26  # size of the slices of columns in which a basis is rotated where memory holds no second one
ROUNDING = 10  # units of rounding error, relative to the norm of A, below which a residual counts as zero


def select(values: np.ndarray, k: int, which: str, *, margin: np.ndarray | float = 0.0) -> np.ndarray:
    """Indices of the k wanted eigenvalues.

    Args:
        values: (m,) in any order.
        k: How many are wanted; all m if there are fewer.
        which: "LM", "LA", "SA" or "BE" as in `topk`.
        margin: (m,) or one number, which is added to the extremeness of each value in the comparison.

    Returns:
        The indices, (k,).
    """
    if which == "LM":
        return np.argsort(-(np.abs(values) + margin), kind="stable")[:k]
    descending, ascending = np.argsort(-(values + margin), kind="stable"), np.argsort(values - margin, kind="stable")
    if which == "LA":
        return descending[:k]
    if which == "SA":
        return ascending[:k]
    top = descending[: k - k // 2]
    bottom = [i for i in ascending if i not in set(top)][: k // 2]
    return np.concatenate([top, np.array(bottom, dtype=int)])


@dataclass(frozen=True)
class RitzValues:
    """Ritz values: eigenvalues of the operator projected onto the Krylov basis.

    Attributes:
        values: (m,) ascending.
        residuals: (m,) residual norms ||A x - theta x|| within the space of the search.
        coefficients: (m, m), in each column a Ritz vector in terms of the Krylov basis.
    """

    values: np.ndarray
    residuals: np.ndarray
    coefficients: np.ndarray

    def without(self, indices: np.ndarray) -> RitzValues:
        """All but those of these indices."""
        others = np.delete(np.arange(len(self.values)), indices)
        return RitzValues(self.values[others], self.residuals[others], self.coefficients[:, others])


class _Projection:
    """The operator projected onto the Krylov basis Q, whose rows lie in the buffer of the search.

    Args:
        size: How many basis vectors there is room for.
        locked: How many vectors are locked, m.

    Attributes:
        matrix: (size, size), Q A Q^T in its first `filled` rows and columns.
        coupling: (m, size), the products of the m locked vectors with A Q^T. They are not zero, because locked pairs
            are not exact.
        filled: How many basis vectors have been multiplied.
    """

    def __init__(self, size: int, locked: int):
        self.matrix, self.coupling, self.filled = np.zeros((size, size)), np.zeros((locked, size)), 0

    def append(self, column: np.ndarray, coupling: np.ndarray) -> None:
        """Add a column of `matrix` and one of `coupling`, from the product with the next basis vector."""
        self.filled += 1
        self.matrix[: self.filled, self.filled - 1] = self.matrix[self.filled - 1, : self.filled] = column
        self.coupling[:, self.filled - 1] = coupling

    def ritz_values(self, beta: float) -> RitzValues:
        """Eigenvalues of the projected operator, with `beta` the norm of the last residual."""
        values, coefficients = scipy.linalg.eigh(self.matrix[: self.filled, : self.filled])
        return RitzValues(values, np.abs(beta * coefficients[-1]), coefficients)

    def restart(self, values: np.ndarray, coefficients: np.ndarray) -> None:
        """Replace the basis by Ritz vectors, given by their values (j,) and coefficients (filled, j)."""
        kept = len(values)
        self.coupling[:, :kept] = self.coupling @ coefficients
        self.matrix[:] = 0
        self.matrix[np.arange(kept), np.arange(kept)] = values
        self.filled = kept


class KrylovSearch:
    """Thick-restart Lanczos with full reorthogonalization (Wu and Simon, SIAM J. Matrix Anal. 22, 2000).

    Args:
        op: A, a symmetric operator (n, n).
        basis_size: How many Krylov basis vectors to hold at once; one more is allocated.
        tol: Relative tolerance of residuals.
        seed: Seed of all random vectors.
        max_products: Products after which every call returns what it has found.

    Attributes:
        products: Products taken in all calls.
        norm: The largest magnitude of a Ritz value seen in all calls, an estimate of ||A||.
    """

    def __init__(self, op: LinearOperator, basis_size: int, tol: float, seed: int, *, max_products: int):
        self.op, self.basis_size, self.tol, self.seed, self.max_products = op, basis_size, tol, seed, max_products
        self.products, self.norm = 0, 0.0
        self._eps = torch.finfo(op.dtype).eps
        self._basis = torch.empty(basis_size + 1, op.entries, dtype=op.dtype, device=op.device)
        self._random_vectors = 0  # drawn so far
        self._unwanted: RitzValues  # those that the last call did not return, in terms of self._basis

    @property
    def out_of_products(self) -> bool:
        """Whether `max_products` have been spent."""
        return self.products >= self.max_products

    def tolerances(self, values: np.ndarray) -> np.ndarray:
        """The residual norm at which each pair counts as converged."""
        return np.maximum(self.tol * np.abs(values), ROUNDING * self._eps * self.norm)

    def find(
        self,
        k: int,
        which: str,
        *,
        locked: torch.Tensor | None = None,
        beyond: tuple[float, float] | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """Find k wanted eigenpairs orthogonal to locked vectors.

        Args:
            k: How many pairs.
            which: Which of the eigenvalues, as in `topk`.
            locked: (m, n) with orthonormal rows, eigenvectors that are known already.
            beyond: (low, high), with k = 2 and which = "BE": only eigenvalues below `low` or above `high` are wanted.
                The search ends when each end of the spectrum lies within these bounds or has converged.
            start: (n, j), guesses of eigenvectors; the recurrence starts from their perturbed sum.

        Returns:
            Values (k,), vectors (k, n) in rows, and residual norms (k,). There are fewer than k if `locked` leaves
            fewer dimensions.
        """
        locked = self._basis[:0] if locked is None else locked
        dimension, first_product = self.op.shape[0] - len(locked), self.products
        k = min(k, dimension)
        projection = _Projection(min(self.basis_size, dimension), len(locked))
        self._draw(0, locked)
        if start is not None:
            self._start_from(start)
        while True:
            beta = self._extend(projection, locked)
            exhausted = projection.filled == dimension
            ritz = projection.ritz_values(0.0 if exhausted else beta)
            self.norm = max(self.norm, float(np.abs(ritz.values).max()))
            wanted = select(ritz.values, min(k, projection.filled), which)
            if beyond is None:
                done = projection.filled >= k and self._converged(ritz, wanted)
            else:
                done = self.products - first_product >= MAX_STEPS and self._none_left_beyond(ritz, beyond)
            if exhausted or done or self.out_of_products:
                return self._result(projection, ritz, wanted)
            if beta <= ROUNDING * self._eps * self.norm:  # an invariant subspace: go on with a random vector
                self._draw(projection.filled, locked)
            if projection.filled == len(projection.matrix):
                self._restart(projection, ritz, k, which)

    def _start_from(self, guesses: torch.Tensor) -> None:
        """Turn the random first basis vector into the sum of guesses (n, j), perturbed by that random vector."""
        guess = guesses.to(self._basis).sum(dim=1)
        self._basis[0] = guess / norm(guess, over=self.op.shards) + START_PERTURBATION * self._basis[0]
        self._basis[0] /= norm(self._basis[0], over=self.op.shards)

    def _extend(self, projection: _Projection, locked: torch.Tensor) -> float:
        """Multiply the newest basis vector and orthogonalize the product; returns the norm of what is left."""
        last = projection.filled
        product = self.op @ self._basis[last]
        self.products += 1
        (column, coupling), beta = orthogonalize_(product, self._basis[: last + 1], locked, over=self.op.shards)
        if not np.isfinite(beta):
            raise NonFiniteError(f"product number {self.products} of the operator is not finite: check the operator")
        if beta > 0:
            torch.div(product, beta, out=self._basis[last + 1])
        projection.append(column, coupling)
        return beta

    def _converged(self, ritz: RitzValues, wanted: np.ndarray) -> bool:
        """Whether the residuals of all wanted Ritz values meet the tolerance."""
        return bool(np.all(ritz.residuals[wanted] <= self.tolerances(ritz.values[wanted])))

    def _none_left_beyond(self, ritz: RitzValues, beyond: tuple[float, float]) -> bool:
        """Whether each end of the spectrum lies within the bounds by its residual, or has converged.

        The tolerance is stricter than for wanted pairs, because a mixture of eigenvectors of a cluster can pass for the
        eigenvector of a less extreme eigenvalue.
        """
        ends = np.array([0, -1])
        reach = ritz.values[ends] + np.array([-1, 1]) * ritz.residuals[ends]
        outside = ends[(reach < beyond[0]) | (reach > beyond[1])]
        return bool(np.all(ritz.residuals[outside] <= STRICT * self.tolerances(ritz.values[outside])))

    def _result(
        self, projection: _Projection, ritz: RitzValues, wanted: np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """The wanted pairs as `find` returns them; stores the others for `rules_out_missed`."""
        self._unwanted = ritz.without(wanted)
        coefficients = ritz.coefficients[:, wanted]
        along_locked = np.linalg.norm(projection.coupling[:, : projection.filled] @ coefficients, axis=0)
        residuals = np.hypot(ritz.residuals[wanted], along_locked)
        return ritz.values[wanted], self._ritz_vectors(coefficients), residuals

    def rules_out_missed(self, vectors: torch.Tensor, beyond: tuple[float, float]) -> bool:
        """Whether the last call of `find` missed no eigenvalue beyond the bounds (`rules_out_eigenvalues_beyond`).

        Ritz vectors that `find` did not return are projected out as well, which saves products. Projecting out a Ritz
        vector with residual norm r at a distance d from a bound moves an eigenvalue there by at most r^2 / d. Ritz
        vectors are projected out in the order of that number, while their sum stays within the tolerance.

        Args:
            vectors: (k, n) with orthonormal rows, the eigenvectors that were found.
            beyond: (low, high), the bounds; they are moved outward by the tolerance.

        Returns:
            False if an eigenvalue beyond the bounds was missed, or may well have been.
        """
        slack = self.tolerances(np.nan_to_num(np.array(beyond)))
        low, high = float(beyond[0] - slack[0]), float(beyond[1] + slack[1])
        others = self._unwanted
        smallest_distance = self._eps * self.norm + np.finfo(float).tiny
        distances = np.maximum(np.minimum(others.values - low, high - others.values), smallest_distance)
        shifts = others.residuals**2 / distances
        order = np.argsort(shifts)
        harmless = order[np.cumsum(shifts[order]) <= slack.min()]
        self._rotate_in_place(others.coefficients[:, harmless], first=len(vectors))
        self._basis[: len(vectors)] = vectors
        basis = self._basis[: len(vectors) + len(harmless)]
        before, steps = self.op.products, min(MAX_STEPS, self.max_products - self.products)
        answer = rules_out_eigenvalues_beyond(
            self.op, basis, low, high, seed=self.seed, stream="topk trial", max_steps=steps
        )
        self.products += self.op.products - before
        return answer

    def _draw(self, row: int, locked: torch.Tensor) -> None:
        """Set basis vector `row` to a random unit vector orthogonal to those before it and to the locked vectors."""
        vector = gaussian(self.op, seed=self.seed, index=self._random_vectors, stream="topk")
        self._random_vectors += 1
        for _ in range(2):
            _, length = orthogonalize_(vector, self._basis[:row], locked, over=self.op.shards)
            vector /= length
        self._basis[row] = vector

    def _ritz_vectors(self, coefficients: np.ndarray) -> torch.Tensor:
        """Ritz vectors in rows (j, n), normalized, from coefficients (m, j) for the first m basis vectors."""
        vectors = self._rotation(coefficients) @ self._basis[: len(coefficients)]
        return _normalized_(vectors, self.op.shards)

    def _rotate_in_place(self, coefficients: np.ndarray, *, first: int = 0) -> None:
        """Write the Ritz vectors of coefficients (m, j) over the basis vectors from row `first` on.

        Where memory holds no second basis, this is done in slices of columns.
        """
        m, count = coefficients.shape
        if not count:
            return
        rotation, n = self._rotation(coefficients), self.op.entries
        target = self._basis[first : first + count]
        fits = count * self.op.vector_bytes <= MEMORY_PART * memory.available(self._basis.device)
        columns = n if fits else max(SLICE_BYTES // (m * self._basis.element_size()), 1)
        for start in range(0, n, columns):
            target[:, start : start + columns] = rotation @ self._basis[:m, start : start + columns]
        _normalized_(target, self.op.shards)

    def _rotation(self, coefficients: np.ndarray) -> torch.Tensor:
        """The coefficients transposed, as a tensor on the operator's device."""
        return torch.as_tensor(coefficients.T, dtype=self.op.dtype, device=self.op.device)

    def _restart(self, projection: _Projection, ritz: RitzValues, k: int, which: str) -> None:
        """Shrink the basis to the most extreme Ritz vectors, somewhat more than the k wanted, and the newest vector."""
        size = len(ritz.values)
        kept = np.sort(select(ritz.values, min(k + max((size - k) // 3, 1), size - 1), which))
        newest = self._basis[size].clone()
        self._rotate_in_place(ritz.coefficients[:, kept])
        self._basis[len(kept)] = newest
        projection.restart(ritz.values[kept], ritz.coefficients[:, kept])


def _normalized_(vectors: torch.Tensor, over: Shards | None) -> torch.Tensor:
    """Divide each row by its norm, in place."""
    return vectors.div_(row_dots(vectors, vectors, over=over).sqrt()[:, None].to(vectors.dtype))
