"""Draw the figures of the README and of docs/speed.md beside this file.

    python docs/figures.py [--study FOLDER]

--study is the folder that `make demo` wrote, runs/demo; docs/negative-share-in-training.svg and docs/density.svg show
its spectra. `make bench-trust FIGURE=docs/trust.png` draws the figure of docs/trust.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

import spectra
from spectra.estimates.estimate import CONFIDENCE
from spectra.views.curves import Curve, curves_of
from spectra.views.densities import draw_densities

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "speed" / "results"
# From the palette of Okabe and Ito (Color Universal Design, 2008).
COUNTED, OURS, TRUTH = "#D55E00", "#0072B2", "#000000"


def save(figure: Figure, name: str) -> None:
    """Save as SVG on a white ground, which reads in print and on a dark page, and without a date."""
    path = DOCS / name
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    path.write_text(re.sub(r" +$", "", text, flags=re.MULTILINE), encoding="utf-8")


# The README's figure: readings of a share whose truth is known.


class Reading(NamedTuple):
    """A row of the figure: a value from each probe vector, or one estimate with its interval."""

    label: str
    products: int  # Hessian-vector products spent
    values: np.ndarray | None = None
    estimate: spectra.Estimate | None = None


def known_eigenvalues() -> np.ndarray:
    """A heavy-tailed bulk of 20,000 eigenvalues near zero and 40 outliers up to 27, as in the README."""
    random = np.random.default_rng(0)
    return np.concatenate([0.01 * random.standard_t(2.5, 20_000) + 0.002, random.uniform(1, 27, 40)])


def count_nodes(operator: spectra.LinearOperator, *, probes: int, steps: int) -> Reading:
    """The weight of the nodes below zero, a value from each probe vector."""
    density = spectra.slq(operator, probes=probes, steps=steps)
    counted = (density.weights * (density.nodes < 0)).sum(axis=1)
    return Reading(f"nodes counted: {probes} probe vectors, {steps} steps", probes * steps, values=counted)


def readings(operator: spectra.LinearOperator) -> list[Reading]:
    """Three counts of nodes, which have no interval, then three estimates, which have one."""
    found = [count_nodes(operator, probes=probes, steps=steps) for probes, steps in ((4, 60), (20, 60), (10, 100))]
    for deflate, label in ((0, "slq(probes=4, steps=60)"), (20, "slq(probes=4, steps=60, deflate=20)")):
        before = operator.products
        share = spectra.slq(operator, probes=4, steps=60, deflate=deflate).negative_share()
        found.append(Reading(label, operator.products - before, estimate=share))
    share = spectra.resolve(operator, share="negative", half_width=0.05)
    assert share.products is not None
    return [*found, Reading("resolve(half_width=0.05)", share.products, estimate=share)]


def negative_share() -> None:
    """Draw the readings against the truth."""
    values = known_eigenvalues()
    truth = float((values < 0).mean())
    rows = readings(spectra.DiagonalOperator(values))
    figure, ax = pyplot.subplots(figsize=(8.6, 3.7), layout="constrained")
    ax.axvline(truth, color=TRUTH, linewidth=1.5, label=f"truth: {truth:.3f}")
    for height, (_, _, counted, share) in enumerate(reversed(rows)):
        if counted is not None:
            label = "weight of nodes below zero, a point per probe vector" if height == 3 else None
            ax.plot(counted, np.full(len(counted), height), "o", color=COUNTED, alpha=0.6, label=label)
        if share is not None:
            label = "95 % interval" if share.resolved else None
            ax.plot(
                [share.low, share.high],
                [height, height],
                color=OURS,
                linewidth=4,
                alpha=0.6,
                solid_capstyle="butt",
                label=label,
            )
            face, label = (OURS, None) if share.resolved else ("white", "value, unresolved" if height == 1 else None)
            ax.plot(share.value, height, "o", color=OURS, markerfacecolor=face, markersize=7, label=label)
    ax.set_yticks(range(len(rows)), [f"{row.label}\n{row.products:,} HVPs" for row in reversed(rows)])
    ax.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), xlabel="share of eigenvalues below zero")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, columnspacing=1.2, handletextpad=0.5, fontsize=9)
    save(figure, "negative-share.svg")


# The README's figures of a study: the negative share along the training, and the densities at its end.


def trajectory(study: Path) -> None:
    """Draw the share of negative eigenvalues along the training of every run of a study."""
    figure, ax = pyplot.subplots(figsize=(8, 4), layout="constrained")
    spectra.plots.trajectory(spectra.Run(study), "negative_share", ax=ax)
    save(figure, "negative-share-in-training.svg")


def last_curves(name: str, runs: list[spectra.Run]) -> list[Curve]:
    """The last density of each run, labelled without the name of the panel and with the share of exact zeros."""
    curves = []
    for run, curve in zip(runs, curves_of(runs, steps="last"), strict=True):
        zeros = f", {curve.density.zero_share():.0%} at 0" if curve.density.zero_share() else ""
        curves.append(replace(curve, label=run.presentation.label.removeprefix(f"{name} ") + zeros))
    return curves


def densities(study: Path) -> None:
    """Draw the last density of every run of a study, with the full-precision one in each panel."""
    groups: dict[str, list[spectra.Run]] = {}
    references: list[spectra.Run] = []
    for run in spectra.Run(study).runs:
        shown = run.presentation
        (references if shown.reference else groups.setdefault(shown.group, [])).append(run)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(3.8 * len(groups), 3.5), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    draw_densities(
        [(ax, last_curves(name, runs + references)) for ax, (name, runs) in zip(axes[0], groups.items(), strict=True)],
        level=CONFIDENCE,
        legend="inside",
    )
    for ax, name in zip(axes[0], groups, strict=True):
        ax.set_title(name, loc="left", fontsize=11)
        ax.label_outer()
    save(figure, "density.svg")


# The figure of docs/speed.md: the time of a spectral density beside other libraries.

# A row of the figure, and the tables that its points come from. Times are relative to spectra's in the same table.
SETUPS = {
    "3k parameters, CPU": ["cpu-3k.md"],
    "1M parameters, CPU": ["cpu-1M-density.md"],
    "12M parameters, H200": ["h200-12M.md"],
    "124M parameters, H200": ["h200-124M.md"],
    "1.2B parameters, H200": ["h200-1.2B.md", "h200-1.2B-curvlinops.md"],
}
LIBRARIES = {
    "pyhessian": ("PyHessian", "s", "#009E73"),
    "hessian-eigenthings": ("hessian-eigenthings", "D", "#E69F00"),
    "curvlinops": ("curvlinops", "^", "#CC79A7"),
}
DENSITY_TABLE = re.compile(r"^\*\*density\.\*\*.*?\n\n(.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)


def quickest(tables: list[str]) -> dict[str, float]:
    """The time of a density by each library's quickest function, as a multiple of spectra's."""
    found: dict[str, float] = {}
    for name in tables:
        table = DENSITY_TABLE.search((RESULTS / name).read_text(encoding="utf-8"))
        assert table, name
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.group(1).splitlines()
        ]
        column = header.index("times ours")
        for row in rows:
            if row[0] in LIBRARIES and len(row) > column and re.fullmatch(r"[\d.]+", row[column]):
                found[row[0]] = min(float(row[column]), found.get(row[0], float("inf")))
    return found


def speed() -> None:
    """Draw a row for each setup, on a logarithmic axis."""
    figure, ax = pyplot.subplots(figsize=(8, 3), layout="constrained")
    handles = {"spectra": ax.axvline(1, color=OURS, linewidth=3)}
    for height, tables in enumerate(reversed(SETUPS.values())):
        for library, ratio in quickest(tables).items():
            label, marker, color = LIBRARIES[library]
            (handles[label],) = ax.plot(ratio, height, marker, color=color, markersize=8)
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20, 30], ["1", "2", "5", "10", "20", "30"])
    ax.minorticks_off()
    ax.set_yticks(range(len(SETUPS)), list(reversed(SETUPS)))
    ax.set(xlim=(0.9, 35), ylim=(-0.5, len(SETUPS) - 0.5), xlabel="time of a density, as a multiple of spectra's")
    ax.grid(axis="x", color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    save(figure, "speed.svg")


def main() -> None:
    """Draw them all, those of a study only where one is given."""
    parser = argparse.ArgumentParser(description="Draw the figures of the README and of docs/speed.md.")
    parser.add_argument("--study", type=Path, help="the folder of `make demo`, for the figures of a study")
    study = parser.parse_args().study
    negative_share()
    speed()
    if study is not None:
        trajectory(study)
        densities(study)


if __name__ == "__main__":
    main()
