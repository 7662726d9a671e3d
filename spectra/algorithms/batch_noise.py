"""How much of an interval comes from the probes, and how much from the batches that happened to be measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spectra.algorithms.slq import slq
from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE, RESOLVED_HALF_WIDTH, Estimate
from spectra.estimates.quantities import NEAR_ZERO, summarize
from spectra.operators.base import LinearOperator
from spectra.operators.derived import MeanOperator
from spectra.operators.hessian.objective import as_batches, rows_between, rows_in

NOT_NEGATIVE = ("rms", "frobenius")


@dataclass(frozen=True)
class NoiseSplit:
    """A quantity of the loss over some batches, as an estimate of that over all the data they were drawn from.

    estimate: on these batches, with what probes and a finite recurrence leave open; probe_half_width: of its interval.
    batch_half_width: t_{g-1} times the jackknife's standard error over g groups of batches. bias: by how much fewer
    batches make the quantity too large, to first order in 1 / batches. total: the estimate with both widths added in
    quadrature, and room for the bias on its side.
    """

    estimate: Estimate
    probe_half_width: float
    batch_half_width: float
    bias: float
    total: Estimate

    def to_dict(self) -> dict[str, float]:
        """What a record keeps beside the estimate: both half-widths, the bias, and the ends of the total interval."""
        parts = {"probes": self.probe_half_width, "batches": self.batch_half_width, "bias": self.bias}
        return {**parts, "low": self.total.low, "high": self.total.high}

    def __str__(self) -> str:
        return f"{self.total}: probes +-{self.probe_half_width:.2g}, batches +-{self.batch_half_width:.2g}"


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
    """Split the interval of each quantity of a spectrum into probe noise and batch noise.

        build = lambda batches: spectra.HessianOperator(model, batches)
        print(spectra.batch_noise(build, batches)["trace"])

    The batches are cut into `groups` that follow each other; each quantity is measured on all of them, and with each
    group left out, always with the same probes, so that few are enough: see `jackknife`. A group weighs the tokens it
    counts in the loss, or its rows where `build` returns an operator without an objective. Where there are fewer
    batches than groups, batches are cut by rows. Rows that were drawn together (windows of one document) belong into
    one group, else the batch noise comes out too small.

    build: a list of batches -> the operator of their mean loss. probes, steps, seed, deflate: see `spectra.slq`.
    near_zero_tol: |lambda| that counts as near zero. full: the estimates on all batches, where they are known.
    Costs groups + 1 spectra, those with a group left out on fewer batches. What probes see differently in different
    groups counts as batch noise too: with few probes on groups that have little in common, the total is on the safe
    side.
    Raises InputError for less than two groups, for fewer rows than groups, for a group that counts no token, and for a
    loss that adds up over batches instead of averaging.
    """
    parts = _grouped(as_batches(batches), groups)

    def measure(operator: LinearOperator) -> dict[str, Estimate]:
        try:
            density = slq(operator, probes=probes, steps=steps, seed=seed, deflate=deflate)
        finally:
            close = getattr(operator, "close", None)
            if close is not None:
                close()
        return summarize(density, near_zero_tol)

    whole = build(list(itertools.chain(*parts)))
    weights = _checked(_weights(whole, parts), groups)
    full = measure(whole) if full is None else full
    left_out = [measure(build(list(itertools.chain(*parts[:j], *parts[j + 1 :])))) for j in range(groups)]
    return jackknife(full, left_out, weights)


def jackknife(
    full: Mapping[str, Estimate], left_out: Sequence[Mapping[str, Estimate]], weights: Sequence[float] | np.ndarray
) -> dict[str, NoiseSplit]:
    """The delete-a-group jackknife with groups of unequal weight, for each quantity of `full`.

    With g groups of weights m_j, n = sum m_j, h_j = n / m_j, theta from all and theta_j without group j: the
    pseudo-values are p_j = h_j theta - (h_j - 1) theta_j, the corrected estimate is
    theta_J = g theta - sum_j (1 - m_j / n) theta_j, the bias theta - theta_J, and the variance
    (1 / g) sum_j (p_j - theta_J)^2 / (h_j - 1) (Busing, Meijer and van der Leeden, Statistics and Computing 9, 1999).
    For a weighted mean the p_j are the groups' means, and the bias is zero.

    full: the estimates on all the data. left_out: (g,) those without each group, from the same probes. weights: (g,).
    Raises InputError for fewer than two groups, and for weights that do not fit.
    """
    weights = _checked(weights, len(left_out))
    return {
        name: _split(name, estimate, np.array([float(each[name]) for each in left_out]), weights)
        for name, estimate in full.items()
    }


def _checked(weights: Sequence[float] | np.ndarray, groups: int) -> np.ndarray:
    weights = np.asarray(weights, dtype=float)
    if groups < 2 or weights.shape != (groups,):
        raise InputError(
            f"two groups or more with a weight each are expected, got {groups} groups and weights of shape "
            f"{weights.shape}: split the batches into more groups"
        )
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"every group must count some tokens, got weights {weights.tolist()}: use fewer groups")
    return weights


def _split(name: str, estimate: Estimate, without: np.ndarray, weights: np.ndarray) -> NoiseSplit:
    from scipy.special import stdtrit

    groups, shares = len(weights), weights / weights.sum()
    corrected = groups * estimate.value - float((1 - shares) @ without)
    pseudo = (estimate.value - (1 - shares) * without) / shares
    variance = float(np.mean((pseudo - corrected) ** 2 * shares / (1 - shares)))
    half = float(stdtrit(groups - 1, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    bias = estimate.value - corrected
    low = estimate.value - math.hypot(estimate.value - estimate.low, half) - max(bias, 0.0)
    high = estimate.value + math.hypot(estimate.high - estimate.value, half) + max(-bias, 0.0)
    share = name.endswith("_share")
    if share or name in NOT_NEGATIVE:
        low = max(low, 0.0)
    total = replace(estimate, low=low, high=min(high, 1.0) if share else high)
    if share and total.resolved and total.half_width > RESOLVED_HALF_WIDTH:
        total = replace(total, resolved=False, reason=f"the batches leave +-{half:.2f} open: measure more of them")
    return NoiseSplit(estimate, estimate.half_width, half, bias, total)


def _grouped(batches: list[Any], groups: int) -> list[list[Any]]:
    """Groups of batches that follow each other; of parts of batches, as even as rows allow, where there are few."""
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


def _weights(operator: LinearOperator, parts: list[list[Any]]) -> list[float]:
    """What each group weighs in the operator's loss."""
    member = operator.operators[0] if isinstance(operator, MeanOperator) else operator
    objective = getattr(member, "objective", None)
    if objective is None:
        return [float(sum(map(rows_in, part))) for part in parts]
    if getattr(objective.loss, "reduction", None) == "sum":
        raise InputError("a loss that is a mean over the data is expected, got reduction='sum': pass reduction='mean'")
    return [float(sum(objective.count(objective.complete(batch, 0)) for batch in part)) for part in parts]
