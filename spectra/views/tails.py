"""How many eigenvalues lie above t, and below -t, as bands on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.cells import RESOLVED_RATIO
from spectra.estimates.quantities import EIGENVALUE_UNIT
from spectra.estimates.sharp_band import sharp_band
from spectra.views import marks
from spectra.views.axis import ends_of
from spectra.views.cumulative import without_level_parts
from spectra.views.curves import Curve
from spectra.views.legends import curve_legend
from spectra.views.style import MARKERS_ALONG, PALETTE, TEXT_COLOUR, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDES = ("both", "above", "below")
DECADES, PER_DECADE = 8, 40  # of the sizes at which tails are computed, below the largest eigenvalue
FEWEST = 0.6  # where the axis of counts starts
PLATEAU = 0.85  # of the number of eigenvalues on one side: the axis starts a little before this part is left


@dataclass(frozen=True)
class Tail:
    """Bounds on the number of eigenvalues beyond sizes t.

    Attributes:
        sizes: (p,) ascending t, each threshold three times: just below, at it, just above.
        low: (p,) lower bounds of the number of eigenvalues beyond t.
        high: (p,) upper bounds.
        total: The number of all eigenvalues.
    """

    sizes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    total: int


def tail_of(curve: Curve, *, above: bool, level: float) -> Tail:
    """The number of eigenvalues at or above t, or below -t.

    Args:
        curve: The spectrum.
        above: Which of the two.
        level: The probability with which the bounds hold, for all t and both sides at once.

    Returns:
        The bounds at many sizes t up to the end of the spectrum.
    """
    low_end, high_end = ends_of(curve)
    end, n = high_end if above else -low_end, curve.density.dimension
    if end <= 0:
        return Tail(np.zeros(0), np.zeros(0), np.zeros(0), n)
    spaced = max(high_end, -low_end) * np.logspace(-DECADES, 0, DECADES * PER_DECADE + 1)
    band = sharp_band(curve.density, level=level, thresholds=np.concatenate([-spaced, spaced]))
    corners = band.thresholds if above else -band.thresholds
    corners = corners[(corners > 0) & (corners <= end)]
    sizes = np.unique(np.concatenate([corners, np.nextafter(corners, 0), np.nextafter(corners, np.inf)]))
    below, up_to = band.at(sizes if above else -sizes)
    low, high = (n - n * up_to, n - n * below) if above else (n * below, n * up_to)
    return Tail(sizes, np.round(low, 6), np.round(high, 6), n)  # counts are whole where they are known


def draw_tails(ax: Axes, curves: Sequence[Curve], *, level: float, side: str, legend: str) -> None:
    """Draw the numbers of eigenvalues above t, below -t, or both.

    Args:
        ax: The axes.
        curves: What to draw.
        level: The probability with which each band holds its curve.
        side: See `spectra.plots.tails`.
        legend: Where the legend is; see `spectra.plots.tails`.

    Raises:
        InputError: The side is not known, there is nothing on it, or the level is not between 0 and 1.
    """
    if side not in SIDES:
        raise InputError(f"expected a side of {', '.join(SIDES)}, got {side!r}")
    shown = [variant for curve in curves for variant in _sides(curve, side, alone=len(curves) == 1)]
    tails = [(curve, tail_of(curve, above=above, level=level)) for curve, above in shown]
    drawn = [(curve, tail) for curve, tail in tails if len(tail.sizes)]
    if not drawn:
        raise InputError(f"no spectrum has eigenvalues {'beyond' if side == 'both' else side} 0: draw another side")
    start = min(_start(tail) for _, tail in drawn)
    end = max(tail.sizes[-1] for _, tail in drawn)
    alone = len(curves) == 1
    for position, (curve, tail) in enumerate(drawn):
        name = curve.label if alone or side != "both" else curve.label.rpartition(", ")[0]
        with marks.series(ax, name):
            _draw_tail(ax, curve, _from(tail, start), position=position, count=len(drawn))
        _read_tail(ax, curve, tail, name, points=np.geomspace(start, end, marks.POINTS))
    ax.set(xscale="log", yscale="log")
    ax.set_xlim(start, 1.15 * end)
    ax.set_ylim(FEWEST, 1.5 * max(tail.high[np.searchsorted(tail.sizes, start) :].max(initial=1) for _, tail in drawn))
    ax.set_xlabel(f"t ({EIGENVALUE_UNIT})")
    words = {"both": "beyond ±t", "above": "above t", "below": "below −t"}[side]
    ax.set_ylabel(f"number of eigenvalues {words} ({100 * level:g}\u00a0%\u00a0band)")
    tidy(ax)
    named = [replace(curve, step=None, repeated="") for curve, _ in drawn if curve.label != "spectrum"]
    further = [] if alone or side != "both" else [_line_entry("above t", "solid"), _line_entry("below −t", "dashed")]
    if further:
        named = [replace(curve, step=None, repeated="") for curve in curves]
    curve_legend(ax, named, place=legend, further=further)


def _line_entry(label: str, line: str) -> Any:
    """An entry that says what a line stands for."""
    from matplotlib.lines import Line2D

    looks: dict[str, Any] = {"color": TEXT_COLOUR, "linewidth": 1.2, "linestyle": line}
    return Line2D([], [], label=label, **looks)


def _sides(curve: Curve, side: str, *, alone: bool) -> list[tuple[Curve, bool]]:
    """The curve for each of its tails: what is below -t is hatched, dashed, and in another colour if there is one."""
    found = []
    name = "" if alone and curve.label == "spectrum" else f"{curve.label}, "
    if side in ("both", "above"):
        found.append((replace(curve, label=f"{name}above t" if side == "both" else curve.label), True))
    if side in ("both", "below"):
        style = curve.style | ({"linestyle": "dashed"} if side == "both" else {})
        if side == "both" and alone:
            style |= {"color": PALETTE[1]}
        label = f"{name}below −t" if side == "both" else curve.label
        hatch = "\\\\\\\\" if side == "both" else curve.hatch
        found.append((replace(curve, label=label, style=style, hatch=hatch), False))
    return found


def _draw_tail(ax: Axes, curve: Curve, tail: Tail, *, position: int, count: int) -> None:
    """The band of one tail, and its middle where the number is known to a factor."""
    sizes, low, high = without_level_parts(tail.sizes, tail.low, tail.high)
    tail = replace(tail, sizes=sizes, low=low, high=high)
    some = tail.high >= 1
    low, high = np.maximum(tail.low, FEWEST / 10), np.maximum(tail.high, FEWEST / 10)
    opacity = curve.opacity * (0.28 if count <= 3 else 0.13)
    ax.fill_between(tail.sizes, low, high, where=some, color=curve.colour, alpha=opacity, linewidth=0)
    if curve.hatch:
        texture = {"facecolor": "none", "edgecolor": curve.colour, "hatch": curve.hatch, "linewidth": 0}
        ax.fill_between(tail.sizes, low, high, where=some, alpha=0.35 * curve.opacity, **texture)
    known = (tail.low >= 1) & (tail.high <= RESOLVED_RATIO * tail.low)
    middle = np.where(known, np.sqrt(low * high), np.nan)
    every = np.linspace(0, len(tail.sizes) - 1, 4 * MARKERS_ALONG * count).astype(int)[position::count]
    spots = {"marker": curve.marker, "markersize": 4, "markevery": every.tolist()}
    ax.plot(tail.sizes, middle, linewidth=1.5, label=curve.label, **spots, **curve.style)


def _read_tail(ax: Axes, curve: Curve, tail: Tail, name: str, *, points: np.ndarray) -> None:
    """Note the bounds of the number at sizes along the axis."""
    places = np.searchsorted(tail.sizes, points)
    low, high = (np.append(side, 0.0)[places] for side in (tail.low, tail.high))  # none beyond the last
    beyond = curve.label.rpartition(", ")[2] if curve.label.endswith(("above t", "below −t")) else ""
    says = [f"{_count(*ends)} {beyond}".strip() for ends in zip(low, high, strict=True)]
    marks.read(ax, name, curve.colour, points, says, axis="t = ")


def _count(low: float, high: float) -> str:
    """Bounds on a number of eigenvalues, rounded outward."""
    fewest, most = math.ceil(low - 1e-6), math.floor(high + 1e-6)
    return f"{fewest:,}" if fewest >= most else f"{fewest:,}–{most:,}"


def _from(tail: Tail, start: float) -> Tail:
    """The part of a tail that the axis shows."""
    first = max(int(np.searchsorted(tail.sizes, start)) - 1, 0)
    return replace(tail, sizes=tail.sizes[first:], low=tail.low[first:], high=tail.high[first:])


def _start(tail: Tail) -> float:
    """A size below which the number hardly changes."""
    first = tail.sizes[np.flatnonzero(tail.high >= PLATEAU * tail.high[0])[-1]]
    return float(max(first / 3, 1e-6 * tail.sizes[-1]))
