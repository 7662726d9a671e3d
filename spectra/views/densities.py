"""The density of eigenvalues as a histogram whose cells have the mass that is known to be inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.estimates.cells import DensityCells, density_cells
from spectra.views import marks
from spectra.views.axis import EigenvalueAxis, eigenvalue_axis, ends_of
from spectra.views.curves import Curve
from spectra.views.legends import curve_legend, hatched_entry
from spectra.views.style import TEXT_COLOUR, UNRESOLVED_HATCH, tidy
from spectra.views.wording import share_in_words, typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROWEST = 64  # cells along the axis, from which wider ones are merged
WIDE = 0.07  # part of the axis from which a cell has room for words
MOST_LABELLED = 1  # curves in axes, up to which unresolved cells say their mass
MOST_TICKS = 200  # known eigenvalues that are marked one by one


def draw_densities(
    panels: Sequence[tuple[Axes, Sequence[Curve]]], *, level: float, scale: str = "auto", legend: str = "auto"
) -> None:
    """Draw densities in panels that share their range and scale.

    Args:
        panels: Axes, each with the curves to draw on it.
        level: The probability with which all masses of a spectrum lie in their intervals.
        scale: Scale of the x axis; see `spectra.plots.density`.
        legend: Where the legends are; see `spectra.plots.density`.

    Raises:
        InputError: The scale is not known, or the level is not between 0 and 1.
    """
    axis = eigenvalue_axis([curve for _, members in panels for curve in members], scale)
    found = [(ax, [(curve, cells_of(curve, axis, level=level)) for curve in members]) for ax, members in panels]
    bottom, top = limits([cells for _, members in found for _, cells in members])
    for ax, members in found:
        ax.set_yscale("log")
        ax.set_ylim(bottom, top)
        axis.apply(ax)
        for curve, cells in members:
            with marks.series(ax, curve.label):
                _draw_cells(ax, curve, cells, bottom)
                _mark_known(ax, curve, bottom)
                if len(members) <= MOST_LABELLED:
                    _name_masses(ax, curve, cells, axis, bottom)
            read_cells(ax, curve, curve.label, cells)
        for position, (curve, cells) in enumerate(members):
            with marks.series(ax, curve.label):
                _draw_zeros(ax, curve, cells, position, count=len(members))
        ax.set_ylabel("density of eigenvalues")
        tidy(ax)
        hatched = any(np.any(~cells.resolved & (cells.high > 0)) for _, cells in members)
        further = [hatched_entry("not resolved: only the number inside is known")] if hatched else []
        named = [curve for curve, _ in members] if len(members) > 1 or members[0][0].label != "spectrum" else []
        curve_legend(ax, named, place=legend, further=further)


def cells_of(curve: Curve, axis: EigenvalueAxis, *, level: float) -> DensityCells:
    """The cells of a spectrum, from its smallest to its largest eigenvalue, with narrowest cells of the axis's spacing.

    Args:
        curve: The spectrum.
        axis: The axis that shows it.
        level: The probability with which all masses lie in their intervals.

    Returns:
        The cells.
    """
    low, high = ends_of(curve)
    high = float(np.nextafter(high, math.inf))  # so that a cell, which is open on the right, holds the largest one
    spacing = axis.between(axis.low, axis.high, NARROWEST + 1)
    inner = np.append(spacing, 0.0)
    edges = np.unique(np.concatenate([[low], inner[(inner > low) & (inner < high)], [high]]))
    return density_cells(curve.density, edges, positions=axis.positions(edges), level=level)


def read_cells(ax: Axes, curve: Curve, name: str, cells: DensityCells) -> None:
    """Note how many eigenvalues lie in each cell.

    Args:
        ax: The axes.
        curve: The spectrum.
        name: What the readings call it.
        cells: Its cells.
    """
    n, edges = curve.density.dimension, cells.edges
    says = []
    for low, high, resolved, *ends in zip(cells.low, cells.high, cells.resolved, edges[:-1], edges[1:], strict=True):
        left, right = (typeset(f"{end:.3g}") for end in ends)
        says.append(f"{share_in_words(low, high, n)} in {left} … {right}" + ("" if resolved else ", not resolved"))
    marks.read(ax, name, curve.colour, edges, [*says, ""], axis="λ = ", cells=True)


def limits(found: Sequence[DensityCells]) -> tuple[float, float]:
    """The heights that the y axis shows, so that every cell is seen."""
    tops = np.concatenate([cells.heights[1] for cells in found])
    tops = tops[(tops > 0) & np.isfinite(tops)]  # the cell of a single value has no width
    if not len(tops):
        return 0.1, 10.0
    highest, lowest = float(tops.max()), float(tops.min())
    lowest = max(lowest, 1e-14 * highest)
    return 10.0 ** math.floor(math.log10(lowest) - 0.3), 4 * highest


def _draw_cells(ax: Axes, curve: Curve, cells: DensityCells, bottom: float) -> None:
    """A box for each cell: filled between the bounds of its mean density, with a line, or hatched if unresolved."""
    from matplotlib.collections import PolyCollection

    low, high = (np.maximum(heights, bottom) for heights in cells.heights)
    left, right = cells.edges[:-1], cells.edges[1:]
    boxes = np.stack([np.stack([left, right, right, left], 1), np.stack([low, low, high, high], 1)], axis=2)
    some = cells.high > 0
    known, other = some & cells.resolved, some & ~cells.resolved
    fill = {"facecolor": curve.colour, "alpha": 0.3 * curve.opacity, "linewidth": 0}
    ax.add_collection(PolyCollection(list(boxes[known]), hatch=curve.hatch or None, **fill))
    hatched = {"facecolor": "none", "edgecolor": curve.colour, "hatch": UNRESOLVED_HATCH, "linewidth": 0.5}
    ax.add_collection(PolyCollection(list(boxes[other]), alpha=0.55 * curve.opacity, **hatched))
    xs, ys = _steps(cells.edges, np.where(known, np.sqrt(low * high), np.nan))
    ax.plot(xs, ys, linewidth=1.5, label=curve.label, **curve.style)
    if curve.marker:
        ax.plot(_middles(cells)[known], np.sqrt(low * high)[known], curve.marker, color=curve.colour, markersize=3.5)


def _steps(edges: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a line that is level in each cell, and broken where a height is NaN."""
    return np.repeat(edges, 2)[1:-1], np.repeat(heights, 2)


