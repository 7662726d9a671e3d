"""Hessian-vector products by differences of the gradient, with their measured error.

H v is the limit of D_h v = (g(theta + h v) - g(theta - h v)) / 2h for a unit vector v. A large h has a truncation error
of order h^2, a small one a rounding error of order 1 / h. Both are measured here. The difference between D_h v and
D_(h / r) v holds nearly all of the truncation error of the first and the rounding error of the second, r times larger
than that of the first. The stated error is the sum of two of them, from the step before to the step after, where that
sum is smallest: ten times the truncation error along the vectors that were tried. They are a random vector, its first
two products, which are rich in the extreme eigenvectors, and the gradient.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from spectra.backend.errors import InputError
from spectra.backend.vectors import norm
from spectra.operators.hessian.checks import check_slope, norm_of_weights
from spectra.operators.hessian.graphs import GraphStore

RATIO = 10**0.5  # of a step to the next
STEPS = {torch.float32: 7, torch.float64: 10}  # how many are tried
LARGEST = {torch.float32: 3e-2, torch.float64: 1e-2}  # relative to the norm of the weights
LIMIT = 0.05  # relative error of products above which they are refused


@dataclass(frozen=True)
class Difference:
    """A central difference of the gradient.

    Attributes:
        step: The length h of the move of the weights.
        error: Error of a product of a unit vector, relative to the norm of the Hessian as far as it was seen.
        slope_error: Relative error of the gradient against the loss, see `DerivativeErrors`.
    """

    step: float
    error: float
    slope_error: float

    def product(self, graphs: GraphStore, vector: torch.Tensor) -> torch.Tensor:
        """H v for a vector v (n,), or this rank's part of it."""
        length = norm(vector, over=graphs.shards)
        if length == 0 or not math.isfinite(length):
            return vector * 0
        return _difference(graphs, vector / length, self.step)[0] * length


def _difference(graphs: GraphStore, unit: torch.Tensor, step: float) -> tuple[torch.Tensor, float]:
    """D_h v, and the same difference of the loss."""
    more, ahead = graphs.differentiated_at(dtype=graphs.dtype, offset=step * unit)
    less, behind = graphs.differentiated_at(dtype=graphs.dtype, offset=-step * unit)
    return ahead.sub_(behind).div_(2 * step), (more - less) / (2 * step)


def choose_difference(graphs: GraphStore, start: torch.Tensor) -> Difference:
    """The central difference with the smallest measured error.

    Args:
        graphs: The gradient.
        start: A random vector (n,), or this rank's part of it.

    Returns:
        The difference.

    Raises:
        InputError: If the steps disagree so much that no error can be stated.
    """
    over, largest = graphs.shards, LARGEST[graphs.dtype] * norm_of_weights(graphs)
    steps = [largest / RATIO**k for k in range(STEPS[graphs.dtype])]
    unit = start / norm(start, over=over)
    tried, scale, along, slope = _disagreements(graphs, unit, steps)
    for _ in range(2):
        size = norm(along, over=over)
        if not 0 < size < math.inf:
            break
        of_product, larger, along, _ = _disagreements(graphs, along / size, steps)
        tried = [max(pair) for pair in zip(tried, of_product, strict=True)]
        scale = max(scale, larger)
    # the truncation error of a step is a tenth of that of the step before, which leaves room for other directions
    errors = [a + b if math.isfinite(a + b) else math.inf for a, b in itertools.pairwise(tried)]
    best = min(range(len(errors)), key=errors.__getitem__)
    error, best = errors[best], best + 1
    step = steps[best]
    gradient = graphs.gradient()
    steepest = norm(gradient, over=over)
    if steepest > 0:
        found, seen, _, _ = _disagreements(graphs, gradient / steepest, steps[best - 1 : best + 2])
        error, scale = max(error, sum(found)), max(scale, seen)
    relative = error / scale if scale > 0 else 0.0
    if not relative <= LIMIT:
        raise InputError(
            f"differences of the gradient disagree by {relative:.0%} from one step to the next, at the best step, so "
            "that no error of the products can be stated: measure with exact products (engine='auto'), or with "
            "precision='float64'"
        )
    return Difference(step, relative, check_slope(graphs, unit, gradient, slope, graphs.dtype))


def _disagreements(
    graphs: GraphStore, unit: torch.Tensor, steps: list[float]
) -> tuple[list[float], float, torch.Tensor, float]:
    """How far the differences of successive steps are apart; norm, product and slope where they agree best."""
    over, apart = graphs.shards, []
    before, slope_before = _difference(graphs, unit, steps[0])
    best, chosen = math.inf, (0.0, before, slope_before)
    for step in steps[1:]:
        found, slope = _difference(graphs, unit, step)
        apart.append(norm(found - before, over=over))
        if apart[-1] < best:
            best, chosen = apart[-1], (norm(before, over=over), before, slope_before)
        before, slope_before = found, slope
    return apart, *chosen
