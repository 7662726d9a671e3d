"""The share of eigenvalues below each value, as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectra.estimates.band import CumulativeBand
from spectra.estimates.estimate import RESOLVED_HALF_WIDTH
from spectra.estimates.sharp_band import sharp_band
from spectra.views import marks
from spectra.views.axis import EigenvalueAxis, eigenvalue_axis
from spectra.views.curves import Curve
from spectra.views.legends import curve_legend
from spectra.views.style import MARKERS_ALONG, tidy
from spectra.views.wording import share_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400  # at which a band is computed and drawn
FEW = 3  # curves, up to which their bands are filled strongly


def draw_bands(
    ax: Axes, curves: Sequence[Curve], *, level: float, axis: EigenvalueAxis | None = None, scale: str, legend: str
) -> None:
    """Draw the band of each cumulative share, and a line in its middle where the band is narrow.

    Args:
        ax: The axes.
        curves: What to draw.
        level: The probability with which each band holds its curve.
        axis: The axis of eigenvalues, where several panels share one.
        scale: Of the x axis; see `spectra.plots.cumulative`.
        legend: Where the legend is; see `spectra.plots.cumulative`.

    Raises:
        InputError: The scale is not known, or the level is not between 0 and 1.
    """
    axis = axis or eigenvalue_axis(curves, scale)
    for position, curve in enumerate(curves):
        with marks.series(ax, curve.label):
            band = _draw_band(ax, curve, axis, level=level, position=position, count=len(curves))
        _read_band(ax, curve, band, axis)
    axis.apply(ax)
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel(f"share of eigenvalues below λ ({100 * level:g}\u00a0%\u00a0band)")
    tidy(ax)
    curve_legend(ax, curves if len(curves) > 1 or curves[0].label != "spectrum" else [], place=legend)


def _draw_band(
    ax: Axes, curve: Curve, axis: EigenvalueAxis, *, level: float, position: int, count: int
) -> CumulativeBand:
    """The band of one spectrum: filled, with its edges, hatched if the curve asks for it, and with its middle line."""
    points = axis.between(axis.low, axis.high, POINTS)
    band = sharp_band(curve.density, level=level, thresholds=points)
    points = np.unique(np.append(points, [0.0, np.nextafter(0.0, 1.0)]))  # known zeros are a step
    low, high = band.at(points)
    points, low, high = without_level_parts(points, low, high)
    opacity = curve.opacity * (0.28 if count <= FEW else 0.12)
    ax.fill_between(points, low, high, color=curve.colour, alpha=opacity, linewidth=0)
    if curve.hatch:
        texture = {"facecolor": "none", "edgecolor": curve.colour, "hatch": curve.hatch, "linewidth": 0}
        ax.fill_between(points, low, high, alpha=0.35 * curve.opacity, **texture)
    edge = {"color": curve.colour, "linewidth": 0.7, "alpha": 0.6 * curve.opacity}
    for side in (low, high):
        ax.plot(points, side, linestyle=curve.style["linestyle"], **edge)
    middle = np.where(high - low <= 2 * RESOLVED_HALF_WIDTH, (low + high) / 2, np.nan)
    spots = {"marker": curve.marker, "markersize": 4, "markevery": _places(points, axis, position, count)}
    ax.plot(points, middle, linewidth=1.6, label=curve.label, **spots, **curve.style)
    return band


def _read_band(ax: Axes, curve: Curve, band: CumulativeBand, axis: EigenvalueAxis) -> None:
    """Note the bounds of the share at points along the axis."""
    points = axis.between(axis.low, axis.high, marks.POINTS)
    low, high = band.at(points)
    says = [f"{share_in_words(*ends, curve.density.dimension)} below" for ends in zip(low, high, strict=True)]
    marks.read(ax, curve.label, curve.colour, points, says, axis="λ = ")


def without_level_parts(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    """The points without those between two others at which both bounds are the same, which a line needs not.

    Args:
        points: (p,) where a band is drawn.
        low: (p,) lower bounds.
        high: (p,) upper bounds.

    Returns:
        Fewer points, and the bounds there.
    """
    level = (np.diff(low) == 0) & (np.diff(high) == 0)
    kept = ~(np.append(True, level) & np.append(level, True))
    kept[[0, -1]] = True
    return points[kept], low[kept], high[kept]


def _places(points: np.ndarray, axis: EigenvalueAxis, position: int, count: int) -> list[int]:
    """Indices of points that are evenly spaced on the axis, so that the markers of several curves lie apart."""
    shown = axis.positions(points)
    offsets = (np.arange(MARKERS_ALONG) + (position + 0.5) / count) / MARKERS_ALONG
    return np.unique(np.searchsorted(shown, shown[0] + offsets * (shown[-1] - shown[0]))).tolist()