def _middles(cells: DensityCells) -> np.ndarray:
    """The middles of the cells, (c,)."""
    return (cells.edges[1:] + cells.edges[:-1]) / 2


def _name_masses(ax: Axes, curve: Curve, cells: DensityCells, axis: EigenvalueAxis, bottom: float) -> None:
    """Write the mass known to be inside into the wide unresolved cells, and "not resolved" into the widest."""
    positions = axis.positions(cells.edges)
    spans = np.diff(positions) / float(np.diff(axis.positions(np.array([axis.low, axis.high])))[0])
    open_ = ~cells.resolved & (cells.high > 0)
    if not open_.any():
        return
    n, widest = curve.density.dimension, int(np.where(open_, spans, 0).argmax())
    for cell in np.flatnonzero(open_ & ((spans >= WIDE) | (np.arange(len(spans)) == widest))):
        middle = (positions[cell] + positions[cell + 1]) / 2
        x = middle if axis.threshold is None else axis.threshold * np.sinh(middle)
        low, high = (max(float(heights[cell]), bottom) for heights in cells.heights)
        words = share_in_words(cells.low[cell], cells.high[cell], n) + ("\nnot resolved" if cell == widest else "")
        turned = 90 if spans[cell] < 0.16 else 0
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        about = {"ha": "center", "va": "center", "fontsize": 7, "color": TEXT_COLOUR, "rotation": turned, "bbox": box}
        ax.text(x, math.sqrt(low * high), words, clip_on=True, **about)


def _mark_known(ax: Axes, curve: Curve, bottom: float) -> None:
    """A tick at the bottom for every eigenvalue that is known one by one, if they are few."""
    known = curve.density.measure.known
    values = known.values[known.values != 0]
    if 0 < len(values) <= MOST_TICKS:
        ax.plot(values, np.full(len(values), bottom), "|", color=curve.colour, markersize=9, alpha=0.8, clip_on=True)


def _draw_zeros(ax: Axes, curve: Curve, cells: DensityCells, position: int, *, count: int) -> None:
    """A bar at zero for the eigenvalues that are known to be zero, with an arrow and their share."""
    if cells.zero_share == 0:
        return
    height = 0.97 - 0.065 * (position % 8)  # of the axes
    mark: dict[str, Any] = {"color": curve.colour, "transform": ax.get_xaxis_transform(), "clip_on": False}
    ax.plot([0, 0], [0, height], linewidth=2.4, alpha=0.55, solid_capstyle="butt", zorder=2.5, **mark)
    ax.plot([0], [height], marker="^", markersize=6, linestyle="", zorder=2.6, **mark)
    if count <= MOST_LABELLED:
        words = f"   {100 * cells.zero_share:.3g} % exactly 0"
        ax.text(0, height, words, transform=ax.get_xaxis_transform(), fontsize=7.5, color=curve.colour, va="center")
