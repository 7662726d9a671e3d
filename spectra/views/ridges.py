"""Densities one above another, a row for each training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.cells import DensityCells
from spectra.views.axis import eigenvalue_axis
from spectra.views.curves import Curve
from spectra.views.densities import cells_of, limits, read_cells
from spectra.views.legends import hatched_entry
from spectra.views.style import UNRESOLVED_HATCH, add_legend, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 16  # most training steps that are drawn
ROW_HEIGHT = 1.5  # of the highest density, in distances between rows


def draw_ridges(
    panels: Sequence[tuple[Axes, Sequence[Curve]]], *, level: float, scale: str, legend: str = "auto"
) -> None:
    """Draw densities one above another, in panels that share the axis of eigenvalues and the scale of heights.

    Args:
        panels: Axes, each with its curves, the first of which is drawn at the bottom.
        level: The probability with which all masses of a spectrum lie in their intervals.
        scale: Scale of the x axis; see `spectra.plots.density`.
        legend: Where the legends are; see `spectra.plots.density`.

    Raises:
        InputError: The scale is not known, or the level is not between 0 and 1.
    """
    from matplotlib.lines import Line2D

    thinned = [(ax, _thinned(curves)) for ax, curves in panels]
    axis = eigenvalue_axis([curve for _, curves in thinned for curve in curves], scale)
    found = [(ax, [(curve, cells_of(curve, axis, level=level)) for curve in curves]) for ax, curves in thinned]
    bottom, top = limits([cells for _, rows in found for _, cells in rows])
    for ax, rows in found:
        for row, (curve, cells) in enumerate(rows):
            _draw_row(ax, curve, cells, row, bottom, top)
            read_cells(ax, curve, curve.label, cells)
        axis.apply(ax)
        ax.set_ylim(-0.1, len(rows) - 1 + ROW_HEIGHT + 0.15 + 0.12 * len(rows))
        ax.set_yticks(range(len(rows)), [_name(curve) for curve, _ in rows])
        ax.set_ylabel("training step" if all(curve.step is not None for curve, _ in rows) else "")
        tidy(ax)
        hatched = any(np.any(~cells.resolved & (cells.high > 0)) for _, cells in rows)
        entries: list[Any] = [hatched_entry("not resolved: only the number inside is known")] if hatched else []
        entries.append(Line2D([], [], linestyle="", label=f"heights: density, {_power(bottom)} to {_power(top)}, log"))
        add_legend(ax, entries, [entry.get_label() for entry in entries], "none" if legend == "none" else "inside")


def _name(curve: Curve) -> str:
    """What stands beside a row."""
    if curve.step is None:
        return curve.label
    return f"{curve.step}" + (f"\n{curve.repeated}" if curve.repeated else "")


def _thinned(curves: Sequence[Curve]) -> list[Curve]:
    """At most `ROWS` of the curves, evenly spaced, with the first and the last."""
    chosen = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), ROWS)).round().astype(int))
    return [curves[index] for index in chosen]


def _draw_row(ax: Axes, curve: Curve, cells: DensityCells, row: int, bottom: float, top: float) -> None:
    """The cells of a spectrum above its base line; rows further down lie in front."""
    from matplotlib.collections import PolyCollection

    if not 0 < bottom < top:
        raise InputError("there is nothing to draw: no density has a height")
    scale = ROW_HEIGHT / math.log10(top / bottom)
    low, high = (row + scale * np.log10(np.maximum(side, bottom) / bottom) for side in cells.heights)
    left, right, base = cells.edges[:-1], cells.edges[1:], np.full(len(low), float(row))
    front = 3 - row / 100
    some = cells.high > 0
    known, other = some & cells.resolved, some & ~cells.resolved

    def boxes(under: np.ndarray, over: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
        corners = np.stack([np.stack([left, right, right, left], 1), np.stack([under, under, over, over], 1)], axis=2)
        return list(corners[chosen])

    add = ax.add_collection
    add(PolyCollection(boxes(base, high, some), facecolor="white", linewidth=0, alpha=0.8, zorder=front))
    add(PolyCollection(boxes(base, low, known), facecolor=curve.colour, alpha=0.45, linewidth=0, zorder=front))
    add(PolyCollection(boxes(low, high, known), facecolor=curve.colour, alpha=0.85, linewidth=0, zorder=front))
    hatched = {"facecolor": "none", "edgecolor": curve.colour, "hatch": UNRESOLVED_HATCH, "linewidth": 0.4}
    add(PolyCollection(boxes(low, high, other), alpha=0.7, zorder=front, **hatched))
    ax.plot([cells.edges[0], cells.edges[-1]], [row, row], color=curve.colour, linewidth=0.7, zorder=front)
    if cells.zero_share:
        ax.plot([0, 0], [row, row + ROW_HEIGHT * 0.9], color=curve.colour, linewidth=2, alpha=0.6, zorder=front)


def _power(number: float) -> str:
    """A number as a power of ten."""
    return f"$10^{{{round(math.log10(number))}}}$"
