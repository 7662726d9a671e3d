"""Operators made of other operators: their mean, and one without some of its eigenpairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NoReturn

import torch

from spectra.backend.errors import InputError
from spectra.backend.vectors import orthonormal_rows, take_out_
from spectra.operators.base import LinearOperator, Preflight


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
