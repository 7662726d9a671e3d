"""Measure a share of the eigenvalues to a wanted accuracy with as few products as possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch

from spectra.algorithms.block_size import max_vectors_in_memory
from spectra.algorithms.congruence import Congruence
from spectra.algorithms.inertia import recurrences_after_congruence
from spectra.algorithms.lanczos import LanczosRecurrence
from spectra.algorithms.origin import unverified
from spectra.algorithms.probe_space import DEFLATION_TOLERANCE, ProbeSpace
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.share_recurrences import Part, ShareRecurrences, probes_needed
from spectra.algorithms.slq import slq
from spectra.algorithms.topk import Eigenpairs
from spectra.backend.errors import InputError, check_whole
from spectra.backend.float32 import in_float32
from spectra.backend.random_vectors import gaussian
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate, unresolved
from spectra.operators.base import LinearOperator, check_is_operator

SHARES = ("negative", "near_zero", "between")
FEWEST_PRODUCTS = 20  # smallest budget
SEARCH_PART = 0.12  # part of the budget that the search for outliers may spend
SEARCH_STEPS = (20, 160)  # fewest and most Lanczos steps of that search
SEARCH_BASIS_BYTES = 1 << 30  # largest basis of the search on a CPU: beyond it reorthogonalization costs too much
GROWTH = 0.5  # relative growth of the number of Lanczos steps from one estimate to the next
CLEARLY = 0.8  # ratio of half-widths after the same number of steps that shows which of two ways is better
PLACED = 2  # ratio of half of the eigenvalues placed that shows it too, where most are still unplaced
FEWEST_PLACED = 0.03  # half of the eigenvalues placed, with fewer of which that ratio says nothing
FAIR = 0.75  # ratio of the numbers of steps from which two ways can be compared
PROMISING = 0.2  # half-width at which one of the two methods goes on alone
FIRST_STEPS = 50  # Lanczos steps before the share is first estimated
FIRST_PART = 1 / 8  # part of the budget spent before that: an early interval may be narrow around a value that is off


@dataclass(frozen=True)
class _Target:
    """Which share to measure, as the bounds (low, high) of an interval, and the half-width to reach."""

    bounds: tuple[float, float]
    half_width: float

    def read(self, density: SpectralDensity) -> Estimate:
        """The share, from a density."""
        return density.share_between(*self.bounds)


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
    congruence: Congruence | None = None,
    progress: Callback | None = None,
) -> Estimate:
    """Estimate a share of the eigenvalues to a wanted half-width, with a limited number of products.

    If the operator knows the shapes of its parameters, as a Hessian does, the eigenvalues below each bound are counted
    after a change of variables (`spectra.algorithms.congruence`). For most models this takes far fewer products. The
    following method is used for other operators, and beside the first one where that is slow:

    1. A short Lanczos run finds the outliers, which are deflated; each would cost the following recurrences many steps.
    2. Recurrences without a stored basis are advanced until the interval is narrow enough or the budget is spent. The
       number of probe vectors follows from the sampling variance.

    A matrix with n <= budget is formed and diagonalized instead, and its share is exact.

    Args:
        op: A, a symmetric operator (n, n).
        share: "negative" (lambda < 0), "near_zero" (|lambda| < tol) or "between" (low < lambda < high).
        tol: The bound of "near_zero", in the units of the eigenvalues.
        between: (low, high), the bounds of "between".
        half_width: The half-width of the 95 % interval to reach, between 0 and 0.5.
        budget: The largest number of products, at least 20.
        seed: Seed of the random vectors.
        congruence: A change of variables found earlier (`spectra.algorithms.congruence.find_congruence`), such as at
            the last checkpoint. The search starts from it and takes fewer products. The interval is valid for any
            congruence; only its width depends on it.
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
    check_is_operator(op)
    check_whole(budget=budget, seed=seed)
    target = _Target(_bounds(share, tol, between), half_width)
    if not 0 < half_width < 0.5:
        raise InputError(f"the half-width must lie between 0 and 0.5, got {half_width}")
    if budget < FEWEST_PRODUCTS:
        raise InputError(f"a budget of at least {FEWEST_PRODUCTS} products is expected, got {budget}")
    before, count = op.products, Progress(progress, min(budget, op.shape[0]))
    estimate = _measure(op, target, budget, seed, congruence, count)
    count.finish()
    estimate = _compare_with_target(estimate, target, op.products - before, budget)
    return unresolved(estimate, unverified(op))


def _measure(
    op: LinearOperator, target: _Target, budget: int, seed: int, congruence: Congruence | None, progress: Progress
) -> Estimate:
    """The share, exact if the budget is at least n."""
    n, before = op.shape[0], op.products
    if n <= budget:
        return target.read(slq(op, probes=1, steps=n, seed=seed, progress=lambda done, _: progress.reach(done)))

    def remaining() -> int:
        return before + budget - op.products

    def on_product() -> None:
        progress.reach(op.products - before)

    def direct() -> ShareRecurrences:
        return _recurrences_of(op, target, remaining, seed=seed, on_product=on_product)

    def glance() -> ShareRecurrences:
        return _glance_at(op, target, remaining, seed=seed, on_product=on_product)

    changed = recurrences_after_congruence(
        op,
        target.bounds,
        probes=lambda dimension, counts: probes_needed(dimension, target.half_width / counts),
        seed=seed,
        start=congruence,
        remaining=remaining,
        on_product=on_product,
    )
    if changed is None:
        return direct().advance_until(target.half_width)
    return _narrower(changed, glance, direct, remaining, target.half_width)


