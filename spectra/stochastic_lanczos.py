"""Stochastic Lanczos quadrature: from an operator to its spectral density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import scipy
import torch

from spectra import distributed, moments
from spectra.arithmetic import in_float32
from spectra.density import SpectralDensity
from spectra.eigs import Eigenpairs, topk
from spectra.errors import InputError
from spectra.grouping import probes_together
from spectra.lanczos import Recurrence, Tridiagonal, choose_policy
from spectra.operators import DeflatedOperator, LinearOperator
from spectra.vectors import probe

DEFLATION_TOLERANCE = 1e-3  # of |lambda|: what is left of an outlier is then its square, below the bulk


@in_float32
def slq(
    op: LinearOperator,
    *,
    probes: int = 10,
    steps: int = 100,
    seed: int = 0,
    deflate: int | Eigenpairs = 0,
    reorthogonalize: str = "auto",
    noise: float | None = None,
    spread: str = "none",
    progress: Callable[[int, int], Any] | None = None,
) -> SpectralDensity:
    """The spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Each of `probes` random unit vectors v gives a Gauss rule of `steps` nodes for the measure
    sum_k (u_k . v)^2 delta(lambda - lambda_k), whose mean over v is the density of eigenvalues (Golub and Meurant,
    1993; Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38, 2017). Probe i depends on (seed, i) alone.

    deflate: take this many eigenvalues of largest magnitude out of the recurrence and put them back with their exact
    weights: they are found with `topk` first (its products come on top), or given as its result. Outliers cost a
    recurrence many times over, so this pays wherever a few eigenvalues stand far from the bulk.
    Coordinates that the operator maps to exact zero (clipped weights, embeddings of tokens that do not occur) are
    noticed in the first product and counted as known zeros instead of being sampled; they take the place of one node.

    Costs probes * steps products. With steps >= n the whole matrix costs only n, so it is formed and diagonalised,
    and every estimate is exact. reorthogonalize: "full", "none" or "auto" (full while the basis is small); see
    `spectra.lanczos`. noise: how far rounding may have moved eigenvalues, by default the operator's `rounding`, which
    takes three products to measure for a Hessian, at the norm of T. progress: called as progress(products done,
    products in all).
    spread: "probes" leaves each rank of torch.distributed its part of the probes (`spectra.distributed`); every rank
    gets the whole density, which does not depend on how many there are.
    Raises InputError for counts below one, NonFiniteError for a product that is not finite.
    """
    if probes < 1 or steps < 1:
        raise InputError(f"probes and steps must be at least 1, got probes={probes}, steps={steps}")
    distributed.check_spread(spread, ("none", "probes"))
    policy = choose_policy(op, steps, reorthogonalize)
    n = op.shape[0]
    if steps >= n:
        return _exact(op, probes, steps, progress)
    pairs = _outliers(op, deflate, seed)
    if pairs is not None and len(pairs.values) + steps >= n:
        return _exact(op, probes, steps, progress)
    space = ProbeSpace(op, pairs, seed=seed)
    indices = list(range(probes))
    if spread == "probes":
        if probes < distributed.ranks():
            raise InputError(f"at least one probe a rank is expected, got {probes} for {distributed.ranks()} ranks")
        indices = distributed.mine(indices)
    results = _run(space, indices, steps, policy == "full", _Progress(progress, len(indices) * steps))
    if spread == "probes":
        everyone = [result for part in distributed.gathered(results) for result in part]
        results = sorted(everyone, key=lambda result: result[0])
    return space.density([found for _, found in results], probes=probes, steps=steps, noise=noise)


def _run(
    space: ProbeSpace, indices: Sequence[int], steps: int, keep_basis: bool, report: _Progress
) -> list[tuple[int, Tridiagonal]]:
    """The Jacobi matrices of these probes, as many at a time as fit in memory."""
    kept = steps if keep_basis else 0
    results: list[tuple[int, Tridiagonal]] = []
    group = probes_together(space.op, kept, deflated=space.pairs is not None)
    for first in range(0, len(indices), group):
        chosen = indices[first : first + group]
        recurrence = space.recurrence(chosen, kept)
        if recurrence is None:  # the operator is zero on the whole space
            break
        recurrence.advance(steps - space.zero_nodes, on_step=partial(report.advance, len(chosen)))
        results += zip(chosen, (replace(t, basis=None) for t in recurrence.tridiagonals()), strict=True)
        report.reach((first + len(chosen)) * steps)
    return results


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


def outliers(op: LinearOperator, k: int, *, seed: int = 0, start: torch.Tensor | None = None) -> Eigenpairs:
    """The k eigenpairs of largest magnitude, as well as deflation needs them. start: see `topk`.

    A copy of a repeated eigenvalue that is missed stays in the recurrence, where it is counted all the same, so
    nothing is verified.
    """
    k = min(k, op.shape[0])
    return topk(op, k, which="LM", tol=DEFLATION_TOLERANCE, seed=seed, verify=False, start=start)


def _outliers(op: LinearOperator, deflate: int | Eigenpairs, seed: int) -> Eigenpairs | None:
    if isinstance(deflate, Eigenpairs):
        return deflate if len(deflate.values) else None
    if deflate < 0:
        raise InputError(f"deflate must be a number of eigenvalues or the result of topk, got {deflate}")
    if deflate == 0:
        return None
    return outliers(op, deflate, seed=seed)


def _exact(op: LinearOperator, probes: int, steps: int, progress: Callable[[int, int], Any] | None) -> SpectralDensity:
    n = op.shape[0]
    matrix = np.empty((n, n))
    unit = torch.zeros(n, dtype=op.dtype, device=op.device)
    report = _Progress(progress, n)
    for column in range(n):
        unit[column] = 1
        matrix[:, column] = (op @ unit).double().cpu().numpy()
        unit[column] = 0
        report.advance()
    touched = matrix.any(axis=1)  # the other rows, and so columns, are zero eigenvalues without rounding
    reduced = matrix[np.ix_(touched, touched)]
    eigenvalues = np.zeros(n)
    if touched.any():
        eigenvalues[touched] = scipy.linalg.eigvalsh((reduced + reduced.T) / 2)
    noise = op.rounding() * float(np.abs(eigenvalues).max())
    return SpectralDensity.from_eigenvalues(eigenvalues, probes=probes, steps=steps, noise=noise)


class _Progress:
    """Counts products towards a total for a callback that may be absent."""

    def __init__(self, callback: Callable[[int, int], Any] | None, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def advance(self, products: int = 1) -> None:
        self.reach(self.done + products)

    def reach(self, done: int) -> None:
        if self.callback is not None and done > self.done:
            self.callback(done, self.total)
        self.done = max(done, self.done)
