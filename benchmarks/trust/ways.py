"""The ways to measure that are compared: ours with intervals, counts of quadrature nodes, and other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import peers
import torch
from cases import NEAR_ZERO, truths

import spectra
from spectra.estimates.quantities import summarize

WAYS = ("slq", "resolve", "rotated", "trace", "counts", "peers")
RESOLVE = "resolve"
ROTATED = ", rotated"
SAME, RECIPE = "same products", "paper's recipe"  # Hessian-vector products
BUDGET = 1500
PROBES = 10  # probe vectors of the counts that spend as many products as `resolve` did
PAPER = {"probes": 20, "steps": 60}  # the WinQ paper: no reorthogonalisation, counted on the nodes

Row = dict[str, Any]


class RotatedOperator(spectra.DiagonalOperator):
    """H diag(values) H with the reflection H = I - 2 u u', u random.

    It has the same eigenvalues, up to rounding error, but its zeros do not lie along coordinates.
    """

    def __init__(self, values: np.ndarray, *, seed: int):
        super().__init__(values)
        direction = torch.randn(self.shape[0], generator=torch.Generator().manual_seed(seed), dtype=self.dtype)
        self.direction = direction / torch.linalg.vector_norm(direction)

    def reflect(self, vectors: torch.Tensor) -> torch.Tensor:
        """H applied to a vector (n,), or to each row of (k, n)."""
        return vectors - 2 * (vectors @ self.direction)[..., None] * self.direction

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.reflect(self.values * self.reflect(vector))

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._matvec(vectors)


def measure(values: np.ndarray, seed: int, ways: frozenset[str]) -> list[Row]:
    """A row for each way and quantity: the truth, the value and, where the way has one, its interval."""
    truth = truths(values)
    rows = [
        {"way": way, "quantity": quantity, "truth": truth[quantity], **estimate.to_dict()}
        for way, found in estimates(values, seed, ways).items()
        for quantity, estimate in found.items()
    ]
    spent = [row["products"] for row in rows if row["way"] == RESOLVE and row["quantity"] == "negative_share"]
    for way, (value, products) in counts(values, seed, ways, products=spent[0] if spent else BUDGET).items():
        quantity = {"quantity": "negative_share", "truth": truth["negative_share"]}
        rows.append({"way": way, **quantity, "value": value, "products": products})
    return rows


def estimates(values: np.ndarray, seed: int, ways: frozenset[str]) -> dict[str, dict[str, spectra.Estimate]]:
    """Estimates by way of measuring: `slq` with and without deflation, `resolve`, and the three methods of `trace`.

    If some eigenvalues are zero, also `slq` and `resolve` on a reflected operator.
    """
    found: dict[str, dict[str, spectra.Estimate]] = {}
    if "slq" in ways:
        found["slq 10 x 100"] = of_density(spectra.DiagonalOperator(values), seed)
        deflated: dict[str, Any] = {"probes": 4, "steps": 100, "deflate": 20}
        found["slq 4 x 100, 20 deflated"] = of_density(spectra.DiagonalOperator(values), seed, **deflated)
    if "resolve" in ways:
        found[RESOLVE] = of_resolve(spectra.DiagonalOperator(values), seed)
    if "rotated" in ways and not values.all():
        found["slq 10 x 100" + ROTATED] = of_density(RotatedOperator(values, seed=seed), seed)
        found[RESOLVE + ROTATED] = of_resolve(RotatedOperator(values, seed=seed), seed)
    if "trace" in ways:
        for method in ("hutchinson", "hutch++", "xtrace"):
            op = spectra.DiagonalOperator(values)
            estimate = spectra.trace(op, method=method, probes=60, seed=seed)
            found[f"{method} 60"] = {"trace": with_products(estimate, op.products)}
    return found


def of_density(op: spectra.LinearOperator, seed: int, **options: Any) -> dict[str, spectra.Estimate]:
    density = spectra.slq(op, seed=seed, **options)
    summary = summarize(density, NEAR_ZERO)
    return {name: with_products(estimate, op.products) for name, estimate in summary.items()}


def of_resolve(op: spectra.LinearOperator, seed: int) -> dict[str, spectra.Estimate]:
    return {
        "negative_share": spectra.resolve(op, budget=BUDGET, seed=seed),
        "near_zero_share": spectra.resolve(op, share="near_zero", tol=NEAR_ZERO, budget=BUDGET, seed=seed),
    }


def counts(values: np.ndarray, seed: int, ways: frozenset[str], *, products: int) -> dict[str, tuple[float, int]]:
    """Negative shares without an interval, and their products, by way of measuring.

    Each with the given number of products, and with the recipe of the WinQ paper.
    """
    same = {"probes": PROBES, "steps": max(products // PROBES, 2)}
    found: dict[str, float] = {}
    if "counts" in ways:
        found[f"hard count, {SAME}"] = hard_count(values, **same, seed=seed)
        found[f"hard count, {RECIPE}"] = hard_count(values.astype(np.float32), **PAPER, seed=seed)
    if "peers" in ways:
        for name, (package, share) in peers.PEERS.items():
            if not peers.missing(package):
                found[f"{name}, {SAME}"] = share(values, **same, seed=seed)
                found[f"{name}, {RECIPE}"] = share(values, **PAPER, seed=seed)
    spent = {SAME: same["probes"] * same["steps"], RECIPE: PAPER["probes"] * PAPER["steps"]}
    return {way: (value, spent[way.rpartition(", ")[2]]) for way, value in found.items()}


def hard_count(values: np.ndarray, *, probes: int, steps: int, seed: int) -> float:
    """The weights of the nodes below zero, from a recurrence without reorthogonalisation in the values' precision."""
    op = spectra.DiagonalOperator(values)
    density = spectra.slq(op, probes=probes, steps=steps, seed=seed, reorthogonalize="none")
    return float(np.where(density.nodes < 0, density.weights, 0).sum(axis=1).mean())


def with_products(estimate: spectra.Estimate, products: int) -> spectra.Estimate:
    return spectra.Estimate(
        estimate.value, estimate.low, estimate.high, estimate.resolved, estimate.reason, products=products
    )
