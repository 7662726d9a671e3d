"""The trace of an operator, estimated from a few operator-vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch

from spectra.algorithms.block_size import max_vectors_in_memory, probe_block_size
from spectra.algorithms.each_block import each_block
from spectra.algorithms.origin import unverified
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.wrapped import CountingOperator
from spectra.backend.errors import InputError, check_whole
from spectra.backend.float32 import in_float32
from spectra.backend.random_vectors import gaussian, probe_vector
from spectra.backend.shards import Shards
from spectra.backend.vectors import inner_products, orthonormal_rows, project_out_, row_dots
from spectra.estimates.estimate import (
    Estimate,
    certain,
    judged_by_size,
    sampling_interval,
    student_interval,
    unresolved,
)
from spectra.operators.base import LinearOperator, check_is_operator
from spectra.operators.blocks import Blocks

METHODS = ("hutchinson", "hutch++", "xtrace")
FEWEST_PRODUCTS = {"hutchinson": 1, "hutch++": 6, "xtrace": 4}
# XTrace's samples share a sketch, so their variance underestimates that of their mean. Student's interval covered 88 %
# of 2,800 spectra of benchmarks/trust, and an interval wider by this factor 97 % of 800.
XTRACE_INFLATION = 1.5
MAX_BLOCK = 10  # most vectors multiplied at once: a GPU gains little from more, and products hold memory for each
FEWEST_BLOCKS = 12  # of Hutch++'s products: the first two blocks show whether a range dominates
ENERGY_DECAY = 0.5  # energy that the next block of the Krylov space is expected to capture, relative to the last block
NEGLIGIBLE = 1e3  # units of rounding error, relative to ||A||, below which a direction is rounding error alone


@overload
def trace(op: LinearOperator, *, blocks: None = None, **options: Any) -> Estimate: ...


@overload
def trace(op: LinearOperator, *, blocks: Blocks, **options: Any) -> dict[str, Estimate]: ...


@in_float32
def trace(
    op: LinearOperator,
    *,
    blocks: Blocks | None = None,
    method: str = "hutchinson",
    probes: int = 30,
    seed: int = 0,
    progress: Callback | None = None,
) -> Estimate | dict[str, Estimate]:
    """The trace of a symmetric operator with a 95 % interval.

    * "hutchinson": tr A is n times the mean of v . A v over random unit vectors v (Hutchinson, Commun. Stat. 18, 1989).
    * "hutch++": tr A = tr(Q A Q^T) + tr(P A P) with P = I - Q^T Q, where Q is a basis of a dominant range. The first
      part is exact, and Hutchinson estimates the second (Meyer, Musco, Musco and Woodruff, SOSA 2021). Q spans a block
      Krylov space, whose products give both the range and its trace (Chen and Hallman, SIAM J. Matrix Anal. 44, 2023).
      Q takes at most half of the products, and grows only while that is expected to narrow the interval (as in
      Persson, Cortinovis and Kressner, SIAM J. Matrix Anal. 43, 2022). So little is lost where no range dominates.
    * "xtrace": half of the products give a basis for the range, the others its trace. Each random vector in turn is
      left out of the basis and used to estimate the rest (Epperly, Tropp and Webber, SIAM J. Matrix Anal. 45, 2024).

    "hutch++" and "xtrace" are more accurate where a few eigenvalues dominate, and hold up to `probes` / 2 vectors.

    Args:
        op: A, a symmetric operator (n, n).
        blocks: Which diagonal blocks to take the trace of instead of the whole: "layers", globs, module types or a
            mapping, see `spectra.blocks_of`.
        method: "hutchinson", "hutch++" or "xtrace".
        probes: How many products to take. With n or more the trace is the exact sum of the diagonal, from n products.
        seed: Seed of the random vectors.
        progress: Called as progress(products done, products in total).

    Returns:
        The `Estimate`, with the number of products taken. It is unresolved where the interval holds zero or is longer
        than half of the value. With `blocks` a dictionary {name of the block: Estimate}.

    Raises:
        InputError: If the method is unknown, or `probes` is too small for it.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import numpy as np, spectra
        >>> op = spectra.DiagonalOperator(np.append(np.full(1000, 0.5), [300.0, 200.0]))
        >>> estimate = spectra.trace(op, method="hutch++", probes=30)
        >>> print(f"{estimate.value:.1f} from {estimate.products} products")
        1000.0 from 30 products
    """
    check_is_operator(op)
    check_whole(probes=probes, seed=seed)
    if method not in METHODS:
        raise InputError(f"the method must be one of {', '.join(METHODS)}, got {method!r}")
    if probes < FEWEST_PRODUCTS[method]:
        raise InputError(f"{method} needs at least {FEWEST_PRODUCTS[method]} products, got probes={probes}")
    if blocks is not None:
        return each_block(op, blocks, partial(trace, method=method, probes=probes, seed=seed), progress)
    counted = CountingOperator(op, Progress(progress, min(probes, op.shape[0])))
    if probes >= op.shape[0]:
        estimate = _exact(counted)
    else:
        sample = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
        estimate = judged_by_size(sample(counted, probes, seed))
    counted.progress.finish()
    return unresolved(estimate, unverified(op))


@in_float32
def hutchinson_samples(
    op: LinearOperator, *, probes: int, seed: int = 0, tol: float = 0.0
) -> tuple[np.ndarray, Estimate]:
    """Hutchinson's samples n (v . A v) of the trace, v uniform on the unit sphere, beside their mean's 95 % interval.

    Args:
        op: A, a symmetric operator (n, n).
        probes: How many samples at most. With n or more there is one: the exact sum of the diagonal, from n products.
        seed: Seed of the random vectors, the same as those of `trace`.
        tol: End earlier, at 10, 20, 40, ... samples, where half of the interval is at most tol |mean|.

    Returns:
        The samples, (probes,) or fewer, and the estimate that `trace` gives of as many.

    Raises:
        InputError: If `probes` is below one.
        NonFiniteError: If a product is not finite.
    """
    if probes < 1:
        raise InputError(f"at least one product is expected, got probes={probes}")
    if probes >= op.shape[0]:
        exact = _exact(op)
        return np.array([exact.value]), unresolved(exact, unverified(op))
    forms: list[float] = []
    squares: list[float] = []
    while True:
        start, stop = len(forms), min(max(MAX_BLOCK, 2 * len(forms)), probes)
        more = _quadratic_forms(op, stop - start, lambda i, at=start: probe_vector(op, seed=seed, index=at + i))
        forms, squares = forms + more[0], squares + more[1]
        estimate = replace(_sphere_interval(forms, squares, op.shape[0]), products=stop)
        if stop == probes or estimate.half_width <= tol * abs(estimate.value):
            return op.shape[0] * np.array(forms), unresolved(judged_by_size(estimate), unverified(op))


def _exact(op: LinearOperator) -> Estimate:
    """The sum of the diagonal, uncertain by rounding error alone."""
    diagonal = op.diagonal(products=op.shape[0]).value
    size = float(np.abs(diagonal).sum())
    rounding = 100 * torch.finfo(op.dtype).eps * size
    exact = replace(certain(float(diagonal.sum()), rounding=rounding), products=op.shape[0])
    return judged_by_size(exact, scale=size)


def _hutchinson(op: LinearOperator, probes: int, seed: int) -> Estimate:
    """n times the mean quadratic form of random unit vectors."""
    forms, squares = _quadratic_forms(op, probes, lambda index: probe_vector(op, seed=seed, index=index))
    return replace(_sphere_interval(forms, squares, op.shape[0]), products=probes)


def _quadratic_forms(
    op: LinearOperator, count: int, draw: Callable[[int], torch.Tensor], basis: torch.Tensor | None = None
) -> tuple[list[float], list[float]]:
    """v . A v and ||A v||^2 for the unit vectors v = draw(0), ..., draw(count - 1).

    With a basis, orthonormal rows (m, n), the vectors are projected onto its orthogonal complement and normalized, and
    A is restricted to that complement.
    """
    forms: list[float] = []
    squares: list[float] = []
    block_size, over = _block_size(op, basis), op.shards
    for first in range(0, count, block_size):
        vectors = torch.stack([draw(index) for index in range(first, min(first + block_size, count))])
        if basis is not None:
            # one pass is enough, because little of a random vector lies in a small basis
            project_out_(vectors, basis, over=over)
            vectors /= row_dots(vectors, vectors, over=over).sqrt()[:, None].to(vectors.dtype)
        products = op.multiply_rows_checked(vectors)
        forms += row_dots(vectors, products, over=over).tolist()
        inside = 0.0 if basis is None else _along(products, basis, over).double().square().sum(dim=1)
        squares += (row_dots(products, products, over=over) - inside).tolist()
    return forms, squares


def _block_size(op: LinearOperator, basis: torch.Tensor | None = None) -> int:
    """How many vectors to multiply at once; more with a basis, where each pass over it serves the whole block."""
    return min(probe_block_size(op, 0, deflated=basis is not None), MAX_BLOCK)


def _multiply(op: LinearOperator, vectors: torch.Tensor) -> torch.Tensor:
    """A applied to each row (k, n), in blocks that fit in memory."""
    block_size = _block_size(op)
    products = torch.empty_like(vectors)
    for first in range(0, len(vectors), block_size):
        products[first : first + block_size] = op.multiply_rows_checked(vectors[first : first + block_size])
    return products


def _along(vectors: torch.Tensor, basis: torch.Tensor, over: Shards | None) -> torch.Tensor:
    """The dot products of each row with each row of a basis."""
    found = vectors @ basis.T
    return found if over is None else over.sum(found)


def _sphere_interval(forms: list[float], squares: list[float], n: int) -> Estimate:
    """n times the mean of v . A v over uniformly random unit vectors v in n dimensions, with its interval.

    The variance of a single v . A v is 2 (E ||A v||^2 - E[v . A v]^2) / (n + 2). The interval takes the larger of this,
    with means in place of expectations, and the variance of the samples. Skewness and degrees of freedom are those of
    the samples.
    """
    samples, count = n * np.array(forms), len(forms)
    variance = max(float(np.mean(squares) - np.mean(forms) ** 2), 0.0)  # of the eigenvalues
    deviation = n * math.sqrt(2 * variance / (n + 2))
    if count == 1:
        return sampling_interval(float(samples[0]), deviation, 0.0)
    sample_deviation = float(samples.std(ddof=1))
    centred = samples - samples.mean()
    skewness = float((centred**3).mean() / (centred**2).mean() ** 1.5) if sample_deviation > 0 else 0.0
    root = math.sqrt(count)
    error = max(deviation, sample_deviation) / root
    return sampling_interval(float(samples.mean()), error, skewness / root, freedom=count - 1)


def _hutch_plus_plus(op: LinearOperator, probes: int, seed: int) -> Estimate:
    """The exact trace on a dominant range, plus Hutchinson's estimate on its orthogonal complement."""
    basis, captured = _dominant_range(op, probes, seed)
    forms, squares = _quadratic_forms(
        op, probes - len(basis), lambda index: gaussian(op, seed=seed, index=index, stream="rest"), basis
    )
    rest = _sphere_interval(forms, squares, op.shape[0] - len(basis))
    return Estimate(
        captured + rest.value, captured + rest.low, captured + rest.high, rest.resolved, rest.reason, probes
    )


