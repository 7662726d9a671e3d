"""Shares of eigenvalues with intervals: what a quadrature rule can and cannot say about a count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from spectra.estimates import Estimate, student_interval
from spectra.quadrature import christoffel, gauss_rule

RESOLVED_HALF_WIDTH = 0.05


@dataclass(frozen=True)
class Probe:
    """One probe's Gauss rule and the Jacobi matrix it came from; all (m,)."""

    nodes: np.ndarray
    weights: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray

    def halved(self) -> Probe:
        """The same probe after half as many steps, which the leading block of T holds at no cost."""
        half = max(len(self.nodes) // 2, 1)
        rule = gauss_rule(self.alphas[:half], self.betas[:half])
        return Probe(rule.nodes, rule.weights, self.alphas[:half], self.betas[:half])


def share_below(probe: Probe, points: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """The probe's cumulative weight at each point, half of a node's weight counting at the node.

    Between nodes the curve is interpolated monotonically (PCHIP): the true one passes between the weight strictly
    left of a node and the weight up to and including it (Chebyshev, Markov, Stieltjes), so half of each node's weight
    is the natural middle. exact: the nodes are the eigenvalues, and the curve is a step function.
    """
    nodes, weights = _merged(probe)
    total = np.cumsum(weights)
    if exact:
        return np.concatenate([[0.0], total])[np.searchsorted(nodes, points, side="left")]
    middle = total - weights / 2
    if len(nodes) == 1:
        return np.where(points < nodes[0], 0.0, np.where(points > nodes[0], 1.0, 0.5))
    curve = PchipInterpolator(nodes, middle, extrapolate=False)(points)
    curve = np.where(points < nodes[0], 0.0, np.where(points > nodes[-1], 1.0, curve))
    return np.clip(curve, 0.0, 1.0)


def share_inside(probes: list[Probe], low: float, high: float, *, exact: bool = False) -> Estimate:
    """The share of eigenvalues with low < lambda < high, from several probes.

    The interval holds three things: the spread over probes (Student), the change between half of the steps and all of
    them (the bias of a finite recurrence), and half of the mass that may sit exactly at a finite bound (an atom, which
    the Christoffel function bounds from above). Resolved where its half-width is at most .05.
    """
    if exact:
        probe = probes[0]
        inside = (probe.nodes > low) & (probe.nodes < high)
        value = float(probe.weights[inside].sum())
        return Estimate(value, value, value)
    bounds = [b for b in (low, high) if math.isfinite(b)]
    samples = np.array([_inside(p, low, high) for p in probes])
    halves = [p.halved() for p in probes]
    drift = abs(samples.mean() - np.mean([_inside(p, low, high) for p in halves]))
    atoms = sum(_possible_atom(probes, halves, bound) for bound in bounds)
    spread = student_interval(samples)
    value = float(samples.mean())
    half = spread.half_width + drift + atoms / 2
    if not math.isfinite(half):
        return Estimate(value, 0.0, 1.0, False, spread.reason)
    resolved = half <= RESOLVED_HALF_WIDTH
    reason = "" if resolved else _why(spread.half_width, drift, atoms / 2, len(probes), len(probes[0].nodes))
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), resolved, reason)


def _inside(probe: Probe, low: float, high: float) -> float:
    below_low, below_high = share_below(probe, np.array([low, high]))
    return float(below_high - below_low)


def _possible_atom(probes: list[Probe], halves: list[Probe], point: float) -> float:
    """How much mass may sit exactly at the point. The Christoffel function falls like 1/m where the measure is smooth
    and stays where there is an atom, so extrapolating from m/2 and m to infinity leaves the atom."""
    whole = float(np.mean([christoffel(p.alphas, p.betas, point) for p in probes]))
    half = float(np.mean([christoffel(p.alphas, p.betas, point) for p in halves]))
    return max(2 * whole - half, 0.0)


def _why(spread: float, drift: float, atom: float, probes: int, steps: int) -> str:
    causes = {
        f"the {probes} probes disagree by +-{spread:.2f}: use more probes": spread,
        f"the share still moved by {drift:.2f} over the last {steps // 2} steps: use more steps": drift,
        f"up to {2 * atom:.2f} of the mass may sit exactly at the bound: use more steps": atom,
    }
    return max(causes, key=lambda cause: causes[cause])


def _merged(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Nodes closer than rounding, such as copies of a converged outlier, count as one."""
    nodes, weights = probe.nodes, probe.weights
    closeness = 1e-12 * max(float(np.abs(nodes).max()), 1e-300)
    starts = np.concatenate([[True], np.diff(nodes) > closeness])
    groups = np.cumsum(starts) - 1
    return nodes[starts], np.bincount(groups, weights=weights)
