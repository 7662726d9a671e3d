"""The cases: spectra known by construction, and exact spectra of language models, with the true value of each quantity.

Probe vectors are uniform on the sphere, so the distribution of an estimate depends on the eigenvalues alone, and every
case is diag(eigenvalues). Zero eigenvalues are the exception: if they lie along coordinates, they show in the first
Hessian-vector product, as clipped weights do. Those of the language models lay along coordinates too.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import language_models
import numpy as np
from families import eigenvalues

NEAR_ZERO = 1.5e-3  # the WinQ paper's threshold


@dataclass(frozen=True)
class Case:
    """A bulk of `families` with its size, largest outlier and share of zeros, or a Hessian of `language_models`."""

    family: str
    dimension: int
    radius: float | None = None
    zeros: float | None = None

    @property
    def label(self) -> str:
        if self.radius is None:
            return self.family.replace("-", " ").replace("bit", " bit")
        return f"{self.family}, R {self.radius:g}, {self.zeros:.0%} zeros, n {self.dimension:.0e}".replace("e+0", "e")

    def values(self, seed: int) -> np.ndarray:
        """The eigenvalues, (dimension,). Those of a bulk are drawn for each seed, those of a model are fixed."""
        if self.radius is None:
            return _language_models()[self.family].eigenvalues
        assert self.zeros is not None
        return eigenvalues(self.family, n=self.dimension, radius=self.radius, zeros=self.zeros, seed=seed)

    def probe_seed(self, seed: int) -> int:
        """The seed of the probe vectors, different for every case and seed."""
        return zlib.crc32(f"{self.label} {seed}".encode())


def bulks(
    families: Sequence[str], dimensions: Sequence[int], radii: Sequence[float], zeros: Sequence[float]
) -> list[Case]:
    return [
        Case(family, dimension, radius, share)
        for dimension, family, radius, share in itertools.product(dimensions, families, radii, zeros)
    ]


def language_model_cases() -> list[Case]:
    return [Case(name, len(spectrum.eigenvalues)) for name, spectrum in _language_models().items()]


def truths(values: np.ndarray) -> dict[str, float]:
    """Every quantity, computed from the eigenvalues."""
    squares, sizes, negative = values**2, np.abs(values), values < 0
    return {
        "negative_share": float(negative.mean()),
        "near_zero_share": float((sizes < NEAR_ZERO).mean()),
        "trace": float(values.sum()),
        "frobenius": float(np.sqrt(squares.sum())),
        "rms": float(np.sqrt(squares.mean())),
        "negative_energy_share": float(squares[negative].sum() / squares.sum()),
        "negative_magnitude_share": float(sizes[negative].sum() / sizes.sum()),
        "lambda_max": float(values.max()),
        "lambda_min": float(values.min()),
    }


_language_models = cache(language_models.load)
