"""Shares of eigenvalues from counts below a threshold, by Sylvester's law of inertia after a change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectra.algorithms.congruence import Congruence, find_congruence
from spectra.algorithms.lanczos import choose_reorthogonalization
from spectra.algorithms.probe_space import ProbeSpace
from spectra.algorithms.share_recurrences import Part, ShareRecurrences
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.operators.base import LinearOperator

FEWEST_PRODUCTS = 100  # smallest budget with which a change of variables is searched for; the search takes 18 products
FIRST_STEPS = 40  # Lanczos steps before the share is first estimated
GROWTH = 0.15  # relative growth of the number of Lanczos steps from one estimate to the next


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
    dimension = op.shape[0] if found.mask is None else int(found.mask.sum())
    number = max(min(probes(dimension, len(counts)), remaining() // (3 * FIRST_STEPS * len(counts))), 1)
    parts = []
    for index, count in enumerate(counts):
        operator = found.operator(op, count.bound)
        operator.rounding()  # measured while products are left
        space = ProbeSpace(operator, None, seed=seed)
        steps = max(remaining() // (number * len(counts)), 1)
        whole = number * len(counts) == 1 and choose_reorthogonalization(op, steps, "auto") == "full"
        recurrence = space.recurrence(range(index * number, (index + 1) * number), steps if whole else 0)
        parts.append(Part(space, recurrence, number, _reader(count, found.mask is not None)))
    return ShareRecurrences(
        parts,
        lambda estimates: _inside(estimates, bounds, parts),
        remaining=remaining,
        on_step=on_product,
        first_steps=FIRST_STEPS,
        growth=GROWTH,
    )


def _reader(count: _Count, zeros: bool) -> Callable[[SpectralDensity], Estimate]:
    """A function that reads the share below the bound from the density of T = P^T (A - bound I) P.

    Coordinates that A maps to zero are masked in T, where they have the eigenvalue 0. In A - bound I they have the
    eigenvalue -bound.
    """

    def read(density: SpectralDensity) -> Estimate:
        if zeros:
            sides = np.where(density.atoms == 0, -1.0 if count.zeros_below else 1.0, density.atoms)
            density = SpectralDensity(
                density.dimension,
                density.alphas,
                density.betas,
                density.lengths,
                sides,
                density.counts,
                density.atom_residuals,
                rounding_error=density.rounding_error,
                exact=density.exact,
            )
        return density.negative_share()

    return read


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
