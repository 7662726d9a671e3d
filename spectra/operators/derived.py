"""Operators made of other operators: a mean, a difference, a deflated operator, a congruence P^T (A - t I) P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch

from spectra.backend.errors import InputError
from spectra.backend.random_vectors import gaussian
from spectra.backend.vectors import norm, orthonormal_rows, project_out_
from spectra.operators.base import Block, HasLoss, LinearOperator, Preflight


class MeanOperator(LinearOperator):
    """The mean of operators of one shape, (A_1 + ... + A_k) / k, such as a Hessian averaged over draws of weight noise.

    Where the members have a loss, the mean has one too: `loss`, `gradient`, `preflight`, `engine_used`, `notes` and
    `close` answer for all members.

    Args:
        operators: The members, one or more.

    Raises:
        InputError: If there are no members, if their shapes differ, or if a loss is asked of members without one.
    """

    def __init__(self, operators: Sequence[LinearOperator]):
        self.operators = tuple(operators)
        if not self.operators:
            raise InputError("at least one operator is expected, got none")
        shapes = {op.shape for op in self.operators}
        if len(shapes) > 1:
            raise InputError(f"operators of one shape are expected, got {sorted(shapes)}")
        first = self.operators[0]
        self._has_vectors_of(first)

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        total = self.operators[0].multiply_rows(vectors)
        for operator in self.operators[1:]:
            total += operator.multiply_rows(vectors)
        return total / len(self.operators)

    def _multiply_block_rows(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        total = self.operators[0].multiply_block_rows(vectors, block)
        for operator in self.operators[1:]:
            total += operator.multiply_block_rows(vectors, block)
        return total / len(self.operators)

    def block_rounding(self, block: Block) -> float | None:
        """The largest of the members'; None where one is not known."""
        known = [op.block_rounding(block) for op in self.operators]
        return None if None in known else max(known)  # type: ignore[type-var]

    def in_float64(self) -> MeanOperator | None:
        """See `LinearOperator.in_float64`; None where a member has none."""
        members = [op.in_float64() for op in self.operators]
        found = [member for member in members if member is not None]
        return MeanOperator(found) if len(found) == len(members) else None

    def precision_error(self) -> float:
        """The largest of the members'."""
        return max(op.precision_error() for op in self.operators)

    def rounding(self) -> float:
        """The largest of the members'."""
        return max(op.rounding() for op in self.operators)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of the member whose product is not finite."""
        for operator in self.operators:
            if not torch.isfinite(operator.multiply_rows(vectors)).all():
                operator.raise_non_finite(vectors)
        super().raise_non_finite(vectors)

    def loss(self) -> float:
        """The mean of the members' losses."""
        return sum(op.loss() for op in self._with_loss()) / len(self.operators)

    def gradient(self) -> torch.Tensor:
        """The mean of the members' gradients, (n,)."""
        return torch.stack([op.gradient() for op in self._with_loss()]).mean(dim=0)

    def preflight(self) -> Preflight:
        """For each check, the largest figure of any member."""
        checks = [op.preflight() for op in self._with_loss()]
        return Preflight(*(max(gaps) for gaps in zip(*map(astuple, checks), strict=True)))

    @property
    def engine_used(self) -> str:
        """The engine of the first member."""
        return self._with_loss()[0].engine_used

    @property
    def notes(self) -> list[str]:
        """The notes of all members, without repetitions."""
        return list(dict.fromkeys(note for op in self._with_loss() for note in op.notes))

    def close(self) -> None:
        """Free the memory of the members' graphs."""
        for op in self._with_loss():
            op.close()

    def _with_loss(self) -> list[HasLoss]:
        members: list[HasLoss] = []
        for op in self.operators:
            if not isinstance(op, HasLoss):
                raise InputError(f"a loss is known for Hessian operators only, this one averages a {type(op).__name__}")
            members.append(op)
        return members


