"""The uncertainty of a quantity from the probe vectors, and that from the choice of batches (batch noise)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spectra.algorithms.slq import slq
from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE, RESOLVED_HALF_WIDTH, Estimate, judged_by_size, unresolved
from spectra.estimates.quantities import NEAR_ZERO, Kind, describe, summarize
from spectra.operators.base import LinearOperator
from spectra.operators.derived import MeanOperator
from spectra.operators.hessian.batches import as_batches, rows_between, rows_in


@dataclass(frozen=True)
class NoiseSplit:
    """A quantity measured on some batches, as an estimate of its value on all the data they were drawn from.

    Attributes:
        estimate: The quantity on these batches; its interval covers the error of the probe vectors and of a
            finite number of Lanczos steps.
        probe_half_width: Half-width of that interval.
        batch_half_width: Student's quantile t_{g-1} times the jackknife's standard error over g groups of batches.
        bias: The jackknife's estimate of how much the finite number of batches raises the quantity on average.
        total: The estimate with both half-widths added in quadrature, and extended by the bias on the side where the
            true value then lies.
    """

    estimate: Estimate
    probe_half_width: float
    batch_half_width: float
    bias: float
    total: Estimate

    def to_dict(self) -> dict[str, float]:
        """Both half-widths, the bias and the ends of the total interval, as a record stores them."""
        parts = {"probes": self.probe_half_width, "batches": self.batch_half_width, "bias": self.bias}
        return {**parts, "low": self.total.low, "high": self.total.high}

    def __str__(self) -> str:
        return f"{self.total}: probe vectors +-{self.probe_half_width:.2g}, batches +-{self.batch_half_width:.2g}"


def batch_noise(
    build: Callable[[list[Any]], LinearOperator],
    batches: Any,
    *,
    groups: int = 5,
    probes: int = 4,
    steps: int = 60,
    seed: int = 0,
    deflate: int = 0,
    near_zero_tol: float = NEAR_ZERO,
    full: Mapping[str, Estimate] | None = None,
) -> dict[str, NoiseSplit]:
    """Split the uncertainty of each quantity of a spectrum into that of the probe vectors and that of the batches.

    The batches are divided into consecutive groups. Each quantity is measured on all of them and again with each group
    left out, always with the same probe vectors, and `jackknife` turns the differences into a standard error. The cost
    is groups + 1 spectra, all but one of them on fewer batches.

    The weight of a group is the number of its tokens that the loss counts, or of its rows if `build` returns an
    operator without an objective. If there are fewer batches than groups, batches are divided by rows. Rows that were
    drawn together, such as windows of one document, should be in one group: otherwise the batch noise comes out too
    small. With few probe vectors, and groups that have little in common, part of the probe vectors' error is counted as
    batch noise too; the total interval is then wider than necessary.

        build = lambda batches: spectra.HessianOperator(model, batches)
        print(spectra.batch_noise(build, batches)["trace"])

    Args:
        build: Makes the operator of the mean loss over a list of batches.
        batches: One batch or an iterable of batches.
        groups: How many groups, at least 2.
        probes: Probe vectors of each spectrum (`spectra.slq`).
        steps: Lanczos steps of each spectrum.
        seed: Seed of the probe vectors.
        deflate: Eigenvalues to deflate in each spectrum.
        near_zero_tol: |lambda| below which an eigenvalue counts as near zero, in the units of the eigenvalues.
        full: The estimates on all batches, if they are known already.

    Returns:
        A `NoiseSplit` for each quantity, under its key.

    Raises:
        InputError: If there are fewer than two groups or fewer rows than groups, if a group contributes no token to the
            loss, or if the loss is a sum over the data instead of a mean.
    """
    parts = _divide(as_batches(batches), groups)
    reasons: list[str] = []  # why an operator's numbers cannot be relied on

    def measure(operator: LinearOperator) -> dict[str, Estimate]:
        """The quantities of one operator, which is closed afterwards."""
        try:
            density = slq(operator, probes=probes, steps=steps, seed=seed, deflate=deflate)
        finally:
            close = getattr(operator, "close", None)
            if close is not None:
                close()
        reasons.append(density.origin.unverified)
        return summarize(density, near_zero_tol)

    whole = build(list(itertools.chain(*parts)))
    weights = _check_weights(_group_weights(whole, parts), groups)
    full = measure(whole) if full is None else full
    left_out = [measure(build(list(itertools.chain(*parts[:j], *parts[j + 1 :])))) for j in range(groups)]
    splits, reason = jackknife(full, left_out, weights), next(filter(None, reasons), "")
    return {name: replace(split, total=unresolved(split.total, reason)) for name, split in splits.items()}


def jackknife(
    full: Mapping[str, Estimate], left_out: Sequence[Mapping[str, Estimate]], weights: Sequence[float] | np.ndarray
) -> dict[str, NoiseSplit]:
    """The delete-a-group jackknife with groups of unequal weight, for each quantity.

    Let there be g groups of weights m_j, n = sum_j m_j and h_j = n / m_j. Let theta be the estimate from all groups and
    theta_j the one without group j. The pseudo-values are p_j = h_j theta - (h_j - 1) theta_j, the corrected estimate
    is theta_J = g theta - sum_j (1 - m_j / n) theta_j, the bias is theta - theta_J, and the variance is (1 / g) sum_j
    (p_j - theta_J)^2 / (h_j - 1) (Busing, Meijer and van der Leeden, Statistics and Computing 9, 1999). For a weighted
    mean over the groups the p_j are the groups' means, and the bias is zero.

    Args:
        full: The estimate of each quantity on all the data.
        left_out: (g,) the estimates without each group, from the same probe vectors.
        weights: (g,) the weights m_j.

    Returns:
        A `NoiseSplit` for each quantity in `full`.

    Raises:
        InputError: If there are fewer than two groups, or the weights do not fit them.
    """
    weights = _check_weights(weights, len(left_out))
    return {
        name: _split_one(name, estimate, np.array([float(each[name]) for each in left_out]), weights)
        for name, estimate in full.items()
    }


def _check_weights(weights: Sequence[float] | np.ndarray, groups: int) -> np.ndarray:
    """The weights as an array; raises InputError unless there is a positive one for each of at least two groups."""
    weights = np.asarray(weights, dtype=float)
    if groups < 2 or weights.shape != (groups,):
        raise InputError(
            f"two groups or more with a weight each are expected, got {groups} groups and weights of shape "
            f"{weights.shape}: split the batches into more groups"
        )
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"every group must count some tokens, got weights {weights.tolist()}: use fewer groups")
    return weights


def _split_one(name: str, estimate: Estimate, left_out: np.ndarray, weights: np.ndarray) -> NoiseSplit:
    """The jackknife of one quantity, from its values with each group left out (g,)."""
    from scipy.special import stdtrit

    groups, parts = len(weights), weights / weights.sum()
    corrected = groups * estimate.value - float((1 - parts) @ left_out)
    pseudo = (estimate.value - (1 - parts) * left_out) / parts
    variance = float(np.mean((pseudo - corrected) ** 2 * parts / (1 - parts)))
    half = float(stdtrit(groups - 1, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    bias = estimate.value - corrected
    low = estimate.value - math.hypot(estimate.value - estimate.low, half) - max(bias, 0.0)
    high = estimate.value + math.hypot(estimate.high - estimate.value, half) + max(-bias, 0.0)
    quantity = describe(name)
    if quantity.is_nonnegative:
        low = max(low, 0.0)
    total = replace(estimate, low=low, high=min(high, 1.0) if quantity.is_share else high)
    if quantity.is_share and total.resolved and total.half_width > RESOLVED_HALF_WIDTH:
        total = replace(
            total, resolved=False, reason=f"the choice of batches leaves +-{half:.2f}: measure more of them"
        )
    if quantity.kind in (Kind.SUM, Kind.NORM) and half > 0:
        total = judged_by_size(total)
    return NoiseSplit(estimate, estimate.half_width, half, bias, total)


def _divide(batches: list[Any], groups: int) -> list[list[Any]]:
    """Divide batches into consecutive groups; where there are too few, divide their rows as evenly as possible."""
    if groups < 2:
        raise InputError(f"groups must be at least 2, got {groups}: with one there is nothing to leave out")
    if len(batches) >= groups:
        cuts = [len(batches) * j // groups for j in range(groups + 1)]
        return [batches[start:stop] for start, stop in itertools.pairwise(cuts)]
    sizes = [rows_in(batch) for batch in batches]
    rows = sum(sizes)
    if rows < groups:
        fewer = f", or groups={rows}" if rows > 1 else ""
        raise InputError(
            f"{len(batches)} batches with {rows} rows in all make no {groups} groups: give more batches{fewer}"
        )
    cuts = [rows * j // groups for j in range(groups + 1)]
    starts = [0, *itertools.accumulate(sizes)]
    return [
        [
            rows_between(batch, max(low - start, 0), min(high - start, size), size)
            for batch, start, size in zip(batches, starts, sizes, strict=False)
            if low < start + size and high > start
        ]
        for low, high in itertools.pairwise(cuts)
    ]


def _group_weights(operator: LinearOperator, parts: list[list[Any]]) -> list[float]:
    """The weight of each group in the operator's loss: counted tokens, or rows where the operator has no objective."""
    member = operator.operators[0] if isinstance(operator, MeanOperator) else operator
    objective = getattr(member, "objective", None)
    if objective is None:
        return [float(sum(map(rows_in, part))) for part in parts]
    if getattr(objective.loss, "reduction", None) == "sum":
        raise InputError("a loss that is a mean over the data is expected, got reduction='sum': pass reduction='mean'")
    return [float(sum(objective.count(objective.complete(batch, 0)) for batch in part)) for part in parts]