def _narrower(
    changed: ShareRecurrences,
    glance: Callable[[], ShareRecurrences],
    direct: Callable[[], ShareRecurrences],
    remaining: Callable[[], int],
    half_width: float,
) -> Estimate:
    """The share from the recurrences after a change of variables, or from those without it if these do better.

    If the first steps after the change of variables leave the interval wide, a few steps of the operator itself tell
    whether the change of variables helps. If it does, the recurrences after it go on alone. If that is not clear, both
    advance side by side, with equally many steps, until one is promising or clearly better than the other.
    """
    promising = max(PROMISING, half_width)
    if changed.advance().half_width <= promising or remaining() < FEWEST_PRODUCTS:
        return changed.advance_until(half_width)
    if changed.estimate().half_width <= CLEARLY * glance().advance().half_width:
        return changed.advance_until(half_width)
    sides = [direct(), changed]
    while advancing := [side for side in sides if not side.finished]:
        side = min(advancing, key=lambda side: side.steps)
        if side.advance().half_width <= promising:
            return side.advance_until(half_width)
        better = _clearly_better(*sides)
        if better is not None:
            return better.advance_until(half_width)
    return min((side.estimate() for side in sides if side.steps), key=lambda estimate: estimate.half_width)


def _clearly_better(one: ShareRecurrences, other: ShareRecurrences) -> ShareRecurrences | None:
    """The one that is clearly better after equally many steps, by its half-width or by the mass that it places."""
    if min(one.steps, other.steps) < max(FIRST_STEPS, FAIR * max(one.steps, other.steps)):
        return None
    widths = [side.estimate().half_width for side in (one, other)]
    narrow, wide = sorted(widths)
    is_clear = narrow <= CLEARLY * wide or 0.5 - narrow >= max(PLACED * (0.5 - wide), FEWEST_PLACED)
    return (one, other)[widths.index(narrow)] if is_clear else None


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


def _recurrences_of(
    op: LinearOperator,
    target: _Target,
    remaining: Callable[[], int],
    *,
    seed: int,
    on_product: Callable[[], None],
) -> ShareRecurrences:
    """Recurrences of the operator itself, without the outliers that a short search finds."""
    budget = remaining()
    pairs = find_outliers(op, products=_search_products(op, budget), seed=seed, on_step=on_product)
    space, left = ProbeSpace(op, pairs, seed=seed), remaining()
    probes = probes_needed(space.dimension, target.half_width)
    probes = max(min(probes, left // FIRST_STEPS), 1)
    first_look = int(FIRST_PART * budget) - (budget - left)
    return ShareRecurrences(
        [Part(space, space.recurrence(range(probes), 0), probes, target.read)],
        lambda estimates: estimates[0],
        remaining=remaining,
        on_step=on_product,
        first_steps=max(FIRST_STEPS, math.ceil(first_look / probes)),
        growth=GROWTH,
    )


def _glance_at(
    op: LinearOperator, target: _Target, remaining: Callable[[], int], *, seed: int, on_product: Callable[[], None]
) -> ShareRecurrences:
    """A recurrence of the operator itself, of one probe vector, whose first estimate comes after few steps."""
    space = ProbeSpace(op, None, seed=seed)
    return ShareRecurrences(
        [Part(space, space.recurrence(range(1), 0), 1, target.read)],
        lambda estimates: estimates[0],
        remaining=remaining,
        on_step=on_product,
        first_steps=FIRST_STEPS,
        growth=GROWTH,
    )


def _bounds(share: str, tol: float | None, between: tuple[float, float] | None) -> tuple[float, float]:
    """The bounds (low, high) of the wanted share."""
    if share not in SHARES:
        raise InputError(f"share must be one of {', '.join(SHARES)}, got {share!r}")
    if share == "negative":
        return -math.inf, 0.0
    if share == "near_zero":
        if tol is None:
            raise InputError("share='near_zero' needs tol=..., the |lambda| below which an eigenvalue counts")
        if not tol > 0:
            raise InputError(f"the tolerance must be positive, got {tol}")
        return -tol, tol
    if between is None:
        raise InputError("share='between' needs between=(low, high)")
    low, high = between
    if not low < high:
        raise InputError(f"an interval with low < high is expected, got [{low}, {high}]")
    return low, high


def _compare_with_target(estimate: Estimate, target: _Target, products: int, budget: int) -> Estimate:
    """The estimate with the products spent, marked as resolved if its half-width meets the target."""
    if estimate.half_width <= target.half_width:
        return replace(estimate, resolved=True, reason="", products=products)
    reason = f"the budget of {budget} products is spent at a half-width of {estimate.half_width:.3f}"
    if estimate.reason:
        reason += f": {estimate.reason}"
    return replace(estimate, resolved=False, reason=reason, products=products)
