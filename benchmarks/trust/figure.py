"""The figure of docs/trust.md: the true negative share, our interval, node counts and other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tables import grouped
from ways import RECIPE, RESOLVE, SAME, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the palette of Okabe and Ito (Color Universal Design, 2008). The shapes differ too.
INTERVAL, TRUTH = "#0072B2", "#000000"
OTHERS = {
    f"hard count, {SAME}": ("node count", "o", "#D55E00"),
    f"PyHessian, {SAME}": ("PyHessian", "s", "#009E73"),
    f"curvlinops, {SAME}": ("curvlinops", "^", "#CC79A7"),
    f"hard count, {RECIPE}": ("WinQ paper's recipe (20 x 60)", "D", "#E69F00"),
}
TRUE, RESOLVED, UNRESOLVED = "truth", "spectra.resolve", "spectra.resolve (unresolved)"
LEGEND = (TRUE, RESOLVED, UNRESOLVED, *(label for label, _, _ in OTHERS.values()))
OFFSET = 0.16  # between the points of one row, so that they do not overlap


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a row for each family: bulks on the left, a panel for each share of zeros, language models on the right.

    Of the bulks, those with the smallest radius and the largest size are drawn. Intervals and points are means over
    seeds; the bars of the points are one standard deviation.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = [row for row in rows if row["quantity"] == "negative_share"]
    trained = models(shares)
    columns = [bulk_panels(shares), [("trained language models", trained)] if trained else []]
    columns = [column for column in columns if column]
    tallest = max(sum(len(families) + 2 for _, families in column) for column in columns)
    figure = pyplot.figure(figsize=(0.6 + 5.6 * len(columns), 1.4 + 0.42 * tallest), layout="constrained")
    grid = figure.add_gridspec(1, len(columns))
    for place, column in enumerate(columns):
        cells = grid[place].subgridspec(len(column), 1, height_ratios=[len(families) for _, families in column])
        for cell, (title, families) in enumerate(column):
            panel(figure.add_subplot(cells[cell]), title, families)
    handles = {}
    for ax in figure.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    labels = [label for label in LEGEND if label in handles]
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=2 * len(columns), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def bulk_panels(rows: Sequence[Row]) -> list[tuple[str, dict[str, list[Row]]]]:
    """For the smallest and the largest share of zeros, the rows by bulk."""
    bulks = [row for row in rows if row["radius"] is not None]
    if not bulks:
        return []
    radius, size = min(row["radius"] for row in bulks), max(row["dimension"] for row in bulks)
    chosen = [row for row in bulks if row["radius"] == radius and row["dimension"] == size]
    panels = []
    for zeros in sorted({min(row["zeros"] for row in chosen), max(row["zeros"] for row in chosen)}):
        title = f"constructed, n = {size:,}, R = {radius:g}, {zeros:.0%} exact zeros"
        panels.append((title, grouped([row for row in chosen if row["zeros"] == zeros], lambda row: row["family"])))
    return panels


def models(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return grouped([row for row in rows if row["radius"] is None], lambda row: row["label"])


def panel(ax: Axes, title: str, families: dict[str, list[Row]]) -> None:
    for place, group in enumerate(families.values()):
        truth = np.mean([row["truth"] for row in group])
        ax.plot([truth, truth], [place - 0.42, place + 0.42], color=TRUTH, linewidth=2.2, label=TRUE, zorder=3)
        ours = [row for row in group if row["way"] == RESOLVE]
        if ours:
            low, high = (np.mean([row[end] for row in ours]) for end in ("low", "high"))
            resolved = np.mean([row["resolved"] for row in ours]) > 0.5
            ax.barh(
                place,
                high - low,
                left=low,
                height=0.72,
                color=INTERVAL if resolved else "none",
                edgecolor=INTERVAL,
                alpha=0.45 if resolved else 0.9,
                hatch=None if resolved else "////",
                linewidth=1.0,
                label=RESOLVED if resolved else UNRESOLVED,
                zorder=1,
            )
        for turn, (way, (label, marker, colour)) in enumerate(OTHERS.items()):
            values = [row["value"] for row in group if row["way"] == way]
            if not values:
                continue
            ax.errorbar(
                np.mean(values),
                place + OFFSET * (turn - (len(OTHERS) - 1) / 2),
                xerr=np.std(values),
                fmt=marker,
                color=colour,
                markeredgecolor="white",
                markeredgewidth=0.5,
                markersize=6,
                elinewidth=1.2,
                label=label,
                zorder=4,
            )
    ax.set_yticks(range(len(families)), list(families))
    ax.set_ylim(len(families) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("share of negative eigenvalues")
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
