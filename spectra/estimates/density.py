"""The spectral density that stochastic Lanczos quadrature leaves, and every number read from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates import moments
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH, Estimate
from spectra.estimates.quadrature import GaussRule, gauss_rule
from spectra.estimates.shares import Measure, cumulative, share_inside

NOTHING = np.zeros(0)


@dataclass(frozen=True)
class SpectralDensity:
    """Jacobi matrices of several probes, together an estimate of the density of eigenvalues.

    dimension: n. alphas, betas: (probes, steps), one Jacobi matrix a row (see `spectra.Tridiagonal`), and lengths:
    (probes,) how many of their entries are used. atoms: (a,) eigenvalues known exactly and outside what the probes
    saw, such as deflated outliers and the zeros of directions that the operator never touches; counts: (a,) how many
    of each; atom_residuals: (a,) bounds on their error. noise: how far rounding may have moved an eigenvalue.

    nodes, weights: (probes, steps), or more columns where deflated atoms ask for them, the quadrature rule of each
    probe with the atoms put back at their exact weights: ascending nodes, weights that sum to 1 in each row; unused
    columns repeat a node with weight 0.
    With A the operator, the mean over probes of sum_i w_i theta_i^k estimates tr(A^k) / n.
    exact: nothing was sampled, every eigenvalue is an atom. seed: of the probes, None where it is not known; two
    densities from the probes of one seed can be compared in pairs (`spectra.compare`). Estimates carry 95 % intervals.
    """

    dimension: int
    alphas: np.ndarray
    betas: np.ndarray
    lengths: np.ndarray
    atoms: np.ndarray = field(default_factory=lambda: NOTHING)
    counts: np.ndarray = field(default_factory=lambda: NOTHING)
    atom_residuals: np.ndarray = field(default_factory=lambda: NOTHING)
    noise: float = 0.0
    exact: bool = False
    seed: int | None = None

    @classmethod
    def from_eigenvalues(
        cls, eigenvalues: np.ndarray, *, probes: int = 1, steps: int | None = None, noise: float = 0.0
    ) -> SpectralDensity:
        """The density of known eigenvalues (n,): weight 1/n each, the same in every row, padded to `steps`.

        noise: how far rounding may have moved each of them; those that are exactly 0 are taken to be so.
        """
        values = np.sort(np.asarray(eigenvalues, dtype=float))
        n, errors = len(values), np.where(values == 0, 0.0, noise)
        empty, lengths = np.zeros((probes, steps or n)), np.zeros(probes, dtype=int)
        return cls(n, empty, empty, lengths, values, np.ones(n), errors, noise=noise, exact=True)

    # -- the density as a curve

    @cached_property
    def rules(self) -> list[GaussRule]:
        """The Gauss rule of each probe, over what is not an atom."""
        return [gauss_rule(self.alphas[row, :m], self.betas[row, :m]) for row, m in enumerate(self.lengths) if m]

    @property
    def nodes(self) -> np.ndarray:
        """(probes, steps) or wider, see the class."""
        return self._table[0]

    @property
    def weights(self) -> np.ndarray:
        """(probes, steps) or wider, see the class."""
        return self._table[1]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        probes, steps = self.alphas.shape
        columns = max(steps, int(self.lengths.max(initial=0)) + len(self.atoms))
        nodes, weights = np.zeros((probes, columns)), np.zeros((probes, columns))
        share = self.sampled / self.dimension
        for row, m in enumerate(self.lengths):
            rule = self.rules[row] if m else GaussRule(NOTHING, NOTHING, NOTHING)
            used = np.concatenate([rule.nodes, self.atoms])
            order = np.argsort(used, kind="stable")
            nodes[row, : len(used)], nodes[row, len(used) :] = used[order], used.max()
            weights[row, : len(used)] = np.concatenate([share * rule.weights, self.counts / self.dimension])[order]
        return nodes, weights

    def cumulative(self, grid: np.ndarray) -> np.ndarray:
        """The share of eigenvalues below each point of the grid, half of a node's weight counting at the node."""
        grid = np.asarray(grid, dtype=float)
        if self.exact:
            left, right = (np.searchsorted(self.atoms, grid, side=side) for side in ("left", "right"))
            return (left + right) / 2 / self.dimension
        curves = [cumulative(nodes, weights, grid) for nodes, weights in zip(self.nodes, self.weights, strict=True)]
        return np.mean(curves, axis=0)

    def bandwidths(self) -> np.ndarray:
        """The default kernel width of each node: half the distance between its neighbours. Shaped like `nodes`."""
        radius = float(np.abs(self.nodes).max())
        floor = 1e-6 * radius if radius > 0 else 1e-12
        if self.nodes.shape[1] < 2:
            return np.full_like(self.nodes, floor)
        return np.maximum(np.gradient(self.nodes, axis=1), floor)

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
        from scipy.special import ndtr  # half a second to load, for a curve alone

        grid = np.asarray(grid, dtype=float)
        if grid.ndim != 1 or len(grid) < 2 or np.any(np.diff(grid) <= 0):
            raise InputError("the grid must be a vector of at least two increasing points")
        if bandwidth is not None and not bandwidth > 0:
            raise InputError(f"the bandwidth must be positive, got {bandwidth}; omit it for the local node spacing")
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
        return share_inside(self._measure, -math.inf, 0.0)

    def near_zero_share(self, tol: float, *, relative: bool = False) -> Estimate:
        """The share with |lambda| < tol, in the units of the eigenvalues, or of max |lambda| where `relative`."""
        if not tol > 0:
            raise InputError(f"the tolerance must be positive, got {tol}")
        bound = tol * float(np.abs(self.nodes).max()) if relative else tol
        return share_inside(self._measure, -bound, bound)

    def share_between(self, low: float, high: float) -> Estimate:
        """The share with low < lambda < high; either may be infinite."""
        if not low < high:
            raise InputError(f"an interval with low < high is expected, got [{low}, {high}]")
        return share_inside(self._measure, low, high)

    def zero_share(self) -> float:
        """The share of eigenvalues known to be exactly zero: directions that the operator never touches, such as the
        weights that a quantizer clips. Part of every share that holds zero."""
        return float(self.counts[self.atoms == 0].sum()) / self.dimension

    def without_known_zeros(self) -> SpectralDensity:
        """The density of the other eigenvalues alone, whose shares are then shares of these.

        Raises InputError where every eigenvalue is known to be zero.
        """
        zeros = self.atoms == 0
        left = self.dimension - int(self.counts[zeros].sum())
        if left == 0:
            raise InputError("every eigenvalue is known to be zero: nothing else is left to look at")
        kept = {name: getattr(self, name)[~zeros] for name in ("atoms", "counts", "atom_residuals")}
        return replace(self, dimension=left, **kept)

    # -- well-determined quantities

    def trace(self) -> Estimate:
        """tr A, the sum of the eigenvalues."""
        return self._sum(lambda theta: theta)

    def frobenius(self) -> Estimate:
        """||A||_F, the root of the sum of squared eigenvalues."""
        return moments.square_root(self._sum(np.square))

    def rms(self) -> Estimate:
        """The root-mean-square eigenvalue, ||A||_F / sqrt(n)."""
        return moments.scaled(self.frobenius(), 1 / math.sqrt(self.dimension))

    def negative_energy_share(self) -> Estimate:
        """sum over lambda < 0 of lambda^2, over sum of lambda^2."""
        return self._negative_ratio(2)

    def negative_magnitude_share(self) -> Estimate:
        """sum over lambda < 0 of |lambda|, over sum of |lambda|."""
        return self._negative_ratio(1)

    def lambda_max(self) -> Estimate:
        """The largest eigenvalue: the largest node, a lower bound, with room above for what has not converged."""
        return moments.largest(self.rules, self._residuals, self.atoms, self.atom_residuals, self.noise)

    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue: the smallest node, an upper bound, with room below for what has not converged."""
        residuals = [r[::-1] for r in self._residuals]
        mirror = moments.mirrored(self.rules)
        return moments.negated(moments.largest(mirror, residuals, -self.atoms, self.atom_residuals, self.noise))

    # -- storage

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What is needed to build this density again: arrays for a safetensors file."""
        real = {name: getattr(self, name) for name in ("alphas", "betas", "atoms", "counts", "atom_residuals")}
        arrays: dict[str, np.ndarray] = {
            name: np.array(value, dtype=np.float64, order="C") for name, value in real.items()
        }
        arrays["lengths"] = np.array(self.lengths, dtype=np.int64)
        arrays["dimension"], arrays["exact"] = np.array([self.dimension]), np.array([int(self.exact)])
        arrays["noise"] = np.array([self.noise], dtype=np.float64)
        if self.seed is not None:  # as 64 bits, which is what probes depend on
            arrays["seed"] = np.array([self.seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64).view(np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> SpectralDensity:
        """The inverse of `to_arrays`."""
        real = {name: np.asarray(arrays[name]) for name in ("alphas", "betas", "atoms", "counts", "atom_residuals")}
        return cls(
            dimension=int(arrays["dimension"][0]),
            lengths=np.asarray(arrays["lengths"]),
            noise=float(arrays["noise"][0]),
            exact=bool(arrays["exact"][0]),
            seed=int(arrays["seed"][0]) if "seed" in arrays else None,  # older files have none
            **real,
        )

    # -- how the numbers are made

    @property
    def sampled(self) -> int:
        """The dimension of the space that the probes were drawn from."""
        return self.dimension - int(self.counts.sum())

    @cached_property
    def rounding(self) -> float:
        """What the arithmetic may have lost of a sum over eigenvalues, relative to that over their sizes."""
        radius = float(np.abs(self.nodes).max())
        return max(moments.ROUNDING, self.noise / radius if radius > 0 else 0.0)

    @cached_property
    def _measure(self) -> Measure:
        jacobi = [(self.alphas[row, :m], self.betas[row, :m]) for row, m in enumerate(self.lengths) if m]
        noise = self.noise + (0.0 if self.exact else moments.leak(self.atoms, self.atom_residuals, 0.0))
        return Measure(jacobi, self.sampled, self.atoms, self.counts, self.atom_residuals, noise)

    @cached_property
    def _residuals(self) -> list[np.ndarray]:
        last = [self.betas[row, m - 1] for row, m in enumerate(self.lengths) if m]
        return [beta * np.abs(rule.last_components) for beta, rule in zip(last, self.rules, strict=True)]

    def _sum(self, function: moments.Function) -> Estimate:
        known = (self.sampled, self.atoms, self.counts)
        return moments.sum_over_eigenvalues(function, self.rules, *known, rounding=self.rounding)

    def _negative_ratio(self, power: int) -> Estimate:
        """Negative part over the whole of sum |lambda|^power, with room for what more steps would change:
        |lambda|^power has a kink at zero that a short recurrence smooths."""

        def whole(theta: np.ndarray) -> np.ndarray:
            return np.abs(theta) ** power

        def part(theta: np.ndarray) -> np.ndarray:
            return np.where(theta < 0, whole(theta), 0.0)

        known = (self.sampled, self.atoms, self.counts)
        estimate = moments.ratio_of_sums(part, whole, self.rules, *known)
        if not self.rules or not estimate.resolved:
            return estimate
        quarter, half = (
            moments.ratio_value(
                part, whole, [gauss_rule(a[: max(len(a) // cut, 1)], b) for a, b in self._measure.jacobi], *known
            )
            or 0.0
            for cut in (4, 2)
        )
        estimate = moments.widened(estimate, _remainder(quarter, half, estimate.value), least=0.0, most=1.0)
        # to each side: where chance made the ratio small, so is its spread, but the far side still shows it
        if max(estimate.high - estimate.value, estimate.value - estimate.low) <= RESOLVED_HALF_WIDTH:
            return estimate
        return replace(estimate, resolved=False, reason=f"{len(self.rules)} probes are too few: use more, or deflate")


def _remainder(quarter: float, half: float, whole: float) -> float:
    """How far a sequence may be from its limit, from its values at a quarter, half and all of the steps.

    Changes that shrink by a ratio r at each doubling leave r / (1 - r) of the last one. r is measured, and taken as at
    least 1/8 (where |lambda|^2 is smoothed at a smooth density) and at most 1/2.
    """
    last, before = abs(whole - half), abs(half - quarter)
    ratio = min(max(last / before if before > 0 else 0.5, 1 / 8), 1 / 2)
    return last * ratio / (1 - ratio)
