"""Counts of the eigenvalues below a threshold, each read after a change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectra.algorithms.congruence import Congruence, find_congruence
from spectra.algorithms.exact import exact_density
from spectra.algorithms.lanczos import choose_reorthogonalization
from spectra.algorithms.probe_space import ProbeSpace
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.share_recurrences import Part, ShareRecurrences, probes_needed
from spectra.backend.float32 import in_float32
from spectra.estimates.counts import CountBelow
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate
from spectra.estimates.measure import SpectralMeasure
from spectra.estimates.shares import share_inside
from spectra.operators.base import LinearOperator
from spectra.operators.derived import CongruentOperator

FEWEST_PRODUCTS = 100  # smallest budget with which a change of variables is searched for; the search takes 18 products
FIRST_STEPS = 40  # Lanczos steps before the share is first estimated
GROWTH = 0.08  # relative growth of the number of Lanczos steps from one estimate to the next
COUNT_PRODUCTS = 250  # by default for the count that goes with a density
HOPELESS = 0.35  # half-width after the first steps above which no more products are spent on that count


@dataclass(frozen=True)
class _Count:
    """A count of the eigenvalues below a bound.

    Attributes:
        bound: The bound.
        zeros_below: Whether eigenvalues of exactly zero belong to the count.
    """

    bound: float
    zeros_below: bool


def recurrences_after_congruence(
    op: LinearOperator,
    bounds: tuple[float, float],
    *,
    probes: Callable[[int, int], int],
    seed: int,
    start: Congruence | None,
    remaining: Callable[[], int],
    on_product: Callable[[], None],
) -> ShareRecurrences | None:
    """Recurrences for the share of eigenvalues inside (low, high), by one count or by the difference of two.

    P is found for the upper bound if it is finite, else for the lower one, and used for both counts. The counts use
    different probe vectors.

    Args:
        op: A, a symmetric operator (n, n).
        bounds: (low, high); one of them may be infinite.
        probes: Returns the number of probe vectors, from the number of coordinates and the number of counts.
        seed: Seed of the random vectors.
        start: A change of variables from which the search starts.
        remaining: Returns how many products may still be spent.
        on_product: Called after each product.

    Returns:
        The recurrences before their first step, or None if no change of variables helps.
    """
    low, high = bounds
    counts = [_Count(bound, zeros) for bound, zeros in ((low, low >= 0), (high, high > 0)) if math.isfinite(bound)]
    if remaining() < FEWEST_PRODUCTS or not counts:
        return None
    shift = counts[-1].bound
    found = find_congruence(op, shift=shift, start=start, seed=seed, on_product=on_product)
    if found is None:
        return None
    number = max(min(probes(_dimension(op, found), len(counts)), remaining() // (3 * FIRST_STEPS * len(counts))), 1)
    parts = []
    for index, count in enumerate(counts):
        operator = found.operator(op, count.bound)
        operator.rounding()  # measured while products are left
        steps = max(remaining() // (number * len(counts)), 1)
        indices = range(index * number, (index + 1) * number)
        whole = number * len(counts) == 1
        parts.append(_part(operator, indices, seed, steps if whole else 0, _reader(count, found.mask is not None)))
    return ShareRecurrences(
        parts,
        lambda estimates: _inside(estimates, bounds, parts),
        remaining=remaining,
        on_step=on_product,
        first_steps=FIRST_STEPS,
        growth=GROWTH,
    )


@in_float32
def count_below(
    op: LinearOperator,
    threshold: float = 0.0,
    *,
    half_width: float = RESOLVED_HALF_WIDTH,
    products: int = COUNT_PRODUCTS,
    seed: int = 0,
    start: Congruence | None = None,
    progress: Callback | None = None,
) -> tuple[CountBelow, Congruence | None] | None:
    """Count the eigenvalues below a threshold after a change of variables (`find_congruence`).

    A matrix with n <= products is formed and diagonalized instead, and the count is exact.

    The count belongs to a density by `SpectralDensity.with_count`. `resolve` gives the share alone, and falls back on
    plain Lanczos where that is better.

    Args:
        op: A, a symmetric operator (n, n) that knows the shapes of its parameters, such as a Hessian.
        threshold: t, in the units of the eigenvalues.
        half_width: The half-width of the 95 % interval at which to stop.
        products: The largest number of products, those of the search for P among them. Where the first steps leave
            most eigenvalues unplaced, the rest is saved.
        seed: Seed of the random vectors.
        start: The change of variables of an earlier checkpoint.
        progress: Called as progress(products done, products in total).

    Returns:
        The count, and the change of variables that it was made with (None where the count is exact). None where no
        change of variables was found, and where `products` is below 100.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    before, count = op.products, Progress(progress, products)

    def remaining() -> int:
        return before + products - op.products

    def on_product() -> None:
        count.reach(op.products - before)

    if products < FEWEST_PRODUCTS:
        return None
    if op.shape[0] <= products:
        exact = exact_density(op, probes=1, steps=op.shape[0], progress=count).measure
        known = replace(exact.known, values=exact.known.values - threshold)
        return CountBelow(threshold, replace(exact, known=known), 0, op.products - before), None
    found = find_congruence(op, shift=threshold, start=start, seed=seed, on_product=on_product)
    if found is None:
        return None
    operator, below = found.operator(op, threshold), _Count(threshold, threshold > 0)
    operator.rounding()
    zeros, searched = found.mask is not None, op.products - before
    number = max(min(probes_needed(_dimension(op, found), half_width), remaining() // (3 * FIRST_STEPS)), 1)
    part = _part(operator, range(number), seed, remaining() if number == 1 else 0, _reader(below, zeros))
    recurrences = ShareRecurrences(
        [part],
        lambda estimates: estimates[0],
        remaining=remaining,
        on_step=on_product,
        first_steps=FIRST_STEPS,
        growth=GROWTH,
    )
    if recurrences.advance().half_width < HOPELESS:
        recurrences.advance_until(half_width)
    count.finish()
    measure = _with_zeros_placed(part.density(), below, zeros)
    return CountBelow(threshold, measure, searched, op.products - before), found


def _dimension(op: LinearOperator, found: Congruence) -> int:
    """The number of coordinates that are not masked."""
    return op.shape[0] if found.mask is None else int(found.mask.sum())


def _part(
    operator: CongruentOperator, indices: range, seed: int, steps: int, read: Callable[[SpectralDensity], Estimate]
) -> Part:
    """Recurrences of probe vectors, with a basis of so many steps where that is small; steps = 0 keeps none."""
    space = ProbeSpace(operator, None, seed=seed)
    full = steps > 0 and choose_reorthogonalization(operator, steps, "auto") == "full"
    return Part(space, space.recurrence(indices, steps if full else 0), len(indices), read)


def _reader(count: _Count, zeros: bool) -> Callable[[SpectralDensity], Estimate]:
    """What reads the share below the bound from the density of T = P^T (A - bound I) P."""
    return lambda density: share_inside(_with_zeros_placed(density, count, zeros), -math.inf, 0.0)


def _with_zeros_placed(density: SpectralDensity, count: _Count, zeros: bool) -> SpectralMeasure:
    """The measure of T with the coordinates that A maps to zero on their side of the bound.

    They are eigenvalues 0 of T as it is masked, and -bound of A - bound I.
    """
    known = density.measure.known
    if zeros:
        side = -1.0 if count.zeros_below else 1.0
        known = replace(known, values=np.where(known.values == 0, side, known.values))
    return replace(density.measure, known=known)


def _inside(estimates: Sequence[Estimate], bounds: tuple[float, float], parts: Sequence[Part]) -> Estimate:
    """The share inside the bounds, from the shares below each finite bound.

    The standard deviation of a difference is at most the sum of the two, so the ends of the intervals subtract.
    """
    if math.isinf(bounds[0]):
        found = estimates[-1]
    elif math.isinf(bounds[1]):
        below = estimates[0]
        found = Estimate(1 - below.value, 1 - below.high, 1 - below.low)
    else:
        below, up_to = estimates
        value, low, high = up_to.value - below.value, up_to.low - below.high, up_to.high - below.low
        found = Estimate(max(value, 0.0), max(low, 0.0), min(high, 1.0))
    recurrence = parts[0].recurrence
    steps = 0 if recurrence is None else max(result.steps for result in recurrence.tridiagonals())
    reason = (
        f"{steps} steps after a change of variables leave {found.high - found.low:.2f} of the eigenvalues near the "
        "bounds unplaced: use more products; eigenvalues of zero that are no coordinates would stay unplaced"
    )
    return replace(found, resolved=not estimates or all(e.resolved for e in estimates), reason=reason)
