"""Shares with and without reorthogonalisation, by the same probe vectors, beside the truth.

    python benchmarks/trust/finite_precision.py [--steps 400] [--dimension 4000] [--seeds 5]

On a diagonal operator the mass of a probe vector below zero is known, so its bracket is checked without sampling
error. Lanczos in finite precision acts like exact Lanczos on a larger matrix whose eigenvalues lie within rounding
error of the true ones (Greenbaum, Linear Algebra Appl. 113, 1989): converged eigenvalues get copies, which share their
weight.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from families import BULKS, OUTLIERS, eigenvalues
from tables import markdown

import spectra
from spectra.backend import random_vectors
from spectra.estimates.brackets import Bracket, bracket
from spectra.estimates.quadrature import gauss_rule


@dataclass(frozen=True)
class Comparison:
    """The mass of one probe vector below zero, and its brackets with and without reorthogonalisation.

    copies: without reorthogonalisation, the number of Ritz values within a relative 1e-6 of the largest eigenvalue.
    """

    truth: float
    full: Bracket
    none: Bracket
    copies: int

    @property
    def difference(self) -> float:
        """The distance of the middles of the brackets."""
        return abs(self.full.below + self.full.at / 2 - self.none.below - self.none.at / 2)

    def holds(self, found: Bracket) -> bool:
        """Whether the bracket contains the mass, up to the rounding error of the sum."""
        return found.below - 1e-10 <= self.truth <= found.below + found.at + 1e-10


def compare(values: np.ndarray, *, steps: int, seed: int) -> Comparison:
    op = spectra.DiagonalOperator(values)
    start = random_vectors.probe_vector(op, seed=seed, index=0)
    runs = {policy: spectra.lanczos(op, start, steps, reorthogonalize=policy) for policy in ("full", "none")}
    full, none = (bracket(run.alphas, run.betas, 0.0) for run in runs.values())
    nodes = gauss_rule(runs["none"].alphas, runs["none"].betas).nodes
    copies = int((np.abs(nodes - values.max()) < 1e-6 * values.max()).sum())
    return Comparison(float((start.numpy() ** 2)[values < 0].sum()), full, none, copies)


def line(family: str, found: list[Comparison]) -> list[str]:
    return [
        family,
        f"{max(one.difference for one in found):.4f}",
        f"{np.mean([one.full.at for one in found]):.4f}",
        f"{np.mean([one.none.at for one in found]):.4f}",
        f"{np.mean([one.holds(one.full) for one in found]):.2f}",
        f"{np.mean([one.holds(one.none) for one in found]):.2f}",
        f"{np.mean([one.copies for one in found]):.1f}",
    ]


HEADER = [
    "bulk",
    "largest difference of the middles",
    "width, with",
    "width, without",
    "holds the truth, with",
    "holds the truth, without",
    "Ritz values at the largest, without",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Shares with and without reorthogonalisation.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dimension", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--radius", type=float, default=27.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.steps} steps, n = {options.dimension:,}, R = {options.radius:g}, {options.seeds} probe vectors each"
    )
    for title, first in (("with 40 outliers", 0), ("without the outliers, which `resolve` deflates", OUTLIERS)):
        found: dict[str, list[Comparison]] = {}
        for family, seed in itertools.product(BULKS, range(options.seeds)):
            values = eigenvalues(family, n=options.dimension, radius=options.radius, zeros=0.0, seed=seed)
            found.setdefault(family, []).append(compare(values[first:], steps=options.steps, seed=seed))
        print(f"\n{title}\n\n" + markdown(HEADER, [line(family, of_family) for family, of_family in found.items()]))
        largest = max(one.difference for of_family in found.values() for one in of_family)
        print(f"\nlargest difference of the negative share's middle: {largest:.4f}")


if __name__ == "__main__":
    main()