class DifferenceOperator(LinearOperator):
    """A - B, such as the residual H - G of a Hessian and its Gauss-Newton matrix. A product costs one of each.

    Args:
        minuend: A.
        subtrahend: B, of the same shape.

    Raises:
        InputError: If the shapes, the dtypes or the parameters differ.

    Example:
        >>> import numpy as np, spectra
        >>> difference = spectra.DifferenceOperator(*(spectra.DiagonalOperator(np.array(v)) for v in ([3.0], [1.0])))
        >>> difference @ np.array([1.0])
        array([2.])
    """

    def __init__(self, minuend: LinearOperator, subtrahend: LinearOperator):
        self.operators = (minuend, subtrahend)
        for what in ("shape", "dtype", "device"):
            first, second = (getattr(op, what) for op in self.operators)
            if first != second:
                raise InputError(f"operators of one {what} are expected, got {first} and {second}")
        names = [getattr(getattr(op, "space", None), "names", None) for op in self.operators]
        if None not in names and names[0] != names[1]:
            raise InputError("operators in the same parameters are expected: give both the same params=")
        self._has_vectors_of(minuend)

    @property
    def space(self) -> Any:
        """The parameters of A, None where it has none."""
        return getattr(self.operators[0], "space", None)

    @property
    def unverified(self) -> str:  # type: ignore[override]
        """The reason of A, or that of B."""
        return next((op.unverified for op in self.operators if op.unverified), "")

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        minuend, subtrahend = self.operators
        return minuend.multiply_rows(vectors) - subtrahend.multiply_rows(vectors)

    def _multiply_block_rows(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        minuend, subtrahend = self.operators
        return minuend.multiply_block_rows(vectors, block) - subtrahend.multiply_block_rows(vectors, block)

    def in_float64(self) -> DifferenceOperator | None:
        """See `LinearOperator.in_float64`; None where one of both has none."""
        minuend, subtrahend = (op.in_float64() for op in self.operators)
        return None if minuend is None or subtrahend is None else DifferenceOperator(minuend, subtrahend)

    def close(self) -> None:
        """Free the memory of the graphs of both, where they have any."""
        for op in self.operators:
            if isinstance(op, HasLoss):
                op.close()

    def block_rounding(self, block: Block) -> float | None:
        """The error of both products, relative to the difference; None where one is not known."""
        known = [op.block_rounding(block) for op in self.operators]
        if None in known:
            return None
        u = block.take(gaussian(self, seed=0, index=0, stream="difference"))[None]
        return self._relative(known, [op.multiply_block_rows(u, block)[0] for op in self.operators])  # type: ignore[arg-type]

    def precision_error(self) -> float:
        """The error of both products, relative to the difference."""
        errors = [op.precision_error() for op in self.operators]
        return self._relative(errors, self._products()) if any(errors) else 0.0

    def rounding(self) -> float:
        """See `LinearOperator.rounding`; the error of each product counts relative to the difference."""
        return max(super().rounding(), self._relative([op.rounding() for op in self.operators], self._products()))

    def _products(self) -> list[torch.Tensor]:
        """A u and B u for a random u."""
        u = gaussian(self, seed=0, index=0, stream="difference")[None]
        return [op.multiply_rows(u)[0] for op in self.operators]

    def _relative(self, errors: list[float], products: list[torch.Tensor]) -> float:
        """The sum of the errors of A u and B u, which are relative to each, relative to A u - B u."""
        size = norm(products[0] - products[1], over=self.shards)
        return (
            sum(e * norm(p, over=self.shards) for e, p in zip(errors, products, strict=True)) / size
            if size > 0
            else 0.0
        )

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of the operator whose product is not finite."""
        for operator in self.operators:
            if not torch.isfinite(operator.multiply_rows(vectors)).all():
                operator.raise_non_finite(vectors)
        super().raise_non_finite(vectors)


class DeflatedOperator(LinearOperator):
    """P A P with P = I - U U^T: the operator A without the eigenpairs whose vectors are the columns of U.

    The operator equals A on the orthogonal complement of U, and zero on U. If a column is an eigenvector only up to a
    residual of norm r, an eigenvalue of order r^2 / |lambda| is left. A product costs one product of A and 8 n k
    further operations, or 4 n k with `inputs="orthogonal"`. `inner` counts its products too.

    Args:
        inner: A.
        vectors: U, (n, k).
        inputs: "any", or "orthogonal" if every vector that is multiplied is orthogonal to U already, as all vectors of
            a Lanczos recurrence are that starts from such a vector.
        orthonormal: Whether the columns are orthonormal already. If not, they are orthonormalised here.

    Raises:
        InputError: If the vectors have another shape, or `inputs` is unknown.
    """

    def __init__(self, inner: LinearOperator, vectors: torch.Tensor, *, inputs: str = "any", orthonormal: bool = False):
        if vectors.ndim != 2 or vectors.shape[0] != inner.entries:
            raise InputError(f"vectors ({inner.entries}, k) are expected, got {tuple(vectors.shape)}")
        if inputs not in ("any", "orthogonal"):
            raise InputError(f"inputs must be 'any' or 'orthogonal', got {inputs!r}")
        self.inner, self._orthogonal_inputs = inner, inputs == "orthogonal"
        self._has_vectors_of(inner)
        rows = vectors.T.to(device=inner.device, dtype=inner.dtype)
        self._rows = rows if orthonormal else orthonormal_rows(rows, over=inner.shards)[1]

    @property
    def vectors(self) -> torch.Tensor:
        """U, orthonormal columns, (n, k)."""
        return self._rows.T

    def project(self, vector: torch.Tensor) -> torch.Tensor:
        """P v, the part of v orthogonal to U. It is projected twice, because rounding leaves a part along U.

        Args:
            vector: (n,), or several in the rows of (k, n).

        Returns:
            The projected vectors, in the same shape.
        """
        projected = torch.atleast_2d(vector).clone()
        for _ in range(2):
            project_out_(projected, self._rows, over=self.shards)
        return projected.view_as(vector)

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        if not self._orthogonal_inputs:
            vectors = project_out_(vectors.clone(), self._rows, over=self.shards)
        return project_out_(self.inner.multiply_rows(vectors), self._rows, over=self.shards)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of A."""
        self.inner.raise_non_finite(vectors)

    def precision_error(self) -> float:
        """That of A."""
        return self.inner.precision_error()

    def rounding(self) -> float:
        """That of A."""
        return self.inner.rounding()


@runtime_checkable
class Transform(Protocol):
    """A nonsingular matrix P, known through its products and those of its transpose."""

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """P applied to each row of `vectors` (k, n), in their dtype."""
        ...

    def apply_transposed(self, vectors: torch.Tensor) -> torch.Tensor:
        """P^T applied to each row of `vectors` (k, n), in their dtype."""
        ...


class StandIn(LinearOperator):
    """An operator multiplied in the place of another one, on which its products count as well.

    Args:
        inner: The operator that multiplies, such as the same Hessian in float64.
        counted_on: The operator in whose place it multiplies.
    """

    def __init__(self, inner: LinearOperator, counted_on: LinearOperator):
        self.inner, self.counted_on = inner, counted_on
        self._has_vectors_of(inner)
        self.unverified = inner.unverified

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        self.counted_on.products += len(vectors)
        return self.inner.multiply_rows(vectors)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of the operator that multiplies."""
        self.inner.raise_non_finite(vectors)


class CongruentOperator(LinearOperator):
    """P^T (A - t I) P: the operator A - t I after a change of variables with a nonsingular matrix P (a congruence).

    By Sylvester's law of inertia it has as many negative, zero and positive eigenvalues as A - t I (Golub and Van Loan,
    Matrix Computations, 2013, theorem 8.1.17). So its negative eigenvalues are as many as the eigenvalues of A below t.
    Trace, norm, ends and density of its spectrum are not those of A.

    With a mask, the operator is M P^T M (A - t I) M P M, where M is the projection on the coordinates kept. Its inertia
    on these coordinates is that of the principal submatrix of A - t I if the principal submatrix of P is nonsingular,
    which holds for every triangular or positive definite P.

    Args:
        inner: A. It counts its products too.
        transform: P.
        shift: t.
        mask: (n,), True for the coordinates kept; None keeps all.

    Raises:
        InputError: If the mask has another shape.
    """

    def __init__(
        self, inner: LinearOperator, transform: Transform, *, shift: float = 0.0, mask: torch.Tensor | None = None
    ):
        if mask is not None and mask.shape != (inner.entries,):
            raise InputError(f"a mask ({inner.entries},) is expected, got {tuple(mask.shape)}")
        self.inner, self.transform, self.shift = inner, transform, float(shift)
        self._has_vectors_of(inner)
        self.unverified = inner.unverified
        self._dropped = None if mask is None else ~mask.to(inner.device, torch.bool)
        self._rounding: float | None = None

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        vectors = self._kept(self.transform.apply(self._kept(vectors)))
        products = self.inner.multiply_rows(vectors)
        if self.shift:
            products = torch.sub(products, vectors, alpha=self.shift)
        return self._kept(self.transform.apply_transposed(self._kept(products)))

    def _kept(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self._dropped is None else vectors.masked_fill(self._dropped, 0)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of A if its product is not finite."""
        vectors = self._kept(self.transform.apply(self._kept(vectors)))
        if not torch.isfinite(self.inner.multiply_rows(vectors)).all():
            self.inner.raise_non_finite(vectors)
        super().raise_non_finite(vectors)

    def rounding(self) -> float:
        """See `LinearOperator.rounding`; measured once, on the products of this operator.

        P may enlarge directions in which A is small, and with them the rounding error of the products of A. The
        rounding error of A alone does not show that.
        """
        if self._rounding is None:
            self._rounding = super().rounding()
        return self._rounding
