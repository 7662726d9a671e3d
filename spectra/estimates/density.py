"""The spectral density that stochastic Lanczos quadrature estimates, and the quantities that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from spectra.backend import markup
from spectra.backend.errors import InputError
from spectra.estimates import curves, ends, moments
from spectra.estimates.band import CumulativeBand, cumulative_band
from spectra.estimates.counts import CountBelow
from spectra.estimates.estimate import (
    CONFIDENCE,
    RESOLVED_HALF_WIDTH,
    Estimate,
    judged_by_size,
    scaled,
    square_root,
    unresolved,
)
from spectra.estimates.measure import JacobiMatrices, KnownEigenvalues, SpectralMeasure, no_numbers
from spectra.estimates.origin import Origin
from spectra.estimates.quadrature import GaussRule
from spectra.estimates.shares import share_inside
from spectra.estimates.signs import DecidedSigns, decided_signs, with_decided_signs

# Methods without arguments that a notebook shows the results of.
SHOWN = (
    *("negative_share", "lambda_max", "lambda_min", "rms", "frobenius", "trace"),
    *("negative_energy_share", "negative_magnitude_share"),
)
SEED_BITS = 0xFFFFFFFFFFFFFFFF  # probe vectors depend on the lowest 64 bits of a seed


@dataclass(frozen=True, init=False, eq=False)
class SpectralDensity:
    """The density of the eigenvalues of a symmetric operator A, estimated from several probe vectors.

    Each probe vector gives a quadrature rule with nodes theta_i and weights w_i. With the known eigenvalues added at
    their exact weights, the mean over probe vectors of sum_i w_i theta_i^k estimates tr(A^k) / n. Every `Estimate` has
    a 95 % interval.

    Args:
        dimension: The number n of eigenvalues.
        alphas: (probes, steps) diagonals of the Jacobi matrices, a row for each probe vector (see
            `spectra.Tridiagonal`).
        betas: (probes, steps) their off-diagonals, with the last residual norm.
        lengths: (probes,) how many entries of each row are used.
        atoms: (a,) eigenvalues known one by one, in ascending order, which the probe vectors did not sample: deflated
            outliers, and the zeros of coordinates that the operator maps to zero.
        counts: (a,) multiplicity of each.
        atom_residuals: (a,) bounds on their errors.
        rounding_error: How far rounding error may have moved an eigenvalue, in the units of the eigenvalues.
        exact: Whether nothing was sampled, so that every eigenvalue is in `atoms`.
        seed: Seed of the probe vectors, None where it is unknown. Two densities from one seed can be compared in pairs
            (`spectra.compare`).
        origin: The parameters and batches that were measured, as far as they are known. Where its `unverified` gives a
            reason, every estimate is marked as unresolved with it.
        count: How many eigenvalues lie below zero, where that was counted after a change of variables.

    Attributes:
        measure: The Jacobi matrices and the known eigenvalues as one value.
        exact: Whether nothing was sampled.
        seed: Seed of the probe vectors, or None.
        origin: The parameters and batches that were measured.
        count: The count of eigenvalues below zero, or None.

    Example:
        >>> density = SpectralDensity.from_eigenvalues(np.array([-1.0, 1.0, 3.0, 5.0]))
        >>> density.trace().value, density.negative_share().value
        (8.0, 0.25)
    """

    measure: SpectralMeasure
    exact: bool
    seed: int | None
    origin: Origin
    count: CountBelow | None

    def __init__(
        self,
        dimension: int,
        alphas: np.ndarray,
        betas: np.ndarray,
        lengths: np.ndarray,
        atoms: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        atom_residuals: np.ndarray | None = None,
        rounding_error: float = 0.0,
        exact: bool = False,
        seed: int | None = None,
        origin: Origin | None = None,
        count: CountBelow | None = None,
    ) -> None:
        atoms, counts, errors = (no_numbers() if a is None else a for a in (atoms, counts, atom_residuals))
        known = KnownEigenvalues(atoms, counts, errors)
        jacobi = JacobiMatrices(alphas, betas, lengths)
        measure = SpectralMeasure(jacobi, dimension - known.total, known, rounding_error)
        fields = {"measure": measure, "exact": exact, "seed": seed, "origin": origin or Origin(), "count": count}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def from_eigenvalues(
        cls, eigenvalues: np.ndarray, *, probes: int = 1, steps: int | None = None, rounding_error: float = 0.0
    ) -> SpectralDensity:
        """Build the density of eigenvalues that are all known, each with weight 1/n.

        Args:
            eigenvalues: (n,) in any order.
            probes: How many rows `nodes` and `weights` have, which are all equal.
            steps: How many columns they have at least.
            rounding_error: Bound on the error of each eigenvalue, except those that are exactly 0.

        Returns:
            The density, with `exact` set.
        """
        values = np.sort(np.asarray(eigenvalues, dtype=float))
        n, errors = len(values), np.where(values == 0, 0.0, rounding_error)
        empty, lengths = np.zeros((probes, steps or n)), np.zeros(probes, dtype=int)
        return cls(n, empty, empty, lengths, values, np.ones(n), errors, rounding_error=rounding_error, exact=True)

    def with_origin(self, origin: Origin) -> SpectralDensity:
        """Return the same density with another origin."""
        return self._changed(self.measure.known, origin, self.count)

    def with_count(self, count: CountBelow | None) -> SpectralDensity:
        """Return the same density with a count of the eigenvalues below zero, or without one.

        Args:
            count: The count, from `spectra.count_below`.

        Returns:
            The density, whose `negative_share` is read from the count where that is narrower.

        Raises:
            InputError: For a count of another number of eigenvalues, or below another threshold than zero.
        """
        if count is not None and (count.threshold, count.measure.dimension) != (0.0, self.dimension):
            raise InputError(
                f"a count below 0 of {self.dimension} eigenvalues is expected, got one below {count.threshold:g} of "
                f"{count.measure.dimension}: count for the same operator"
            )
        return self._changed(self.measure.known, self.origin, count)

    def _changed(self, known: KnownEigenvalues, origin: Origin, count: CountBelow | None) -> SpectralDensity:
        """The same Jacobi matrices with other known eigenvalues, another origin and another count."""
        return SpectralDensity(
            self.measure.sampled_dimension + known.total,
            self.alphas,
            self.betas,
            self.lengths,
            known.values,
            known.counts,
            known.errors,
            rounding_error=self.rounding_error,
            exact=self.exact,
            seed=self.seed,
            origin=origin,
            count=count,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the estimates, each under the name of its method."""
        rows = []
        for name in SHOWN:
            estimate = getattr(self, name)()
            value, low, high = estimate.rounded()
            rows.append((f"{name}()", value, f"[{low}, {high}]", estimate.reason))
        probes, steps = self.alphas.shape
        measured = "all known" if self.exact else f"{probes} probe vectors, {steps} Lanczos steps"
        heading = f"Spectral density of {self.dimension:,} eigenvalues: {measured}"
        if not self.exact and self.measure.known.total:
            heading += f", {self.measure.known.total:,} eigenvalues known"
        return markup.table(("", "value", "95 % interval", "unresolved because"), rows, heading=heading)

    # -- what was measured

    @property
    def dimension(self) -> int:
        """The number n of eigenvalues."""
        return self.measure.dimension

    @property
    def alphas(self) -> np.ndarray:
        """(probes, steps) diagonals of the Jacobi matrices."""
        return self.measure.jacobi.alphas

    @property
    def betas(self) -> np.ndarray:
        """(probes, steps) off-diagonals of the Jacobi matrices, with the last residual norm."""
        return self.measure.jacobi.betas

    @property
    def lengths(self) -> np.ndarray:
        """(probes,) how many entries of each row of `alphas` and `betas` are used."""
        return self.measure.jacobi.lengths

    @property
    def atoms(self) -> np.ndarray:
        """(a,) eigenvalues known one by one."""
        return self.measure.known.values

    @property
    def counts(self) -> np.ndarray:
        """(a,) multiplicity of each of `atoms`."""
        return self.measure.known.counts

    @property
    def atom_residuals(self) -> np.ndarray:
        """(a,) bounds on the errors of `atoms`."""
        return self.measure.known.errors

    @property
    def rounding_error(self) -> float:
        """How far rounding error may have moved an eigenvalue."""
        return self.measure.rounding_error

    # -- the density as a curve

    @property
    def nodes(self) -> np.ndarray:
        """(probes, m) ascending nodes of each rule with `atoms` among them; unused columns repeat the last node.

        m is `steps`, or larger where the atoms need more columns.
        """
        return self._nodes_and_weights[0]

    @property
    def weights(self) -> np.ndarray:
        """(probes, m) weights of `nodes`, which sum to 1 in each row; unused columns have weight 0."""
        return self._nodes_and_weights[1]

    @cached_property
    def _nodes_and_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """`nodes` and `weights`."""
        probes, steps = self.alphas.shape
        columns = max(steps, int(self.lengths.max(initial=0)) + len(self.atoms))
        nodes, weights = np.zeros((probes, columns)), np.zeros((probes, columns))
        sampled_share = self.measure.sampled_dimension / self.dimension
        rules = iter(self.measure.rules)
        for row, m in enumerate(self.lengths):
            rule = next(rules) if m else GaussRule(no_numbers(), no_numbers(), no_numbers())
            used = np.concatenate([rule.nodes, self.atoms])
            used_weights = np.concatenate([sampled_share * rule.weights, self.counts / self.dimension])
            order = np.argsort(used, kind="stable")
            nodes[row, : len(used)], nodes[row, len(used) :] = used[order], used.max()
            weights[row, : len(used)] = used_weights[order]
        return nodes, weights

    def cumulative(self, grid: np.ndarray) -> np.ndarray:
        """Return the share of eigenvalues below each point; half of a node's weight counts at the node.

        Args:
            grid: (g,) points.

        Returns:
            (g,) shares in [0, 1].
        """
        grid = np.asarray(grid, dtype=float)
        if self.exact:
            left, right = (np.searchsorted(self.atoms, grid, side=side) for side in ("left", "right"))
            return (left + right) / 2 / self.dimension
        rows = zip(self.nodes, self.weights, strict=True)
        return np.mean([curves.cumulative_share(nodes, weights, grid) for nodes, weights in rows], axis=0)

    def bandwidths(self) -> np.ndarray:
        """Return the default kernel width of each node, half the distance between its neighbours: shaped as `nodes`."""
        return curves.kernel_widths(self.nodes)

    def grid(self, points: int = 1024) -> np.ndarray:
        """Return an evenly spaced grid (points,) that covers the whole smoothed density."""
        margin = 4 * self.bandwidths()
        return np.linspace((self.nodes - margin).min(), (self.nodes + margin).max(), points)

    def density(self, grid: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """Return the density smoothed by a Gaussian kernel, at each grid point the mean over its cell.

        The trapezoid rule over a grid that covers the spectrum gives 1.

        Args:
            grid: (g,) increasing points, at least two.
            bandwidth: Standard deviation of the kernel. By default that of each node is the local node spacing, the
                resolution of the recurrence.

        Returns:
            (g,) the density, in units of 1 / eigenvalue.

        Raises:
            InputError: For a grid that does not increase, or a bandwidth that is not positive.
        """
        grid = np.asarray(grid, dtype=float)
        if grid.ndim != 1 or len(grid) < 2 or np.any(np.diff(grid) <= 0):
            raise InputError("the grid must be a vector of at least two increasing points")
        if bandwidth is not None and not bandwidth > 0:
            raise InputError(f"the bandwidth must be positive, got {bandwidth}; omit it for the local node spacing")
        widths = self.bandwidths() if bandwidth is None else np.full_like(self.nodes, bandwidth)
        return curves.smoothed_density(self.nodes, self.weights, widths, grid)

    # -- shares of the eigenvalues

    def negative_share(self) -> Estimate:
        """Estimate the share of eigenvalues below zero, #{lambda < 0} / n.

        Of the measure of A and the `count` after a change of variables, the one with the narrower interval is read.
        Where it is unresolved, the reason also says how far from zero the signs are known; see `decided_signs`.
        """
        share = share_inside(self.measure, -math.inf, 0.0)
        if self.count is not None:
            share = min(self.count.share(), share, key=lambda found: found.half_width)
        return self._verified(with_decided_signs(share, self.measure))

    def near_zero_share(self, tol: float, *, relative: bool = False) -> Estimate:
        """Estimate the share of eigenvalues with |lambda| < tol.

        Args:
            tol: The tolerance, in the units of the eigenvalues.
            relative: Whether the tolerance is in units of max |lambda| instead.

        Returns:
            The share.

        Raises:
            InputError: For a tolerance that is not positive.
        """
        if not tol > 0:
            raise InputError(f"the tolerance must be positive, got {tol}")
        bound = tol * self.measure.radius if relative else tol
        return self._share(-bound, bound)

    def share_between(self, low: float, high: float) -> Estimate:
        """Estimate the share of eigenvalues with low < lambda < high.

        Args:
            low: Lower bound, exclusive; may be -inf.
            high: Upper bound, exclusive; may be inf.

        Returns:
            The share.

        Raises:
            InputError: Unless low < high.
        """
        if not low < high:
            raise InputError(f"an interval with low < high is expected, got [{low}, {high}]")
        return self._share(low, high)

    def decided_signs(self, half_width: float = RESOLVED_HALF_WIDTH) -> DecidedSigns:
        """Find how far from zero the signs are known: the smallest t with known shares below -t and above t.

        Lanczos steps resolve the mass near zero last. So the sign of eigenvalues far from zero is often known where the
        negative share is unresolved.

        Args:
            half_width: Largest half-width of the 95 % interval of each of the two shares.

        Returns:
            The threshold t, rounded to two digits, and both shares.

        Raises:
            InputError: If the half-width is not positive.
        """
        if not half_width > 0:
            raise InputError(f"the half-width must be positive, got {half_width}")
        found = decided_signs(self.measure, half_width)
        return DecidedSigns(found.beyond, self._verified(found.below), self._verified(found.above))

    def band(
        self,
        level: float = CONFIDENCE,
        *,
        known: Mapping[float, Estimate] | None = None,
        thresholds: np.ndarray | None = None,
        tails: bool = False,
    ) -> CumulativeBand:
        """Bound the share of eigenvalues below t, #{lambda < t} / n, for all t at once.

        The brackets of the quadrature rules hold at all thresholds at once. The sampling error is bounded at all
        thresholds at once by the Kolmogorov-Smirnov distribution of (n + 2) / 2 points for each probe vector. The
        partial sums of the squared coordinates of a uniform unit vector, which have a Dirichlet distribution, tend to
        the same Brownian bridge as the error of an empirical distribution (see
        `spectra.estimates.band.simultaneous_error`).

        Args:
            level: The probability that the whole curve lies inside the band.
            known: Intervals of the share below some thresholds from other measurements, by threshold, such as
                {0.0: spectra.resolve(op)}. They narrow the band at other thresholds too, because the share is
                monotonic. Each may fail with probability .05, which is subtracted from the level of the band; an
                interval of width 0 is certain.
            thresholds: (p,) further thresholds of the band, such as the points of a figure.
            tails: Whether few eigenvalues beyond a threshold are counted with a relative error, as figures do. It
                makes the error elsewhere 1 to 2 % larger; see `spectra.estimates.tail_counts`.

        Returns:
            The band, with `thresholds`, `low`, `high` and `level`, and with `at` for any other thresholds.

        Raises:
            InputError: If the level is outside (0, 1), a threshold is not finite, or an interval misses the band.
        """
        band = cumulative_band(self.measure, level=level, known=known, thresholds=thresholds, tails=tails)
        return replace(band, reason=self.origin.unverified)

    def zero_share(self) -> float:
        """Return the share of eigenvalues known to be exactly zero.

        They belong to coordinates that the operator maps to zero, such as weights that are not used. They count in
        every share of an interval that contains zero.
        """
        return float(self.counts[self.atoms == 0].sum()) / self.dimension

    def without_known_zeros(self) -> SpectralDensity:
        """Return the density of the eigenvalues that are not known to be zero.

        Returns:
            The density, whose dimension is smaller by the number of known zeros.

        Raises:
            InputError: Where every eigenvalue is known to be zero.
        """
        known = self.measure.known.without_zeros()
        if self.measure.sampled_dimension + known.total == 0:
            raise InputError("every eigenvalue is known to be zero: there are no others")
        return self._changed(known, replace(self.origin, parameters=""), None)

    # -- sums over the eigenvalues, and the ends of the spectrum

    def trace(self) -> Estimate:
        """Estimate tr A, the sum of the eigenvalues."""
        trace = self._sum(lambda eigenvalues: eigenvalues)
        return self._verified(judged_by_size(trace, scale=self._sum(np.abs).value))

    def frobenius(self) -> Estimate:
        """Estimate ||A||_F, the square root of the sum of squared eigenvalues."""
        return self._verified(judged_by_size(self._frobenius()))

    def rms(self) -> Estimate:
        """Estimate the root-mean-square eigenvalue, ||A||_F / sqrt(n)."""
        return self._verified(judged_by_size(scaled(self._frobenius(), 1 / math.sqrt(self.dimension))))

    def negative_energy_share(self) -> Estimate:
        """Estimate the sum of lambda^2 over lambda < 0, divided by the sum of lambda^2."""
        return self._verified(moments.negative_part_share(self.measure, power=2))

    def negative_magnitude_share(self) -> Estimate:
        """Estimate the sum of |lambda| over lambda < 0, divided by the sum of |lambda|."""
        return self._verified(moments.negative_part_share(self.measure, power=1))

    def lambda_max(self) -> Estimate:
        """Estimate the largest eigenvalue: the largest node; the interval above it covers what has not converged."""
        return self._verified(ends.largest_eigenvalue(self.measure))

    def lambda_min(self) -> Estimate:
        """Estimate the smallest eigenvalue: the smallest node; the interval below it covers what has not converged."""
        return self._verified(ends.smallest_eigenvalue(self.measure))

    def _share(self, low: float, high: float) -> Estimate:
        """The share of eigenvalues with low < lambda < high."""
        return self._verified(share_inside(self.measure, low, high))

    def _frobenius(self) -> Estimate:
        """||A||_F, without the judgement whether it is resolved."""
        return square_root(self._sum(np.square))

    def _verified(self, estimate: Estimate) -> Estimate:
        """The estimate, marked unresolved where the operator's numbers cannot be relied on."""
        return unresolved(estimate, self.origin.unverified)

    def _sum(self, function: moments.Function) -> Estimate:
        """The sum of a function over all eigenvalues."""
        return moments.sum_over_eigenvalues(
            function, self.measure, relative_rounding_error=self.measure.relative_rounding_error
        )

    # -- storage

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for a safetensors file, from which `from_arrays` builds the density again."""
        real = {name: getattr(self, name) for name in ("alphas", "betas", "atoms", "counts", "atom_residuals")}
        arrays: dict[str, np.ndarray] = {
            name: np.array(value, dtype=np.float64, order="C") for name, value in real.items()
        }
        arrays["lengths"] = np.array(self.lengths, dtype=np.int64)
        arrays["dimension"], arrays["exact"] = np.array([self.dimension]), np.array([int(self.exact)])
        arrays["noise"] = np.array([self.rounding_error], dtype=np.float64)  # the key that older files have
        if self.seed is not None:
            arrays["seed"] = np.array([self.seed & SEED_BITS], dtype=np.uint64).view(np.int64)
        if self.origin != Origin():
            arrays["origin"] = self.origin.to_array()
        if self.count is not None:
            arrays |= self.count.to_arrays()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> SpectralDensity:
        """Build a density from what `to_arrays` returned.

        Args:
            arrays: The arrays by name; those of the seed, the origin and the count may be missing, as in older files.

        Returns:
            The density.
        """
        real = {name: np.asarray(arrays[name]) for name in ("alphas", "betas", "atoms", "counts", "atom_residuals")}
        return cls(
            dimension=int(arrays["dimension"][0]),
            lengths=np.asarray(arrays["lengths"]),
            rounding_error=float(arrays["noise"][0]),
            exact=bool(arrays["exact"][0]),
            seed=int(arrays["seed"][0]) if "seed" in arrays else None,
            origin=Origin.from_array(arrays["origin"]) if "origin" in arrays else None,
            count=CountBelow.from_arrays(arrays),
            **real,
        )
