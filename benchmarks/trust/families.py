"""Spectra that are known by construction: outliers, a bulk, and zeros, on a diagonal operator.

Probe vectors are uniform on the sphere, so the distribution of an estimate depends on the eigenvalues alone, and a
diagonal operator stands for every operator with its spectrum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

OUTLIERS = 40
BULK_RMS = 5e-3


def _log_uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    """Magnitudes uniform in their logarithm over four decades, 40 % negative."""
    return 10 ** rng.uniform(-4, 0, size=n) * np.where(rng.random(n) < 0.4, -1, 1)


def _log_normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(2.3 * rng.normal(size=n)) * np.where(rng.random(n) < 0.4, -1, 1)


BULKS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gauss": lambda rng, n: rng.normal(size=n) + 0.2,
    "laplace": lambda rng, n: rng.laplace(size=n) + 0.15,
    "student": lambda rng, n: rng.standard_t(2.5, size=n) + 0.2,
    "gamma": lambda rng, n: rng.gamma(2.0, size=n) - 0.8,
    "semicircle": lambda rng, n: 2 * rng.beta(1.5, 1.5, size=n) - 0.9,
    "log-normal": _log_normal,
    "log-uniform": _log_uniform,
}
ORDINARY = ("gauss", "laplace", "student", "gamma")  # the bulks whose negative share has to be resolved


def eigenvalues(bulk: str, *, n: int, radius: float, zeros: float, seed: int) -> np.ndarray:
    """n eigenvalues: a share `zeros` exactly 0, 40 outliers, the rest from the bulk at a root mean square of .005.

    The magnitudes of the outliers go from .3 to `radius`; every eighth is negative, with .3 times the magnitude.
    """
    rng = np.random.default_rng(seed)
    values = BULKS[bulk](rng, n)
    values *= BULK_RMS / np.sqrt(np.mean(values**2))
    values[rng.random(n) < zeros] = 0.0
    signs = np.where(np.arange(OUTLIERS) % 8 == 3, -0.3, 1.0)
    values[:OUTLIERS] = np.geomspace(0.3, radius, OUTLIERS) * signs
    return values
