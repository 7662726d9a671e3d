"""The spectral density that stochastic Lanczos quadrature leaves, and every number read from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from spectra.errors import InputError
from spectra.estimates import Estimate, student_interval
from spectra.quadrature import gauss_rule
from spectra.shares import Probe, share_below, share_inside

RESOLVED_END = 0.05  # relative half-width under which an extreme eigenvalue counts as resolved


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature rules of several probes, together an estimate of the density of eigenvalues.

    nodes, weights: (probes, steps), ascending nodes and weights that sum to 1 in each row; a row that ended early
    repeats its last node with weight 0. dimension: n. alphas, betas: (probes, steps), the Jacobi matrices (see
    `spectra.lanczos.Tridiagonal`), and lengths: (probes,) how many of their entries are used. residuals: (probes,
    steps), a bound on the distance from each node to an eigenvalue. exact: the rows are the eigenvalues themselves.

    All estimates carry 95 % intervals; `exact` ones have no width. With A the operator and v a probe of norm 1,
    a probe's moments are sum_i w_i theta_i^k = v . A^k v, whose mean is tr(A^k) / n.
    """

    nodes: np.ndarray
    weights: np.ndarray
    dimension: int
    alphas: np.ndarray
    betas: np.ndarray
    lengths: np.ndarray
    residuals: np.ndarray
    exact: bool = False

    @classmethod
    def from_jacobi(
        cls, alphas: np.ndarray, betas: np.ndarray, lengths: np.ndarray, *, dimension: int
    ) -> SpectralDensity:
        """The Gauss rules of Jacobi matrices; alphas, betas: (probes, steps), lengths: (probes,)."""
        nodes, weights, residuals = (np.zeros_like(alphas) for _ in range(3))
        for row, length in enumerate(lengths):
            rule = gauss_rule(alphas[row, :length], betas[row, :length])
            nodes[row, :length], nodes[row, length:] = rule.nodes, rule.nodes[-1]
            weights[row, :length] = rule.weights
            residuals[row, :length] = betas[row, length - 1] * np.abs(rule.last_components)
        return cls(nodes, weights, dimension, alphas, betas, np.asarray(lengths), residuals)

    @classmethod
    def from_eigenvalues(cls, eigenvalues: np.ndarray, *, probes: int = 1, steps: int | None = None) -> SpectralDensity:
        """The density of known eigenvalues (n,): weight 1/n each, the same in every row, padded to `steps`."""
        values = np.sort(np.asarray(eigenvalues, dtype=float))
        n, steps = len(values), steps or len(values)
        nodes, weights = np.full((probes, steps), values[-1]), np.zeros((probes, steps))
        nodes[:, :n], weights[:, :n] = values, 1 / n
        zeros, lengths = np.zeros((probes, steps)), np.full(probes, n)
        return cls(nodes, weights, n, nodes, zeros, lengths, zeros, exact=True)

    # -- the density as a curve

    def cumulative(self, grid: np.ndarray) -> np.ndarray:
        """The share of eigenvalues below each point of the grid, half of a node's weight counting at the node."""
        curves = [share_below(p, np.asarray(grid, dtype=float), exact=self.exact) for p in self._probes()]
        return np.mean(curves, axis=0)

    def bandwidths(self) -> np.ndarray:
        """The default kernel width of each node: half the distance between its neighbours. (probes, steps)"""
        widths = np.zeros_like(self.nodes)
        for row, length in enumerate(self.lengths):
            nodes = self.nodes[row, :length]
            if length > 1:
                widths[row, :length] = np.gradient(nodes)
        radius = np.abs(self.nodes).max()
        return np.maximum(widths, 1e-6 * radius if radius > 0 else 1e-12)

    def grid(self, points: int = 1024) -> np.ndarray:
        """An even grid that holds the whole smoothed density. (points,)"""
        margin = 4 * self.bandwidths()
        return np.linspace((self.nodes - margin).min(), (self.nodes + margin).max(), points)

    def density(self, grid: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """The smoothed density at each grid point, the mean over its cell: (len(grid),), units of 1 / eigenvalue.

        Each node is spread by a Gauss kernel of standard deviation `bandwidth`, by default its own local node
        spacing, which is what the recurrence resolves. The trapezoid rule over a grid that holds the spectrum gives 1
        whatever its spacing, because each cell holds the mass that falls into it.
        """
        grid = np.asarray(grid, dtype=float)
        if grid.ndim != 1 or len(grid) < 2 or np.any(np.diff(grid) <= 0):
            raise InputError("the grid must be a vector of at least two increasing points")
        if bandwidth is not None and not bandwidth > 0:
            raise InputError(
                f"the bandwidth must be positive, got {bandwidth}; leave it out for the local node spacing"
            )
        edges = np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
        widths = self.bandwidths() if bandwidth is None else np.full_like(self.nodes, bandwidth)
        mass = np.zeros(len(grid))
        for nodes, weights, width in zip(self.nodes, self.weights, widths, strict=True):
            used = weights > 0
            steps = np.diff(ndtr((edges[:, None] - nodes[used]) / width[used]), axis=0)
            mass += steps @ weights[used]
        return mass / len(self.nodes) / np.diff(edges)

    # -- shares of the eigenvalues

    def negative_share(self) -> Estimate:
        """The share of eigenvalues below zero, #{lambda < 0} / n."""
        return share_inside(self._probes(), -math.inf, 0.0, exact=self.exact)

    def near_zero_share(self, tol: float, *, relative: bool = False) -> Estimate:
        """The share with |lambda| < tol, in the units of the eigenvalues, or of lambda_max where `relative`."""
        if not tol > 0:
            raise InputError(f"the tolerance must be positive, got {tol}")
        bound = tol * abs(self.nodes).max() if relative else tol
        return share_inside(self._probes(), -bound, bound, exact=self.exact)

    def share_between(self, low: float, high: float) -> Estimate:
        """The share with low < lambda < high; either may be infinite."""
        if not low < high:
            raise InputError(f"an interval with low < high is expected, got [{low}, {high}]")
        return share_inside(self._probes(), low, high, exact=self.exact)

    # -- well-determined quantities

    def trace(self) -> Estimate:
        """tr A = n * mean of v . A v."""
        return self._mean(lambda theta: theta, scale=self.dimension)

    def frobenius(self) -> Estimate:
        """||A||_F = sqrt(n * mean of ||A v||^2)."""
        return _square_root(self._mean(np.square, scale=self.dimension))

    def rms(self) -> Estimate:
        """The root-mean-square eigenvalue, ||A||_F / sqrt(n)."""
        return _square_root(self._mean(np.square))

    def negative_energy_share(self) -> Estimate:
        """sum over lambda < 0 of lambda^2, over sum of lambda^2."""
        return self._negative_ratio(np.square)

    def negative_magnitude_share(self) -> Estimate:
        """sum over lambda < 0 of |lambda|, over sum of |lambda|."""
        return self._negative_ratio(np.abs)

    def lambda_max(self) -> Estimate:
        """The largest eigenvalue: the largest node, a lower bound, with room above for what has not converged."""
        return self._end(upper=True)

    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue: the smallest node, an upper bound, with room below for what has not converged."""
        return self._end(upper=False)

    # -- storage

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What is needed to build this density again: arrays for a safetensors file."""
        return {
            "alphas": np.ascontiguousarray(self.alphas, dtype=np.float64),
            "betas": np.ascontiguousarray(self.betas, dtype=np.float64),
            "lengths": np.asarray(self.lengths, dtype=np.int64),
            "dimension": np.array([self.dimension], dtype=np.int64),
            "exact": np.array([self.exact], dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> SpectralDensity:
        """The inverse of `to_arrays`."""
        dimension = int(arrays["dimension"][0])
        if arrays["exact"][0]:
            probes, steps = arrays["alphas"].shape
            return cls.from_eigenvalues(arrays["alphas"][0, :dimension], probes=probes, steps=steps)
        return cls.from_jacobi(arrays["alphas"], arrays["betas"], arrays["lengths"], dimension=dimension)

    # -- how the numbers are made

    def _probes(self) -> list[Probe]:
        return [
            Probe(self.nodes[row, :m], self.weights[row, :m], self.alphas[row, :m], self.betas[row, :m])
            for row, m in enumerate(self.lengths)
        ]

    def _mean(self, function: Callable[[np.ndarray], np.ndarray], *, scale: float = 1.0) -> Estimate:
        samples = scale * (self.weights * function(self.nodes)).sum(axis=1)
        return _certain(samples[0]) if self.exact else student_interval(samples)

    def _negative_ratio(self, size: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Mean over probes of the negative part over the mean of the whole, with a jackknife interval."""
        sizes = self.weights * size(self.nodes)
        part, whole = np.where(self.nodes < 0, sizes, 0).sum(axis=1), sizes.sum(axis=1)
        if whole.sum() == 0:
            return Estimate(0.0, 0.0, 0.0, False, "every eigenvalue is zero")
        ratio = float(part.sum() / whole.sum())
        if self.exact:
            return _certain(ratio)
        if len(part) < 2:
            return Estimate(ratio, 0.0, 1.0, False, "one probe says nothing about its spread: use two or more")
        left_out = (part.sum() - part) / (whole.sum() - whole)
        pseudo = student_interval(len(part) * ratio - (len(part) - 1) * left_out)
        half = pseudo.half_width
        return Estimate(ratio, max(ratio - half, 0.0), min(ratio + half, 1.0))

    def _end(self, *, upper: bool) -> Estimate:
        """Extreme node over probes. A Ritz value never passes the true end, so only the outer bound needs room: the
        largest of the node's residual and the distance to the typical probe's extreme."""
        sign = 1.0 if upper else -1.0
        last = self.lengths - 1 if upper else np.zeros_like(self.lengths)
        rows = np.arange(len(self.nodes))
        ends, residuals = sign * self.nodes[rows, last], self.residuals[rows, last]
        best = int(ends.argmax())
        value = float(ends[best])
        if self.exact:
            return _certain(sign * value)
        room = max(float(residuals[best]), value - float(np.median(ends)))
        scale = float(np.abs(self.nodes).max())
        resolved = room / 2 <= RESOLVED_END * abs(value) or room <= 1e-6 * scale
        reason = "" if resolved else f"not converged after {int(self.lengths[best])} steps: use more steps, or topk"
        low, high = sorted((sign * value, sign * (value + room)))
        return Estimate(sign * value, low, high, resolved, reason)


def _certain(value: float) -> Estimate:
    return Estimate(float(value), float(value), float(value))


def _square_root(square: Estimate) -> Estimate:
    low, high = math.sqrt(max(square.low, 0.0)), math.sqrt(max(square.high, 0.0))
    return Estimate(math.sqrt(max(square.value, 0.0)), low, high, square.resolved, square.reason)
