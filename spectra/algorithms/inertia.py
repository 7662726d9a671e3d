"""Counts of the eigenvalues below a threshold, each read after a change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from spectra.algorithms.congruence import ROUNDS, Congruence, find_congruence
from spectra.algorithms.exact import exact_density
from spectra.algorithms.lanczos import SMALL_BASIS_BYTES
from spectra.algorithms.probe_space import ProbeSpace
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.share_recurrences import Part, ShareRecurrences, probes_needed
from spectra.backend import memory
from spectra.backend.float32 import in_float32
from spectra.backend.float64 import is_fast_in_float64
from spectra.estimates.counts import CountBelow
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate
from spectra.estimates.measure import SpectralMeasure
from spectra.estimates.shares import share_inside
from spectra.operators.base import HasLoss, LinearOperator, check_is_operator
from spectra.operators.derived import CongruentOperator, StandIn

FEWEST_PRODUCTS = 100  # smallest budget with which a change of variables is searched for; the search takes 26 products
FIRST_STEPS = 40  # Lanczos steps before the share is first estimated
GROWTH = 0.08  # relative growth of the number of Lanczos steps from one estimate to the next
COUNT_PRODUCTS = 300  # by default for the count that goes with a density
BASIS_PART = {"cuda": 0.5, "cpu": 0.125}  # of the free memory, the largest basis of a count
LARGEST_ROUNDING = 1e-5  # of the change of variables, relative to its norm; above it float64 is used where it is fast
HEAVY_TAILED = 30  # kurtosis after the search above which a longer one is worth its products
LONG_BUDGET = 300  # fewest products left for a longer search
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
    changed = _search(op, shift, seed=seed, start=start, remaining=remaining, on_product=on_product)
    if changed is None:
        return None
    number = max(min(probes(changed.dimension, len(counts)), remaining() // (3 * FIRST_STEPS * len(counts))), 1)
    parts = []
    for index, count in enumerate(counts):
        operator = changed.operator(count.bound)  # its rounding is measured while products are left
        steps = remaining() if number * len(counts) == 1 else 0
        read = _reader(count, changed.congruence.mask is not None)
        parts.append(_part(operator, range(index * number, (index + 1) * number), seed, steps, read))
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
    check_is_operator(op)
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
        bits = torch.finfo(op.dtype).bits
        return CountBelow(threshold, replace(exact, known=known), 0, op.products - before, bits), None
    changed = _search(op, threshold, seed=seed, start=start, remaining=remaining, on_product=on_product)
    if changed is None:
        return None
    operator, below = changed.operator(threshold), _Count(threshold, threshold > 0)
    zeros, searched = changed.congruence.mask is not None, op.products - before
    number = max(min(probes_needed(changed.dimension, half_width), remaining() // (3 * FIRST_STEPS)), 1)
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
    bits = torch.finfo(operator.dtype).bits
    return CountBelow(threshold, measure, searched, op.products - before, bits), changed.congruence


@dataclass(frozen=True)
class _Changed:
    """A change of variables, and the operator to multiply with it.

    Attributes:
        op: A, or A in float64.
        congruence: P.
    """

    op: LinearOperator
    congruence: Congruence
    _operators: dict[float, CongruentOperator] = field(default_factory=dict, init=False, repr=False)

    @property
    def dimension(self) -> int:
        """The number of coordinates that are not masked."""
        mask = self.congruence.mask
        return self.op.shape[0] if mask is None else int(mask.sum())

    def operator(self, bound: float) -> CongruentOperator:
        """T = P^T (A - bound I) P, with its rounding error measured; each is made once."""
        if bound not in self._operators:
            self._operators[bound] = self.congruence.operator(self.op, bound)
            self._operators[bound].rounding()
        return self._operators[bound]


def _search(
    op: LinearOperator,
    bound: float,
    *,
    seed: int,
    start: Congruence | None,
    remaining: Callable[[], int],
    on_product: Callable[[], None],
) -> _Changed | None:
    """The change of variables for a count below a bound, None if there is none.

    P may enlarge the rounding error of A until it widens the interval. Then A is multiplied in float64, if the device
    is fast in it. Heavy-tailed spectra, as of pretrained language models, gain from a longer search, which only float64
    allows: the factors become ill-conditioned.
    """
    found = find_congruence(op, shift=bound, start=start, seed=seed, on_product=on_product)
    if found is None:
        return None
    changed = _Changed(op, found)
    if not is_fast_in_float64(op.device) or changed.operator(bound).rounding() <= LARGEST_ROUNDING:
        return changed
    precise = op.in_float64()
    if precise is None:
        return changed
    if isinstance(op, HasLoss):
        op.close()  # frees the memory of its graphs
    stand_in = StandIn(precise, counted_on=op)
    if found.kurtosis > HEAVY_TAILED and remaining() >= LONG_BUDGET:
        options = {"rounds": ROUNDS, "start": found, "seed": seed + 1, "on_product": on_product}
        found = find_congruence(stand_in, shift=bound, **options) or found
    return _Changed(stand_in, found)


def count_basis_size(op: LinearOperator, steps: int) -> int:
    """How many basis vectors the recurrence of a count stores: all of `steps`, or none where they cost too much.

    Fewer steps are needed with a basis.

    Args:
        op: The operator of the recurrence.
        steps: The largest number of Lanczos steps.

    Returns:
        `steps` or 0.
    """
    part = BASIS_PART.get(op.device.type, 0.0)
    return steps if steps * op.vector_bytes <= part * memory.available(op.device) else 0


def _part(
    operator: CongruentOperator, indices: range, seed: int, steps: int, read: Callable[[SpectralDensity], Estimate]
) -> Part:
    """Recurrences of probe vectors, with a basis of so many steps if it is worth it; steps = 0 keeps none."""
    space = ProbeSpace(operator, None, seed=seed)
    basis_size = count_basis_size(operator, steps) if steps else 0
    in_cache = basis_size * operator.vector_bytes <= SMALL_BASIS_BYTES
    seldom = operator.device.type == "cpu" and not in_cache  # passes over a large basis are slow there
    return Part(space, space.recurrence(indices, basis_size, seldom=seldom), len(indices), read)


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
        f"{steps} Lanczos steps after a change of variables do not say on which side {found.high - found.low:.2f} of "
        "the eigenvalues lie: use more products; eigenvalues of zero that are no coordinates would stay open"
    )
    return replace(found, resolved=not estimates or all(e.resolved for e in estimates), reason=reason)
