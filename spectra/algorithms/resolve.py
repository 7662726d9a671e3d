"""Measure a share of the eigenvalues to a wanted accuracy with as few products as possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy
import torch

from spectra.algorithms.block_size import max_vectors_in_memory
from spectra.algorithms.lanczos import LanczosRecurrence
from spectra.algorithms.origin import unverified
from spectra.algorithms.probe_space import DEFLATION_TOLERANCE, ProbeSpace
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.slq import slq
from spectra.algorithms.topk import Eigenpairs
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.backend.random_vectors import gaussian
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile, unresolved
from spectra.operators.base import LinearOperator

SHARES = ("negative", "near_zero", "between")
FEWEST_PRODUCTS = 20  # of a budget
SEARCH_PART = 0.12  # of the budget, spent on the search for outliers to deflate
SEARCH_STEPS = (20, 160)  # fewest and most Lanczos steps of that search
SEARCH_BASIS_BYTES = 1 << 30  # of its basis on a CPU: reorthogonalizing against more costs more than deflation saves
FIRST_STEPS = 50  # Lanczos steps before the interval is first looked at
FIRST_PART = 1 / 8  # of the budget, also spent before that: an interval can be narrow early while its middle is far off


@dataclass(frozen=True)
class _Target:
    """Which share to read from a density, and the half-width to reach."""

    read: Callable[[SpectralDensity], Estimate]
    half_width: float


@in_float32
def resolve(
    op: LinearOperator,
    *,
    share: str = "negative",
    tol: float | None = None,
    between: tuple[float, float] | None = None,
    half_width: float = RESOLVED_HALF_WIDTH,
    budget: int = 1500,
    seed: int = 0,
    progress: Callback | None = None,
) -> Estimate:
    """A share of the eigenvalues to a wanted half-width, for a limited number of products.

    1. A short Lanczos run finds the outliers, which are deflated; each would cost the following recurrences many steps.
    2. As many probe vectors as the sampling variance asks for advance together, without a stored basis, until the
       interval is narrow enough or the budget is spent.

    A matrix with n <= budget is formed and diagonalized instead, and its share is exact.

    Args:
        op: A, a symmetric operator (n, n).
        share: "negative" (lambda < 0), "near_zero" (|lambda| < tol) or "between" (low < lambda < high).
        tol: The bound of "near_zero", in the units of the eigenvalues.
        between: (low, high), the bounds of "between".
        half_width: The half-width of the 95 % interval to reach, between 0 and 0.5.
        budget: The largest number of products, at least 20.
        seed: Seed of the random vectors.
        progress: Called as progress(products done, products in total). The total is the budget until less turns out to
            be enough.

    Returns:
        The `Estimate`, with the products spent. `resolved` says whether the half-width was reached, and `reason` why
        not.

    Raises:
        InputError: If the share is unknown or lacks its bounds, or a number is out of range.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import numpy as np, spectra
        >>> op = spectra.DiagonalOperator(np.linspace(-1, 3, 5000))
        >>> share = spectra.resolve(op, half_width=0.02, budget=1000)
        >>> print(f"{share.value:.2f}", share.resolved)
        0.25 True
    """
    target = _Target(_share_reader(share, tol, between), half_width)
    if not 0 < half_width < 0.5:
        raise InputError(f"the half-width must lie between 0 and 0.5, got {half_width}")
    if budget < FEWEST_PRODUCTS:
        raise InputError(f"a budget of at least {FEWEST_PRODUCTS} products is expected, got {budget}")
    before, count = op.products, Progress(progress, min(budget, op.shape[0]))
    estimate = _measure(op, target, budget, seed, count)
    count.finish()
    estimate = _compare_with_target(estimate, target, op.products - before, budget)
    return unresolved(estimate, unverified(op))


def _measure(op: LinearOperator, target: _Target, budget: int, seed: int, progress: Progress) -> Estimate:
    """The share as the density gives it, exact where the budget allows that."""
    n, before = op.shape[0], op.products
    if n <= budget:
        return target.read(slq(op, probes=1, steps=n, seed=seed, progress=lambda done, _: progress.reach(done)))
    wanted = _search_products(op, budget)
    pairs = find_outliers(op, products=wanted, seed=seed, on_step=partial(progress.add, 1))
    spent = op.products - before
    first_look = int(FIRST_PART * budget) - spent
    return _advance_until(
        target, op, pairs, max_products=budget - spent, first_look=first_look, seed=seed, progress=progress
    )


def find_outliers(
    op: LinearOperator, *, products: int, seed: int = 0, on_step: Callable[[], None] | None = None
) -> Eigenpairs | None:
    """The eigenpairs that converge in one Lanczos run with full reorthogonalization.

    Eigenvalues far from all others converge first, and those are the ones that deflation gains most from. A pair counts
    as converged when ||A x - lambda x|| <= 1e-3 |lambda|.

    Args:
        op: A, a symmetric operator (n, n).
        products: Lanczos steps, each of which costs one product and stores one basis vector.
        seed: Seed of the start vector.
        on_step: Called after each step.

    Returns:
        The converged pairs, or None if there are none.
    """
    if products < 2:
        return None
    start = gaussian(op, seed=seed, index=0, stream="outliers")
    recurrence = LanczosRecurrence(op, start, basis_size=products)
    recurrence.advance(products, on_step=on_step)
    found = recurrence.tridiagonals()[0]
    assert found.basis is not None
    values, coefficients = scipy.linalg.eigh_tridiagonal(found.alphas, found.betas[:-1])
    residuals = found.betas[-1] * np.abs(coefficients[-1])
    converged = np.flatnonzero(residuals <= DEFLATION_TOLERANCE * np.abs(values))
    if not len(converged) or recurrence.broken_down:
        return None
    rotation = torch.as_tensor(coefficients[:, converged].T, dtype=op.dtype, device=op.device)
    vectors = (rotation @ found.basis).T
    met = np.ones(len(converged), dtype=bool)
    return Eigenpairs(values[converged], vectors, residuals[converged], met, found.steps)


def _search_products(op: LinearOperator, budget: int) -> int:
    """How many products to spend on the search for outliers; 0 where not even the shortest search fits in memory."""
    fewest, most = SEARCH_STEPS
    wanted = int(np.clip(SEARCH_PART * budget, fewest, most))
    if op.device.type == "cpu":
        wanted = min(wanted, max(SEARCH_BASIS_BYTES // op.vector_bytes, fewest))
    room = max_vectors_in_memory(op)
    return min(wanted, room) if room >= fewest else 0


def _advance_until(
    target: _Target,
    op: LinearOperator,
    pairs: Eigenpairs | None,
    *,
    max_products: int,
    first_look: int,
    seed: int,
    progress: Progress,
) -> Estimate:
    """Advance probe vectors until the share is as narrow as the target, or `max_products` are spent.

    The interval is looked at after `first_look` products at least, and then each time that the number of Lanczos steps
    has grown by half.
    """
    space = ProbeSpace(op, pairs, seed=seed)
    probes = _probes_needed(space.dimension, target.half_width)
    probes = max(min(probes, max_products // FIRST_STEPS), 1)
    recurrence = space.recurrence(range(probes), 0)
    if recurrence is None:
        return target.read(space.density([], probes=1, steps=1))
    steps, max_steps = 0, max(max_products // probes - 1, 1)
    first_steps = max(FIRST_STEPS, math.ceil(first_look / probes))
    while True:
        next_steps = min(max(first_steps, steps + steps // 2), max_steps)
        recurrence.advance(next_steps - steps, on_step=partial(progress.add, probes))
        steps = next_steps
        results = recurrence.tridiagonals()
        density = space.density(results, probes=probes, steps=max(result.steps for result in results))
        estimate = target.read(density)
        if estimate.half_width <= target.half_width or steps >= max_steps or recurrence.broken_down:
            return estimate


def _probes_needed(dimension: int, half_width: float) -> int:
    """How many probe vectors bring the sampling error below a third of the half-width, at a share of one half."""
    per_probe = normal_quantile() * math.sqrt(0.5 / (max(dimension, 1) + 2))
    return max(math.ceil((3 * per_probe / half_width) ** 2), 1)


def _share_reader(
    share: str, tol: float | None, between: tuple[float, float] | None
) -> Callable[[SpectralDensity], Estimate]:
    """The function that reads the wanted share from a density."""
    if share not in SHARES:
        raise InputError(f"share must be one of {', '.join(SHARES)}, got {share!r}")
    if share == "negative":
        return lambda density: density.negative_share()
    if share == "near_zero":
        if tol is None:
            raise InputError("share='near_zero' needs tol=..., the |lambda| below which an eigenvalue counts")
        return lambda density: density.near_zero_share(tol)
    if between is None:
        raise InputError("share='between' needs between=(low, high)")
    low, high = between
    return lambda density: density.share_between(low, high)


def _compare_with_target(estimate: Estimate, target: _Target, products: int, budget: int) -> Estimate:
    """The estimate with the products spent, marked as resolved if its half-width meets the target."""
    if estimate.half_width <= target.half_width:
        return replace(estimate, resolved=True, reason="", products=products)
    reason = f"the budget of {budget} products is spent at a half-width of {estimate.half_width:.3f}"
    if estimate.reason:
        reason += f": {estimate.reason}"
    return replace(estimate, resolved=False, reason=reason, products=products)
