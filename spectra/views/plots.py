"""Figures of spectra. Every function draws on one Axes and returns it; none saves, shows or changes global settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.quantities import describe
from spectra.runs.folder import Run
from spectra.runs.series import AFTER_RESET, Point, Series, Steps, as_runs, series
from spectra.views.densities import curves_of, draw_densities
from spectra.views.style import INK, is_reference, legend_outside, new_axes, run_name, run_style, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def density(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = None,
    bandwidth: float | None = None,
    labels: Sequence[str] | None = None,
    scale: str = "auto",
) -> Axes:
    """The density of eigenvalues over the eigenvalue, with a logarithmic y axis; one curve a record.

    spectra: a run, a study (all of its runs), the folder of either, a SpectralDensity, or a list of these.
    mode, steps: which records of the runs (None: the run's first mode, and every step; "last": the last one).
    Curves of one run are coloured by step, those of several by run. labels: one a curve.
    bandwidth: see `SpectralDensity.density`. scale: of the x axis, "linear", "symlog" (linear near zero, logarithmic
    beyond) or "auto": symlog where outliers would press the bulk into a line.
    Raises InputError where there is nothing to draw.
    """
    curves = curves_of(spectra, mode=mode, steps=steps)
    if labels is not None:
        if len(labels) != len(curves):
            raise InputError(f"expected one label for each of the {len(curves)} curves, got {len(labels)}")
        curves = [
            replace(curve, label=label, step=None, after_reset=False)
            for curve, label in zip(curves, labels, strict=True)
        ]
    ax = new_axes() if ax is None else ax
    draw_densities([(ax, curves)], bandwidth=bandwidth, scale=scale)
    return ax


def trajectory(runs: Any, quantity: str, *, ax: Axes | None = None, mode: str | None = None) -> Axes:
    """A quantity over training steps, a line a run, with its 95 % interval as a band.

    runs: a run, a study (all of its runs), the folder of either, or a list. quantity: an estimate such as "rms",
    "loss", or a key of the records' extras or of the telemetry. Colour stands for the bit-width and line style for
    the method. A hollow marker is an unresolved estimate; a reset is a vertical dotted step from before to after it;
    the one spectrum of a full-precision model is a level line across.
    A run without the quantity is left out of several. Raises InputError naming what there is where no run has it.
    """
    found = as_runs(runs)
    drawn = _all_series(found, quantity, mode)
    ax = new_axes() if ax is None else ax
    for position, (run, line) in enumerate(drawn):
        style = run_style(run, position)
        if is_reference(run) and len(line.points) == 1 and len(drawn) > 1:
            _draw_level(ax, line.points[0], style, label=run_name(run))
        else:
            opacity = (0.16 if len(drawn) < 3 else 0.1) if line.measured else None
            _draw(ax, line.points, style, label=run_name(run), opacity=opacity)
    points = [point for _, line in drawn for point in line.points]
    _limit_y(ax, quantity, points)
    ax.set_xlabel("training step")
    ax.set_ylabel(_axis_name(quantity, found))
    tidy(ax)
    handles, labels = ax.get_legend_handles_labels()
    if any(not point.estimate.resolved for point in points):
        handles.append(ax.plot([], [], "o", markerfacecolor="white", markeredgecolor=INK, markersize=5)[0])
        labels.append("unresolved")
    if len(handles) > 1:
        legend_outside(ax, handles, labels)
    return ax


def _all_series(runs: Sequence[Run], quantity: str, mode: str | None) -> list[tuple[Run, Series]]:
    drawn, refusal = [], InputError("there is no run to draw: give one run or more")
    for run in runs:
        try:
            drawn.append((run, series(run, quantity, mode=mode)))
        except InputError as error:
            refusal = error
    if not drawn:
        raise refusal
    return drawn


def _axis_name(quantity: str, runs: Sequence[Run]) -> str:
    if quantity != "near_zero_share":
        return describe(quantity).axis
    tolerances = {f"{record.near_zero_tol:g}" for run in runs for record in run.records}
    return f"{describe(quantity).name} (|λ| < {' or '.join(sorted(tolerances))})"


def _draw_level(ax: Axes, point: Point, style: dict[str, Any], *, label: str) -> None:
    estimate = point.estimate
    ax.axhline(estimate.value, linewidth=1.2, label=label, **style)
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        ax.axhspan(estimate.low, estimate.high, color=style["color"], alpha=0.06, linewidth=0)


def _draw(ax: Axes, points: Sequence[Point], style: dict[str, Any], *, label: str, opacity: float | None) -> None:
    """The line, and unless opacity is None its markers and bands of that opacity."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point.label == AFTER_RESET and pieces[-1] and pieces[-1][-1].step == point.step:
            before = pieces[-1][-1]
            values = [before.estimate.value, point.estimate.value]
            ax.plot([point.step] * 2, values, color=style["color"], linestyle=":", linewidth=1.6)
            pieces.append([])
        pieces[-1].append(point)
    for piece in pieces:
        steps = [point.step for point in piece]
        values = [point.estimate.value for point in piece]
        ax.plot(steps, values, linewidth=1.6 if len(points) < 100 else 1.0, label=label, **style)
        label = "_"  # one entry in the legend
        if opacity is not None:
            _intervals(ax, piece, style["color"], opacity)


def _intervals(ax: Axes, piece: list[Point], colour: str, opacity: float) -> None:
    steps = [point.step for point in piece]
    lows, highs = (np.array([getattr(point.estimate, side) for point in piece]) for side in ("low", "high"))
    known = np.isfinite(lows) & np.isfinite(highs)
    if len(piece) > 1:
        alpha = opacity if all(point.estimate.resolved for point in piece) else opacity / 2
        ax.fill_between(steps, lows, highs, where=known, color=colour, alpha=alpha, linewidth=0)
    else:
        ax.vlines(np.array(steps)[known], lows[known], highs[known], color=colour, alpha=0.35, linewidth=3)
    for point in piece:
        face = colour if point.estimate.resolved else "white"
        ax.plot(point.step, point.estimate.value, "o", markersize=4.5, color=colour, markerfacecolor=face, zorder=3)


def _limit_y(ax: Axes, quantity: str, points: Sequence[Point]) -> None:
    """A logarithmic axis where values span decades; a share stays within 0 and 1."""
    values = [point.estimate.value for point in points if math.isfinite(point.estimate.value)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
    elif quantity.endswith("share"):
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))