def _dominant_range(op: LinearOperator, probes: int, seed: int) -> tuple[torch.Tensor, float]:
    """Q, orthonormal rows (m, n) of a block Krylov space, and tr(Q A Q^T), from m products.

    Q captures the energy E = 2 ||A Q^T||_F^2 - ||Q A Q^T||_F^2 of ||A||_F^2. The variance of the whole estimate is
    proportional to (||A||_F^2 - E) / (probes - m). Another block therefore narrows the interval if it captures a larger
    part of the energy that is left than it takes of the products that are left.
    """
    block_size = max(min(probes // FEWEST_BLOCKS, MAX_BLOCK), 1)
    max_size = max(min(probes // 2, max_vectors_in_memory(op)), 2 * block_size)
    basis = torch.empty(max_size, op.entries, dtype=op.dtype, device=op.device)
    block = _complete_block(op, basis[:0], basis[:0], block_size, seed)
    captured_trace = captured_energy = energy = norm = 0.0
    over = op.shards
    filled = 0
    while True:
        products = _multiply(op, block)
        basis[filled : filled + block_size] = block
        squares = row_dots(products, products, over=over)
        inside = _along(products, basis[: filled + block_size], over)
        coupling = inside[:, :filled]  # to earlier blocks, which appears on both sides of the diagonal of Q A Q^T
        gain = float(2 * squares.sum() - inside.double().square().sum() - coupling.double().square().sum())
        captured_trace += float(row_dots(block, products, over=over).sum())
        captured_energy += gain
        norm = max(norm, float(squares.max().sqrt()))
        if filled == 0:  # the first block is random, so its products estimate ||A||_F^2
            energy = op.shape[0] * float(squares.sum()) / block_size
        filled += block_size
        worthwhile = ENERGY_DECAY * gain * (probes - filled) > block_size * max(energy - captured_energy, 0.0)
        if filled + block_size > max_size or not (worthwhile or filled == block_size):
            return basis[:filled], captured_trace
        products.addmm_(inside, basis[:filled], alpha=-1)
        lower, block = orthonormal_rows(project_out_(products, basis[:filled], over=over), over=over)
        rounding = NEGLIGIBLE * torch.finfo(op.dtype).eps * norm
        block = _complete_block(op, block[torch.diagonal(lower).abs() > rounding], basis[:filled], block_size, seed)


def _complete_block(op: LinearOperator, block: torch.Tensor, basis: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """`size` orthonormal rows orthogonal to the basis: those of `block`, and random ones where it has fewer."""
    missing = range(len(basis) + len(block), len(basis) + size)
    if not missing:
        return block
    rows = torch.cat([block, _test_vectors(op, missing, seed)])
    for _ in range(2):
        project_out_(rows, basis, over=op.shards)
    return orthonormal_rows(rows, over=op.shards)[1]


def _xtrace(op: LinearOperator, probes: int, seed: int) -> Estimate:
    """The mean over test vectors w_i of the trace estimated with w_i left out of the sketch Y = A W = Q R.

    The range without w_i has the projector Q (I - s_i s_i^T) Q^T, where s_i is the unit vector along column i of R^-T.
    The trace on that range is exact. The remainder is estimated by w_i, projected onto its orthogonal complement and
    scaled to the length that the sphere gives.

    The code holds vectors in rows, so R is the transpose of the factor that `orthonormal_rows` gives.
    """
    n, count, over = op.shape[0], probes // 2, op.shards
    tests = _test_vectors(op, range(count), seed)
    lower, basis = orthonormal_rows(_multiply(op, tests), over=over)
    products = _multiply(op, basis)
    pairs = ((basis, products), (basis, tests), (products, tests))
    small = (lower.T, *(inner_products(rows, others, over=over) for rows, others in pairs))
    r, h, w, t = (matrix.cpu().numpy() for matrix in small)
    h = (h + h.T) / 2
    diagonal = np.abs(np.diag(r))
    if diagonal.min() <= NEGLIGIBLE * torch.finfo(op.dtype).eps * max(diagonal.max(), 1e-300):
        exact = float(np.trace(h))  # the sketch spans the whole range of A
        rounding = NEGLIGIBLE * torch.finfo(op.dtype).eps * float(np.abs(h).sum())
        return Estimate(exact, exact - rounding, exact + rounding, products=2 * count)
    s = np.linalg.inv(r).T
    s /= np.linalg.norm(s, axis=0)
    squared_lengths = row_dots(tests, tests, over=over).cpu().numpy()
    samples = np.empty(count)
    for i in range(count):
        x = w[:, i] - s[:, i] * (s[:, i] @ w[:, i])
        captured = np.trace(h) - s[:, i] @ h @ s[:, i]
        remainder = w[:, i] @ r[:, i] - 2 * (t[:, i] @ x) + x @ h @ x
        samples[i] = captured + (n - count + 1) * remainder / (squared_lengths[i] - x @ x)
    naive = student_interval(samples)
    half = XTRACE_INFLATION * naive.half_width
    return Estimate(naive.value, naive.value - half, naive.value + half, products=2 * count)


def _test_vectors(op: LinearOperator, indices: range, seed: int) -> torch.Tensor:
    """Gaussian vectors of these indices, one a row."""
    return torch.stack([gaussian(op, seed=seed, index=index, stream="sketch") for index in indices])
