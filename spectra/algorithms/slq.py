"""Stochastic Lanczos quadrature: from an operator to its spectral density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch

from spectra.algorithms.block_size import VECTORS_PER_PROBE, probe_block_size
from spectra.algorithms.congruence import Congruence
from spectra.algorithms.each_block import each_block
from spectra.algorithms.exact import exact_density
from spectra.algorithms.inertia import COUNT_PRODUCTS, count_below
from spectra.algorithms.lanczos import Tridiagonal, choose_reorthogonalization
from spectra.algorithms.origin import origin_of
from spectra.algorithms.probe_space import DEFLATION_TOLERANCE, ProbeSpace
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.topk import Eigenpairs, topk
from spectra.backend import ranks
from spectra.backend.errors import InputError, check_whole
from spectra.backend.float32 import in_float32
from spectra.estimates.density import SpectralDensity
from spectra.operators.base import LinearOperator, check_is_operator
from spectra.operators.blocks import Blocks


@overload
def slq(op: LinearOperator, *, blocks: None = None, **options: Any) -> SpectralDensity: ...


@overload
def slq(op: LinearOperator, *, blocks: Blocks, **options: Any) -> dict[str, SpectralDensity]: ...


@in_float32
def slq(
    op: LinearOperator,
    *,
    blocks: Blocks | None = None,
    probes: int = 10,
    steps: int = 100,
    seed: int = 0,
    deflate: int | Eigenpairs = 0,
    reorthogonalize: str = "auto",
    rounding_error: float | None = None,
    congruence: bool | Congruence = False,
    count_products: int = COUNT_PRODUCTS,
    spread: str = "none",
    progress: Callable[[int, int], Any] | None = None,
) -> SpectralDensity | dict[str, SpectralDensity]:
    """The spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Each random unit vector v (probe vector) has the spectral measure sum_k (u_k . v)^2 delta(lambda - lambda_k), with
    (lambda_k, u_k) the eigenpairs. Its mean over v is the density of eigenvalues. `steps` Lanczos steps give the Gauss
    rule of this measure with `steps` nodes (Golub and Meurant, 1993; Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38,
    2017). The cost is probes * steps products.

    With steps >= n the matrix is formed from n products and diagonalized, and every estimate is exact. Coordinates that
    the operator maps to exactly zero (clipped weights, embeddings of tokens that do not occur) are detected in the
    first product and counted as zero eigenvalues instead of being sampled. They take the place of one node.

    With `blocks` the density of each diagonal block A_bb is measured, from the kept graphs of one operator. It is that
    of an operator in these parameters alone, with the same probe vectors whatever the other blocks are.

    Args:
        op: A, a symmetric operator (n, n).
        blocks: Which diagonal blocks to measure instead of the whole: "layers", globs, module types or a mapping, see
            `spectra.blocks_of`.
        probes: How many probe vectors.
        steps: Lanczos steps for each probe vector.
        seed: Seed of the probe vectors; vector i depends on (seed, i) alone.
        deflate: How many eigenvalues of largest magnitude to compute with `topk` first, which takes additional
            products, or the result of `topk`. They are projected out of the recurrences and enter the density with
            exact weights. This saves many steps wherever a few eigenvalues lie far from the others.
        reorthogonalize: "full", "none" (see `spectra.lanczos`), or "auto": full while the basis is small.
        rounding_error: How far rounding error may have moved an eigenvalue, in the units of the eigenvalues. By default
            the operator's relative `rounding` times the norm of T; measuring that costs three products for a Hessian.
        congruence: Whether to count the eigenvalues below zero after a change of variables too, or a change of
            variables found earlier to start from (`spectra.count_below`). The density's `negative_share` is then read
            from the count, and everything else from the operator itself.
        count_products: The largest number of products for that count.
        spread: "probes" distributes the probe vectors over the ranks of torch.distributed (`spectra.distributed`).
            Every rank gets the whole density, which does not depend on the number of ranks.
        progress: Called as progress(products done, products in total), including those of deflation. How many deflation
            takes is not known in advance, so the total changes until it is done.

    Returns:
        The `SpectralDensity`, whose methods give shares, sums and extreme eigenvalues with intervals. With `blocks` a
        dictionary {name of the block: SpectralDensity}.

    Raises:
        InputError: If a count is below one, or an option has an unknown value.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import numpy as np, spectra
        >>> op = spectra.DiagonalOperator(np.append(np.linspace(-1, 3, 2000), 40.0))
        >>> density = spectra.slq(op, probes=5, steps=30, deflate=1)
        >>> print(f"{density.negative_share().value:.2f} {density.lambda_max().value:.2f}")
        0.25 40.00
    """
    check_is_operator(op)
    check_whole(probes=probes, steps=steps, seed=seed)
    if probes < 1 or steps < 1:
        raise InputError(f"probes and steps must be at least 1, got probes={probes}, steps={steps}")
    ranks.check_spread(spread, ("none", "probes"))
    if isinstance(deflate, int) and deflate < 0:
        raise InputError(f"deflate must be a number of eigenvalues or the result of topk, got {deflate}")
    if blocks is not None:
        if isinstance(deflate, Eigenpairs) or isinstance(congruence, Congruence):
            raise InputError("blocks= takes deflate= as a number and congruence= as True or False, for every block")
        options = {"probes": probes, "steps": steps, "seed": seed, "deflate": deflate, "congruence": congruence}
        options |= {"reorthogonalize": reorthogonalize, "rounding_error": rounding_error, "spread": spread}
        return each_block(op, blocks, partial(slq, count_products=count_products, **options), progress)
    count = Progress(progress, 0)
    density = _measure(op, probes, steps, seed, deflate, reorthogonalize, rounding_error, spread, count)
    if congruence is not False and not density.exact:
        start = congruence if isinstance(congruence, Congruence) else None
        counted = count_below(op, products=count_products, seed=seed, start=start, progress=count.part(0))
        density = density.with_count(counted[0] if counted else None)
    count.finish()
    return density.with_origin(origin_of(op))


def _measure(
    op: LinearOperator,
    probes: int,
    steps: int,
    seed: int,
    deflate: int | Eigenpairs,
    reorthogonalize: str,
    rounding_error: float | None,
    spread: str,
    progress: Progress,
) -> SpectralDensity:
    """The density, with its products counted."""
    reorthogonalize = choose_reorthogonalization(op, steps, reorthogonalize)
    n = op.shape[0]
    if steps >= n:
        return exact_density(op, probes=probes, steps=steps, progress=progress)
    pairs = _pairs_to_deflate(op, deflate, seed, progress.part(probes * steps))
    if pairs is not None and len(pairs.values) + steps >= n:
        return exact_density(op, probes=probes, steps=steps, progress=progress)
    space = _probe_space(op, pairs, seed)
    del pairs  # frees their vectors: the space has its own copy
    basis_size = steps if reorthogonalize == "full" else 0
    op.reserve(VECTORS_PER_PROBE + basis_size)
    indices = list(range(probes))
    if spread == "probes":
        if probes < ranks.rank_count():
            raise InputError(
                f"at least one probe vector for each rank is expected, got {probes} for {ranks.rank_count()} ranks"
            )
        indices = ranks.items_of_rank(indices)
    results = _tridiagonals(space, indices, steps, basis_size, progress)
    if spread == "probes":
        gathered = [result for part in ranks.all_gather(results) for result in part]
        results = sorted(gathered, key=lambda result: result[0])
    return space.density([found for _, found in results], probes=probes, steps=steps, rounding_error=rounding_error)


def _probe_space(op: LinearOperator, pairs: Eigenpairs | None, seed: int) -> ProbeSpace:
    """The space that probe vectors are drawn from; an InputError where memory is too short for it."""
    try:
        return ProbeSpace(op, pairs, seed=seed)
    except torch.OutOfMemoryError:
        count = 0 if pairs is None else len(pairs.values)
    raise InputError(
        f"there is no memory left to deflate {count} eigenvectors of {op.shape[0]:,} numbers each: deflate fewer, or "
        "measure fewer parameters (params=)"
    )


def _tridiagonals(
    space: ProbeSpace, indices: Sequence[int], steps: int, basis_size: int, progress: Progress
) -> list[tuple[int, Tridiagonal]]:
    """The index and the Jacobi matrix of each of these probe vectors, computed in blocks that fit in memory."""
    results: list[tuple[int, Tridiagonal]] = []
    before = progress.done
    progress.total = before + len(indices) * steps
    block_size = probe_block_size(space.op, basis_size, deflated=space.pairs is not None)
    for first in range(0, len(indices), block_size):
        block = indices[first : first + block_size]
        recurrence = space.recurrence(block, basis_size)
        if recurrence is None:  # the operator is zero on the whole space
            break
        recurrence.advance(steps - space.zero_nodes, on_step=partial(progress.add, len(block)))
        results += zip(block, (replace(t, basis=None) for t in recurrence.tridiagonals()), strict=True)
        progress.reach(before + (first + len(block)) * steps)
    return results


def _pairs_to_deflate(
    op: LinearOperator, deflate: int | Eigenpairs, seed: int, progress: Callback
) -> Eigenpairs | None:
    """The eigenpairs that the option `deflate` asks for, None if there are none."""
    if isinstance(deflate, Eigenpairs):
        return deflate if len(deflate.values) else None
    if deflate == 0:
        return None
    return largest_eigenpairs(op, deflate, seed=seed, progress=progress)


def largest_eigenpairs(
    op: LinearOperator,
    k: int,
    *,
    seed: int = 0,
    start: torch.Tensor | None = None,
    progress: Callback | None = None,
) -> Eigenpairs:
    """The eigenpairs of largest magnitude, to the accuracy that deflation needs.

    Missed copies of repeated eigenvalues are not searched for, because the recurrences of the probe vectors count them.

    Args:
        op: A, a symmetric operator (n, n).
        k: How many pairs; n at most are returned.
        seed: Seed of the random vectors.
        start: (n, j), guesses of the eigenvectors, as in `topk`.
        progress: Called as progress(products done, products expected in total).

    Returns:
        The pairs, with their residuals.
    """
    k = min(k, op.shape[0])
    return topk(op, k, which="LM", tol=DEFLATION_TOLERANCE, seed=seed, verify=False, start=start, progress=progress)
