"""The subspace from which probe vectors are drawn: without the eigenvectors that are known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from spectra.algorithms.lanczos import LanczosRecurrence, Tridiagonal
from spectra.algorithms.topk import Eigenpairs
from spectra.backend.random_vectors import probe_vector
from spectra.estimates.density import SpectralDensity
from spectra.estimates.ends import ROUNDING_FACTOR
from spectra.estimates.measure import KnownEigenvalues
from spectra.operators.base import LinearOperator
from spectra.operators.derived import DeflatedOperator

DEFLATION_TOLERANCE = 1e-3  # residual / |lambda|; deflation leaves lambda times its square of an eigenvalue


class ProbeSpace:
    """The orthogonal complement of deflated eigenvectors and of coordinates that the operator maps to zero.

    These coordinates have zero rows and columns, which are detected in the first product. They and the deflated
    eigenvalues are counted exactly. Probe vectors sample the rest of the spectrum.

    Args:
        op: A, a symmetric operator (n, n).
        pairs: The eigenpairs to deflate, or None.
        seed: Seed of the probe vectors.

    Attributes:
        op: A, or the deflated operator.
        pairs: The deflated eigenpairs, or None.
        seed: Seed of the probe vectors.
        zero_count: How many coordinates the operator maps to zero, known after the first call of `recurrence`.
    """

    def __init__(self, op: LinearOperator, pairs: Eigenpairs | None, *, seed: int):
        self.pairs, self.seed = pairs, seed
        # the vectors of a recurrence stay orthogonal to the deflated ones: only its products need projecting
        self.op = op
        if pairs is not None:
            self.op = deflated = DeflatedOperator(op, pairs.vectors, inputs="orthogonal")
            self.pairs = replace(pairs, vectors=deflated.vectors)  # avoids a second copy of the vectors
        self.zero_count = 0
        self._zeros: torch.Tensor | None = None  # mask (n,) of the coordinates that the operator maps to zero

    @property
    def zero_nodes(self) -> int:
        """How many nodes of each quadrature rule represent the zero coordinates: 1 if there are any, else 0."""
        return int(self.zero_count > 0)

    @property
    def dimension(self) -> int:
        """The dimension of the space."""
        return self.op.shape[0] - self.zero_count - (0 if self.pairs is None else len(self.pairs.values))

    def recurrence(self, indices: Sequence[int], basis_size: int, *, seldom: bool = False) -> LanczosRecurrence | None:
        """A Lanczos recurrence from probe vectors of this space.

        Args:
            indices: Which probe vectors of the seed.
            basis_size: How many basis vectors to store for each (`LanczosRecurrence`).
            seldom: Whether to reorthogonalize against them no more often than needed.

        Returns:
            The recurrence before its first step, or None where the space has dimension zero.
        """
        drawn = [probe_vector(self.op, seed=self.seed, index=index) for index in indices]
        starts = torch.stack(drawn) if len(drawn) > 1 else drawn[0][None]  # a single vector is not copied
        del drawn
        if isinstance(self.op, DeflatedOperator):
            starts = self.op.project(starts)
        products = self._detect_zeros(starts) if self._zeros is None else None
        assert self._zeros is not None
        if self.dimension <= 0:
            return None
        if self.zero_count:
            starts.masked_fill_(self._zeros, 0)
            if isinstance(self.op, DeflatedOperator):  # `_detect_zeros` has changed its vectors
                starts = self.op.project(starts)
        return LanczosRecurrence(self.op, starts, basis_size=basis_size, seldom=seldom, first_products=products)

    def _detect_zeros(self, starts: torch.Tensor) -> torch.Tensor:
        """Multiply the first start vectors, and find the coordinates that are exactly zero in all products: zero rows.

        Zero rows of a symmetric matrix are zero columns. The products are therefore also those of the start vectors
        with these coordinates set to zero, and the recurrence can use them. The coordinates are removed from the
        deflated eigenvectors as well. Returns the products (k, n).
        """
        inner = self.op.inner if isinstance(self.op, DeflatedOperator) else self.op
        products = inner.multiply_rows(starts)
        self._zeros = zeros = ~products.any(dim=0)
        count = torch.count_nonzero(zeros)
        self.zero_count = int(count if self.op.shards is None else self.op.shards.sum(count))
        if isinstance(self.op, DeflatedOperator):
            if self.zero_count:
                vectors = self.op.vectors.masked_fill(zeros[:, None], 0)
                self.op = DeflatedOperator(inner, vectors, inputs="orthogonal")
            products = self.op.project(products)
        return products

    def density(
        self, results: Sequence[Tridiagonal], *, probes: int, steps: int, rounding_error: float | None = None
    ) -> SpectralDensity:
        """Build the density from the Jacobi matrices of probe vectors and from the eigenvalues that are known.

        Args:
            results: The Jacobi matrix of each probe vector; empty where nothing is left to sample.
            probes: Number of rows of the density's arrays.
            steps: Number of their columns; matrices that a breakdown made smaller are padded with zeros.
            rounding_error: Bound on how far rounding error has moved an eigenvalue, by default the operator's relative
                rounding error, and the orthogonality that was lost, times a bound on the norm of the Jacobi matrices.

        Returns:
            The density.
        """
        alphas, betas = np.zeros((probes, steps)), np.zeros((probes, steps))
        lengths = np.zeros(probes, dtype=int)
        for row, result in enumerate(results):
            alphas[row, : result.steps], betas[row, : result.steps] = result.alphas, result.betas
            lengths[row] = result.steps
        known = self._known_eigenvalues()
        if rounding_error is None:
            norm = float(np.abs(alphas).max() + 2 * np.abs(betas).max()) if alphas.size else 0.0
            lost = max((result.lost for result in results), default=0.0)
            rounding_error = (self.op.rounding() + lost) * norm
        return SpectralDensity(
            self.op.shape[0],
            alphas,
            betas,
            lengths,
            known.values,
            known.counts,
            known.errors,
            rounding_error=rounding_error,
            exact=not results,
            seed=self.seed,
        )

    def _known_eigenvalues(self) -> KnownEigenvalues:
        """The deflated eigenvalues and the exact zeros, in ascending order."""
        values, counts, errors = [], [], []
        if self.pairs is not None:
            values = list(self.pairs.values)
            rounding_error = ROUNDING_FACTOR * self.op.rounding() * np.abs(self.pairs.values).max()
            errors = list(np.maximum(self.pairs.residuals, rounding_error))
            counts = [1] * len(values)
        if self.zero_count:
            values, counts, errors = [*values, 0.0], [*counts, self.zero_count], [*errors, 0.0]
        order = np.argsort(values, kind="stable")
        values, counts, errors = (np.array(numbers, dtype=float)[order] for numbers in (values, counts, errors))
        return KnownEigenvalues(values, counts, errors)
