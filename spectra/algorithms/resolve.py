"""Spend products where they help until a share is known well enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch

from spectra.algorithms.block_size import vectors_that_fit
from spectra.algorithms.lanczos import Recurrence
from spectra.algorithms.probe_space import DEFLATION_TOLERANCE, ProbeSpace
from spectra.algorithms.slq import slq
from spectra.algorithms.topk import Eigenpairs
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.backend.vectors import gaussian
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, normal_quantile
from spectra.operators.base import LinearOperator

SHARES = ("negative", "near_zero", "between")
SEARCH_PART = 0.12  # of the budget, spent on finding outliers to deflate
SEARCH_STEPS = (20, 160)  # within these bounds
SEARCH_BASIS = 1 << 30  # bytes of basis on a CPU: going through more at every step would cost more than it saves
FIRST_STEPS = 50  # of a probe before its bracket is looked at; then half as many again each time
FIRST_PART = 1 / 8  # of the budget, spent before that too: a bracket may be narrow early and its middle still far off


@dataclass(frozen=True)
class _Plan:
    """Which share is wanted of a density, and how well."""

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
) -> Estimate:
    """A share of eigenvalues to a wanted half-width, for at most `budget` products.

    share: "negative"; "near_zero" with tol, |lambda| < tol; or "between" with between=(low, high).
    First a short recurrence with full reorthogonalisation finds the outliers, which are deflated: each would otherwise
    cost the long recurrences many steps. Then as many probes as the known sampling variance asks for advance
    together, without storing a basis, until the interval is narrow enough or the budget is gone. An operator whose
    dimension fits in the budget is formed and its share is exact.
    Returns the Estimate with `products` spent; `resolved` tells whether its half-width reached the one asked for, and
    `reason` what was missing. Raises InputError for an unknown share or a budget below 20 products.
    """
    plan = _Plan(_reader(share, tol, between), half_width)
    if not 0 < half_width < 0.5:
        raise InputError(f"the half-width must lie between 0 and 0.5, got {half_width}")
    if budget < 20:
        raise InputError(f"a budget of at least 20 products is expected, got {budget}")
    n, before = op.shape[0], op.products
    if n <= budget:
        density = slq(op, probes=1, steps=n, seed=seed)
        return _judged(plan.read(density), plan, op.products - before, budget)
    pairs = find_outliers(op, products=_search_products(op, budget), seed=seed)
    spent = op.products - before
    estimate = _advance(op, pairs, plan, budget=budget - spent, least=int(FIRST_PART * budget) - spent, seed=seed)
    return _judged(estimate, plan, op.products - before, budget)


def find_outliers(op: LinearOperator, *, products: int, seed: int = 0) -> Eigenpairs | None:
    """The eigenpairs that have converged after one Lanczos run of `products` steps with full reorthogonalisation.

    What converges first is what stands far from the bulk, which is what deflation gains from; a pair counts when
    ||A x - lambda x|| <= 1e-3 |lambda|. None where there is none.
    """
    if products < 2:
        return None
    recurrence = Recurrence(op, gaussian(op, seed=seed, index=0, stream="outliers"), keep_basis=products)
    recurrence.advance(products)
    found = recurrence.tridiagonals()[0]
    assert found.basis is not None
    values, small = scipy.linalg.eigh_tridiagonal(found.alphas, found.betas[:-1])
    residuals = found.betas[-1] * np.abs(small[-1])
    good = np.flatnonzero(residuals <= DEFLATION_TOLERANCE * np.abs(values))
    if not len(good) or recurrence.broken:
        return None
    rotation = torch.as_tensor(small[:, good].T, dtype=op.dtype, device=op.device)
    vectors = (rotation @ found.basis).T
    return Eigenpairs(values[good], vectors, residuals[good], np.ones(len(good), dtype=bool), found.steps)


def _search_products(op: LinearOperator, budget: int) -> int:
    """How long a recurrence to search for outliers with: a part of the budget, a basis that fits in memory, and that
    can be gone through quickly. 0 where even a short one does not fit."""
    low, high = SEARCH_STEPS
    wanted = int(np.clip(SEARCH_PART * budget, low, high))
    if op.device.type == "cpu":
        wanted = min(wanted, max(SEARCH_BASIS // op.vector_bytes, low))
    fit = vectors_that_fit(op)
    return min(wanted, fit) if fit >= low else 0


def _advance(
    op: LinearOperator, pairs: Eigenpairs | None, plan: _Plan, *, budget: int, least: int, seed: int
) -> Estimate:
    """Advance the probes in rounds, each half as long again, and look at the interval after each, for the first time
    after `least` products."""
    space = ProbeSpace(op, pairs, seed=seed)
    probes = _probes_needed(space.dimension, plan.half_width)
    probes = max(min(probes, budget // FIRST_STEPS), 1)
    recurrence = space.recurrence(range(probes), 0)
    if recurrence is None:
        return plan.read(space.density([], probes=1, steps=1))
    steps, longest = 0, max(budget // probes - 1, 1)
    first = max(FIRST_STEPS, math.ceil(least / probes))
    while True:
        target = min(max(first, steps + steps // 2), longest)
        recurrence.advance(target - steps)
        steps = target
        results = recurrence.tridiagonals()
        density = space.density(results, probes=probes, steps=max(r.steps for r in results))
        estimate = plan.read(density)
        if estimate.half_width <= plan.half_width or steps >= longest or recurrence.broken:
            return estimate


def _probes_needed(dimension: int, half_width: float) -> int:
    """Probes whose sampling error takes up at most a third of the half-width, at the least favourable share."""
    per_probe = normal_quantile() * math.sqrt(0.5 / (max(dimension, 1) + 2))
    return max(math.ceil((3 * per_probe / half_width) ** 2), 1)


def _reader(
    share: str, tol: float | None, between: tuple[float, float] | None
) -> Callable[[SpectralDensity], Estimate]:
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


def _judged(estimate: Estimate, plan: _Plan, products: int, budget: int) -> Estimate:
    """The estimate against the half-width asked for, with what it cost."""
    if estimate.half_width <= plan.half_width:
        return replace(estimate, resolved=True, reason="", products=products)
    reason = f"the budget of {budget} products is spent at a half-width of {estimate.half_width:.3f}"
    if estimate.reason:
        reason += f": {estimate.reason}"
    return replace(estimate, resolved=False, reason=reason, products=products)
