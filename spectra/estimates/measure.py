"""What is measured of a spectrum: the Jacobi matrices of the probe vectors, and eigenvalues known one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from spectra.estimates.quadrature import GaussRule, gauss_rule

FLOAT64_ERROR = 1e-12  # relative rounding error of a sum over eigenvalues in float64


def no_numbers() -> np.ndarray:
    """Return an empty float64 array."""
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class KnownEigenvalues:
    """Eigenvalues that are known one by one, such as deflated outliers and exact zeros.

    Attributes:
        values: (a,) the eigenvalues.
        counts: (a,) multiplicity of each.
        errors: (a,) bound on the error of each; the residual norm of its Ritz pair where it was deflated.
    """

    values: np.ndarray = field(default_factory=no_numbers)
    counts: np.ndarray = field(default_factory=no_numbers)
    errors: np.ndarray = field(default_factory=no_numbers)

    @property
    def total(self) -> int:
        """How many eigenvalues these are, with multiplicity."""
        return int(self.counts.sum())

    def deflation_shift(self, point: float) -> float:
        """Bound how far deflation with inexact eigenvectors moves the other eigenvalues near a point.

        sum_i r_i^2 / |theta_i - point| for Ritz pairs with residual norms r_i, the second-order effect of the coupling
        that remains between them and the rest (Parlett, The Symmetric Eigenvalue Problem, 1998, chapter 11).

        Args:
            point: The value near which the other eigenvalues lie, in their units.

        Returns:
            The bound, in the same units.
        """
        inexact = self.errors > 0
        residuals, distances = self.errors[inexact], np.abs(self.values[inexact] - point)
        return float((residuals**2 / np.maximum(distances, residuals)).sum())

    def negated(self) -> KnownEigenvalues:
        """Return the same eigenvalues of -A."""
        return replace(self, values=-self.values)

    @property
    def any_deflated(self) -> bool:
        """Whether eigenvalues other than exact zeros are known, which means that some were deflated."""
        return bool(np.any(self.values != 0))

    def without_zeros(self) -> KnownEigenvalues:
        """Return those that are not exactly zero."""
        kept = self.values != 0
        return KnownEigenvalues(self.values[kept], self.counts[kept], self.errors[kept])


@dataclass(frozen=True, eq=False)
class JacobiMatrices:
    """The Jacobi matrix of each probe vector, in one array with a row for each.

    Attributes:
        alphas: (probes, steps) diagonals.
        betas: (probes, steps) off-diagonals; the last used entry of a row is the norm of the last Lanczos residual.
        lengths: (probes,) how many entries of each row are used; 0 where no recurrence was run.
    """

    alphas: np.ndarray
    betas: np.ndarray
    lengths: np.ndarray

    @cached_property
    def used(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(alphas, betas) of each probe vector with a recurrence, both cut to its length (m,)."""
        return [(self.alphas[row, :m], self.betas[row, :m]) for row, m in enumerate(self.lengths) if m]

    def shortened(self, divisor: int) -> JacobiMatrices:
        """Return the matrices after a fraction 1 / divisor of the Lanczos steps, one step at least."""
        lengths = np.where(self.lengths > 0, np.maximum(self.lengths // divisor, 1), 0)
        return replace(self, lengths=lengths)


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """All that was measured of the spectrum of a symmetric operator.

    Probe vectors are uniform on the unit sphere of the space that is orthogonal to the known eigenvectors. The Jacobi
    matrix of a probe vector v has the moments of its spectral measure, sum_k (u_k . v)^2 delta(lambda - lambda_k).

    Attributes:
        jacobi: The Jacobi matrices of the probe vectors.
        sampled_dimension: Dimension of the space that the probe vectors were drawn from.
        known: The eigenvalues outside that space.
        rounding_error: Bound on how far rounding error has moved an eigenvalue, in the units of the eigenvalues.
    """

    jacobi: JacobiMatrices
    sampled_dimension: int
    known: KnownEigenvalues = field(default_factory=KnownEigenvalues)
    rounding_error: float = 0.0

    @property
    def dimension(self) -> int:
        """The number n of all eigenvalues."""
        return self.sampled_dimension + self.known.total

    @cached_property
    def rules(self) -> list[GaussRule]:
        """The Gauss rule of each probe vector with a recurrence, without the known eigenvalues."""
        return [gauss_rule(alphas, betas) for alphas, betas in self.jacobi.used]

    @cached_property
    def residuals(self) -> list[np.ndarray]:
        """The residual norms (m,) of the Ritz pairs of each rule."""
        return [
            betas[-1] * np.abs(rule.last_components)
            for (_, betas), rule in zip(self.jacobi.used, self.rules, strict=True)
        ]

    @cached_property
    def radius(self) -> float:
        """The largest |lambda| among nodes and known eigenvalues."""
        seen = [rule.nodes for rule in self.rules] + [self.known.values]
        return float(np.abs(np.concatenate(seen)).max())

    @property
    def relative_rounding_error(self) -> float:
        """Rounding error of a sum over eigenvalues, relative to the sum of their absolute values."""
        return max(FLOAT64_ERROR, self.rounding_error / self.radius if self.radius > 0 else 0.0)

    def shortened(self, divisor: int) -> SpectralMeasure:
        """Return the measure after a fraction 1 / divisor of the Lanczos steps."""
        return replace(self, jacobi=self.jacobi.shortened(divisor))
