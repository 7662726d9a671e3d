"""Coverage of the whole cumulative curve by `SpectralDensity.band`, on spectra that are known, over many seeds.

    python benchmarks/trust/band.py [--seeds 200] [--dimension 2000] [--families gauss,...] [--out FILE]
    python benchmarks/trust/band.py --figures [--seeds 40]
    python benchmarks/trust/band.py --read FILE [FILE ...]

A band covers a spectrum if the share of eigenvalues below t lies inside at every t. Each spectrum is measured once with
4 probe vectors of 100 Lanczos steps. Smaller measurements are the first part of this one. --out gets a line for each
spectrum and seed as results come; a run that was interrupted can be read with --read. --figures takes the bands that
figures draw (`tails=True`), and asks whether the mass of every cell of the density lies in its interval too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, bulks, language_model_cases
from families import BULKS
from tables import markdown

import spectra
from spectra.estimates.band import CumulativeBand, simultaneous_error
from spectra.estimates.estimate import CONFIDENCE
from spectra.views.axis import eigenvalue_axis
from spectra.views.curves import curves_of
from spectra.views.densities import cells_of

SIZES = ((2, 20), (4, 60), (4, 100))  # probe vectors, Lanczos steps
MODELS = ("1bit-ste-before-reset", "4bit-latent-before-reset")
HEADER = ["spectrum", "probe vectors x steps", "covered", "half-width, mean over the eigenvalues", "half-width at 0"]

Row = dict[str, Any]


def cases(families: list[str], dimension: int) -> list[Case]:
    """The bulks with a radius of 27, two of them with 43 % zeros too, and two Hessians of language models."""
    found = bulks([name for name in families if name in BULKS], [dimension], [27.0], [0.0])
    found += bulks([name for name in families if name in ("gauss", "laplace")], [dimension], [27.0], [0.43])
    return found + [case for case in language_model_cases() if case.family in MODELS and case.family in families]


def beginning(density: spectra.SpectralDensity, probes: int, steps: int) -> spectra.SpectralDensity:
    """The density from the first probe vectors and the first Lanczos steps alone."""
    return spectra.SpectralDensity(
        density.dimension,
        density.alphas[:probes, :steps],
        density.betas[:probes, :steps],
        np.minimum(density.lengths[:probes], steps),
        density.atoms,
        density.counts,
        density.atom_residuals,
        rounding_error=density.rounding_error,
        seed=density.seed,
    )


def covers(band: CumulativeBand, values: np.ndarray) -> bool:
    """Whether the share of the sorted values below t lies in the band at every t.

    It is enough to test the thresholds: between two of them the band has the lower bound of the left one and the upper
    bound of the right one, and the share never falls.
    """
    truth = np.searchsorted(values, band.thresholds, side="left") / len(values)
    return bool(np.all((band.low <= truth) & (truth <= band.high)))


def cells_hold(density: spectra.SpectralDensity, values: np.ndarray) -> bool:
    """Whether the true mass of every cell of the figure of a density lies in its interval."""
    (curve,) = curves_of(density)
    cells = cells_of(curve, eigenvalue_axis([curve], "auto"), level=CONFIDENCE)
    others = values[values != 0] if cells.zero_share else values
    truth = np.diff(np.searchsorted(others, cells.edges)) / len(values)
    rounding = 1e-12
    return bool(np.all((cells.low <= truth + rounding) & (truth <= cells.high + rounding)))


def measure(case: Case, seed: int, *, figures: bool = False) -> list[Row]:
    """A row for each size of the measurement."""
    values = np.sort(case.values(seed))
    probes, steps = SIZES[-1]
    whole = spectra.slq(spectra.DiagonalOperator(values), probes=probes, steps=steps, seed=case.probe_seed(seed))
    rows = []
    for size in SIZES:
        density = beginning(whole, *size)
        band = density.band(tails=figures)
        (low, high), (low_at_0, high_at_0) = band.at(values), band.at(np.zeros(1))
        rows.append(
            {
                "label": case.label,
                "seed": seed,
                "size": list(size),
                "covered": covers(band, values) and (not figures or cells_hold(density, values)),
                "half_width": float(np.mean(high - low)) / 2,
                "half_width_at_0": float(high_at_0[0] - low_at_0[0]) / 2,
            }
        )
    return rows


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """A line of the table for each spectrum and size."""
    for label in dict.fromkeys(row["label"] for row in rows):
        for size in SIZES:
            found = [row for row in rows if row["label"] == label and tuple(row["size"]) == size]
            mean = {name: np.mean([row[name] for row in found]) for name in ("half_width", "half_width_at_0")}
            covered = f"{sum(row['covered'] for row in found)} of {len(found)}"
            yield [
                label,
                f"{size[0]} x {size[1]}",
                covered,
                f"{mean['half_width']:.4f}",
                f"{mean['half_width_at_0']:.4f}",
            ]


def sampling_coverage(dimension: int, probes: int, *, level: float, draws: int) -> float:
    """How often the masses of uniform unit vectors stay within the simultaneous error at all thresholds."""
    rng, inside = np.random.default_rng(0), 0
    shares = np.arange(1, dimension + 1) / dimension
    for _ in range(draws):
        squares = rng.normal(size=(probes, dimension)) ** 2
        masses = (squares / squares.sum(axis=1, keepdims=True)).mean(axis=0).cumsum()
        inside += bool(np.abs(masses - shares).max() <= simultaneous_error(dimension, probes, level))
    return inside / draws


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the whole cumulative curve.")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--dimension", type=int, default=2000, help="of the constructed spectra")
    parser.add_argument("--families", default=",".join([*BULKS, *MODELS]))
    parser.add_argument("--draws", type=int, default=20_000, help="draws of the sampling error alone; 0 for none")
    parser.add_argument("--out", type=Path, help="file for every row, as lines of JSON")
    parser.add_argument("--read", type=Path, nargs="+", help="read earlier --out files instead of measuring")
    parser.add_argument("--figures", action="store_true", help="the bands and cells that figures draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read:
        rows = [json.loads(line) for path in options.read for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        rows = []
        with open(options.out or os.devnull, "w", encoding="utf-8") as file:
            for case in cases(options.families.split(","), options.dimension):
                for seed in range(options.seeds):
                    found = measure(case, seed, figures=options.figures)
                    file.writelines(json.dumps(row) + "\n" for row in found)
                    rows += found
    print(markdown(HEADER, list(lines(rows))))
    for probes in (2, 4) if options.draws else ():
        covered = sampling_coverage(options.dimension, probes, level=0.95, draws=options.draws)
        print(
            f"\nsampling error alone, n = {options.dimension:,}, {probes} probe vectors, {options.draws:,} draws: "
            f"{covered:.4f} covered"
        )


if __name__ == "__main__":
    main()
