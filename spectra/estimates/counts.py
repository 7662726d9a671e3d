"""A count of eigenvalues below a threshold, read from the recurrence of a congruent operator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from spectra.estimates.estimate import Estimate
from spectra.estimates.measure import JacobiMatrices, KnownEigenvalues, SpectralMeasure
from spectra.estimates.shares import share_inside

PREFIX = "count_below_"  # of the arrays in a safetensors file
NUMBERS = ("threshold", "rounding_error", "sampled_dimension", "search_products", "products", "float_bits")


@dataclass(frozen=True, eq=False)
class CountBelow:
    """How many eigenvalues of A lie below t, from the spectral measure of T = P^T (A - t I) P.

    By Sylvester's law of inertia T has as many negative eigenvalues as A - t I has. Only this count can be read from
    the measure of T: sums, ends and density belong to A.

    Attributes:
        threshold: t, in the units of the eigenvalues of A.
        measure: The measure of T. Known zeros of A stand in it on their side of t, as -1 or 1.
        search_products: Products spent on the search for P.
        products: Products spent in all.
        float_bits: Bits of the floating-point numbers in which T was multiplied, 32 or 64.
    """

    threshold: float
    measure: SpectralMeasure
    search_products: int
    products: int
    float_bits: int

    def share(self) -> Estimate:
        """Estimate the share of eigenvalues of A below t, with its 95 % interval."""
        found = share_inside(self.measure, -math.inf, 0.0)
        return replace(found, reason=found.reason and f"after a change of variables, {found.reason}")

    def cost(self) -> dict[str, int]:
        """The numbers that a record keeps: "steps", "search_products", "products" and "float_bits"."""
        steps = int(self.measure.jacobi.lengths.max(initial=0))
        return {
            "steps": steps,
            "search_products": self.search_products,
            "products": self.products,
            "float_bits": self.float_bits,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for a safetensors file, from which `from_arrays` builds the count again."""
        jacobi, known = self.measure.jacobi, self.measure.known
        arrays = {
            "alphas": jacobi.alphas,
            "betas": jacobi.betas,
            "lengths": jacobi.lengths,
            "known_values": known.values,
            "known_counts": known.counts,
            "known_errors": known.errors,
            "numbers": [
                self.threshold,
                self.measure.rounding_error,
                self.measure.sampled_dimension,
                self.search_products,
                self.products,
                self.float_bits,
            ],
        }
        return {PREFIX + name: np.array(value, dtype=np.float64, order="C") for name, value in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CountBelow | None:
        """Build a count from what `to_arrays` returned.

        Args:
            arrays: The arrays by name, those of other things among them.

        Returns:
            The count; None where the arrays hold none.
        """
        own = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
        if not own:
            return None
        numbers = dict(zip(NUMBERS, map(float, own["numbers"]), strict=True))
        jacobi = JacobiMatrices(own["alphas"], own["betas"], own["lengths"].astype(np.int64))
        known = KnownEigenvalues(own["known_values"], own["known_counts"], own["known_errors"])
        measure = SpectralMeasure(jacobi, int(numbers["sampled_dimension"]), known, numbers["rounding_error"])
        whole = {name: int(numbers[name]) for name in ("search_products", "products", "float_bits")}
        return cls(numbers["threshold"], measure, **whole)
