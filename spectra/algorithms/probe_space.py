"""The space that probes are drawn from: without what is known of the spectrum already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spectra.algorithms.lanczos import Recurrence, Tridiagonal
from spectra.algorithms.topk import Eigenpairs
from spectra.backend.vectors import probe
from spectra.estimates import moments
from spectra.estimates.density import SpectralDensity
from spectra.operators.base import LinearOperator
from spectra.operators.derived import DeflatedOperator

DEFLATION_TOLERANCE = 1e-3  # of |lambda|: what is left of an outlier is then its square, below the bulk


class ProbeSpace:
    """The space that probes are drawn from: orthogonal to deflated eigenvectors, and without the coordinates that the
    operator maps to zero, which the first product reveals."""

    def __init__(self, op: LinearOperator, pairs: Eigenpairs | None, *, seed: int):
        self.pairs, self.seed = pairs, seed
        # a recurrence that starts orthogonal to the deflated vectors stays so: only images are projected
        self.op = op if pairs is None else DeflatedOperator(op, pairs.vectors, inputs="orthogonal")
        self.zero_count = 0
        self._zeros: torch.Tensor | None = None  # where the operator is zero, as a mask (n,)

    @property
    def zero_nodes(self) -> int:
        """1 where a node of each rule stands for the known zeros, else 0."""
        return int(self.zero_count > 0)

    @property
    def dimension(self) -> int:
        """How many dimensions the probes cover."""
        return self.op.shape[0] - self.zero_count - (0 if self.pairs is None else len(self.pairs.values))

    def recurrence(self, indices: Sequence[int], kept: int) -> Recurrence | None:
        """The probes of these indices, ready to advance, with a basis of `kept` vectors each; None where nothing is
        left to probe."""
        drawn = [probe(self.op, seed=self.seed, index=index) for index in indices]
        starts = torch.stack(drawn) if len(drawn) > 1 else drawn[0][None]  # one alone is not copied
        del drawn
        if isinstance(self.op, DeflatedOperator):
            starts = self.op.project(starts)
        images = self._find_zeros(starts) if self._zeros is None else None
        assert self._zeros is not None
        if self.dimension <= 0:
            return None
        if self.zero_count:
            starts.masked_fill_(self._zeros, 0)
            if isinstance(self.op, DeflatedOperator):  # its vectors have lost what they had there
                starts = self.op.project(starts)
        return Recurrence(self.op, starts, keep_basis=kept, first_images=images)

    def _find_zeros(self, starts: torch.Tensor) -> torch.Tensor:
        """The first products; notice where they are exactly zero, and drop those coordinates from the deflated vectors
        too.

        Zero rows of a symmetric matrix are zero columns, so the image of the whole probe is that of its part outside
        them, and no product is lost.
        """
        inner = self.op.inner if isinstance(self.op, DeflatedOperator) else self.op
        images = inner.rows(starts)
        self._zeros = zeros = ~images.any(dim=0)
        self.zero_count = int(torch.count_nonzero(zeros))
        if isinstance(self.op, DeflatedOperator):
            if self.zero_count:
                vectors = self.op.vectors.masked_fill(zeros[:, None], 0)
                self.op = DeflatedOperator(inner, vectors, inputs="orthogonal")
            images = self.op.project(images)
        return images

    def density(
        self, results: Sequence[Tridiagonal], *, probes: int, steps: int, noise: float | None = None
    ) -> SpectralDensity:
        """Stack Jacobi matrices, one a probe, padded where a breakdown ended the recurrence early."""
        alphas, betas = np.zeros((probes, steps)), np.zeros((probes, steps))
        lengths = np.zeros(probes, dtype=int)
        for row, result in enumerate(results):
            alphas[row, : result.steps], betas[row, : result.steps] = result.alphas, result.betas
            lengths[row] = result.steps
        atoms, counts, residuals = [], [], []
        if self.pairs is not None:
            atoms = list(self.pairs.values)
            rounding = moments.ENDS_ROUNDING * self.op.rounding() * np.abs(self.pairs.values).max()
            residuals = list(np.maximum(self.pairs.residuals, rounding))
            counts = [1] * len(atoms)
        if self.zero_count:
            atoms, counts, residuals = [*atoms, 0.0], [*counts, self.zero_count], [*residuals, 0.0]
        order = np.argsort(atoms, kind="stable")
        if noise is None:
            radius = float(np.abs(alphas).max() + 2 * np.abs(betas).max()) if alphas.size else 0.0
            noise = self.op.rounding() * radius
        return SpectralDensity(
            self.op.shape[0],
            alphas,
            betas,
            lengths,
            np.array(atoms, dtype=float)[order],
            np.array(counts, dtype=float)[order],
            np.array(residuals, dtype=float)[order],
            noise=noise,
            exact=not results,
            seed=self.seed,
        )
