"""Wrappers of an operator: one reports its products, the other keeps the vectors in host memory."""

from __future__ import annotations

from typing import NoReturn

import torch

from spectra.algorithms.progress import Progress
from spectra.operators.base import LinearOperator


class _Wrapped(LinearOperator):
    """The same matrix as that of `inner`. Products count in both operators."""

    def __init__(self, inner: LinearOperator):
        self.inner = inner
        self._has_vectors_of(inner)

    def product_bytes(self) -> int | None:
        """Those of the inner operator."""
        return self.inner.product_bytes()

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of the inner operator."""
        self.inner.raise_non_finite(vectors.to(self.inner.device))

    def precision_error(self) -> float:
        """The precision error of the inner operator."""
        return self.inner.precision_error()

    def rounding(self) -> float:
        """The rounding error of the inner operator."""
        return self.inner.rounding()


class CountingOperator(_Wrapped):
    """Reports every product of an operator to a `Progress`.

    Args:
        inner: The operator.
        progress: Counts the products.
    """

    def __init__(self, inner: LinearOperator, progress: Progress):
        super().__init__(inner)
        self.progress = progress

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        products = self.inner.multiply_rows(vectors)
        self.progress.add(len(vectors))
        return products


class HostOperator(_Wrapped):
    """Keeps vectors in host memory, and moves them to the device of an operator for a product.

    Args:
        inner: The operator.
    """

    def __init__(self, inner: LinearOperator):
        super().__init__(inner)
        self.device = torch.device("cpu")

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.inner.multiply_rows(vectors.to(self.inner.device)).to(self.device)
