"""Stochastic Lanczos quadrature: from an operator to its spectral density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import scipy
import torch

from spectra.algorithms.block_size import probes_together
from spectra.algorithms.lanczos import Tridiagonal, choose_policy
from spectra.algorithms.probe_space import DEFLATION_TOLERANCE, ProbeSpace
from spectra.algorithms.topk import Eigenpairs, topk
from spectra.backend import ranks
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.estimates.density import SpectralDensity
from spectra.operators.base import LinearOperator


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
    ranks.check_spread(spread, ("none", "probes"))
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
        if probes < ranks.rank_count():
            raise InputError(f"at least one probe a rank is expected, got {probes} for {ranks.rank_count()} ranks")
        indices = ranks.part_of_rank(indices)
    results = _run(space, indices, steps, policy == "full", _Progress(progress, len(indices) * steps))
    if spread == "probes":
        everyone = [result for part in ranks.all_gather(results) for result in part]
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
