"""Figures of spectra. Every function draws on one Axes and returns it; none saves, shows or changes global settings.

Where a run or a study lacks part of what its config.json plans, a figure says so above its axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE
from spectra.runs.folder import HasRun, Run, open_run
from spectra.runs.series import Point, Series, Steps, as_runs, series
from spectra.views.densities import Curve, curves_of, draw_bands, draw_densities
from spectra.views.style import TEXT_COLOUR, legend_outside, literal, new_axes, note, run_style, tidy
from spectra.views.wording import axis_name, unfinished_words

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
    """Draw the density of eigenvalues over the eigenvalue, with a logarithmic y axis and a curve for each record.

    The curves of one run are coloured by training step. Those of several runs have the colour and line that the runs'
    presentation names, else a colour for each run.

    Args:
        spectra: A run, a study (all of its runs), the folder of either, a SpectralDensity, or a list of these.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        bandwidth: Standard deviation of the kernel, in units of the eigenvalues; see `SpectralDensity.density`.
        labels: A label for each curve, in place of training steps and names of runs.
        scale: Scale of the x axis: "linear", "symlog" (linear near zero, logarithmic beyond) or "auto". "auto" is
            "symlog" where a few outliers would leave the other eigenvalues too little width.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, the scale is not known, or labels and curves differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    ax = new_axes() if ax is None else ax
    draw_densities([(ax, curves)], bandwidth=bandwidth, scale=scale)
    note(ax, _unfinished(spectra))
    return ax


def cumulative(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = "last",
    level: float = CONFIDENCE,
    labels: Sequence[str] | None = None,
    scale: str = "symlog",
) -> Axes:
    """Draw the share of eigenvalues below each value as a band that holds the whole curve, for each record.

    The line is `SpectralDensity.cumulative`, kept inside the band. Colours and lines are those of `density`.

    Args:
        spectra: A run, a study (all of its runs), the folder of either, a SpectralDensity, or a list of these.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        level: The probability with which each band holds its curve; see `SpectralDensity.band`.
        labels: A label for each curve, in place of training steps and names of runs.
        scale: Of the x axis: "symlog" (linear near zero, logarithmic beyond), "linear", or "auto", which is "symlog"
            where outliers would press the other eigenvalues into a line.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, the scale or the level is none, or labels and curves differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    ax = new_axes() if ax is None else ax
    draw_bands(ax, curves, level=level, scale=scale)
    note(ax, _unfinished(spectra))
    return ax


def trajectory(runs: Any, quantity: str, *, ax: Axes | None = None, mode: str | None = None) -> Axes:
    """Draw a quantity over training steps: a line for each run, with its 95 % interval as a band.

    A hollow marker is an unresolved estimate. A dotted vertical line joins two measurements at the same training step.
    A reference run with a single measurement is a horizontal line. Runs without the quantity are left out if another
    run has it.

    Args:
        runs: A run, a study (all of its runs), the folder of either, or a list of these.
        quantity: An estimate such as "rms", "loss", or a key of the records' extras or of the telemetry.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.

    Returns:
        The axes.

    Raises:
        InputError: No run has the quantity; the message lists what there is.
    """
    from matplotlib.ticker import MaxNLocator

    found = as_runs(runs)
    drawn = _all_series(found, quantity, mode)
    ax = new_axes() if ax is None else ax
    ax.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    for position, (run, line) in enumerate(drawn):
        style, label = run_style(run, position), literal(run.presentation.label)
        if run.presentation.reference and len(line.points) == 1 and len(drawn) > 1:
            _draw_level(ax, line.points[0], style, label=label)
        else:
            _draw_line(ax, line, style, label=label, opacity=0.16 if len(drawn) < 3 else 0.1)
    points = [point for _, line in drawn for point in line.points]
    _limit_y(ax, quantity, points)
    ax.set_xlabel("training step")
    ax.set_ylabel(literal(axis_name(found, quantity)))
    tidy(ax)
    _add_legend(ax, unresolved=any(not point.estimate.resolved for point in points))
    note(ax, _unfinished(runs))
    return ax


def _unfinished(shown: Any) -> str:
    """What is missing of the runs and studies among what is drawn, in words."""
    items = shown if isinstance(shown, list | tuple) else [shown]
    return unfinished_words([open_run(item) for item in items if isinstance(item, Run | HasRun | str | Path)])


def _with_labels(curves: list[Curve], labels: Sequence[str] | None) -> list[Curve]:
    """The curves with the caller's labels, where there are any."""
    if labels is None:
        return curves
    if len(labels) != len(curves):
        raise InputError(f"expected one label for each of the {len(curves)} curves, got {len(labels)}")
    return [replace(curve, label=label, step=None, repeated="") for curve, label in zip(curves, labels, strict=True)]


def _all_series(runs: Sequence[Run], quantity: str, mode: str | None) -> list[tuple[Run, Series]]:
    """The series of every run that has the quantity. Raises the last run's InputError where none has it."""
    drawn, refusal = [], InputError("there is no run to draw: give one run or more")
    for run in runs:
        try:
            drawn.append((run, series(run, quantity, mode=mode)))
        except InputError as error:
            refusal = error
    if not drawn:
        raise refusal
    return drawn


def _draw_level(ax: Axes, point: Point, style: dict[str, Any], *, label: str) -> None:
    """A level line across the axes, with its interval as a band."""
    estimate = point.estimate
    ax.axhline(estimate.value, linewidth=1.2, label=label, **style)
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        ax.axhspan(estimate.low, estimate.high, color=style["color"], alpha=0.06, linewidth=0)


def _draw_line(ax: Axes, line: Series, style: dict[str, Any], *, label: str, opacity: float) -> None:
    """A line through a run's points, cut where two share a training step; with markers and intervals if measured."""
    pieces: list[list[Point]] = [[]]
    for point in line.points:
        if point.again and pieces[-1]:
            values = [pieces[-1][-1].estimate.value, point.estimate.value]
            ax.plot([point.step] * 2, values, color=style["color"], linestyle=":", linewidth=1.6)
            pieces.append([])
        pieces[-1].append(point)
    for piece in pieces:
        steps = [point.step for point in piece]
        values = [point.estimate.value for point in piece]
        ax.plot(steps, values, linewidth=1.6 if len(line.points) < 100 else 1.0, label=label, **style)
        label = "_"  # matplotlib leaves a label that begins with _ out of the legend, so that it names a run once
        if line.measured:
            _draw_intervals(ax, piece, style["color"], opacity)


def _draw_intervals(ax: Axes, piece: list[Point], colour: str, opacity: float) -> None:
    """A band from the low to the high ends, a bar for a single point, and a marker at each value."""
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


def _add_legend(ax: Axes, *, unresolved: bool) -> None:
    """A legend with the names of the runs and the meaning of a hollow marker, if there are two entries or more."""
    handles, labels = ax.get_legend_handles_labels()
    if unresolved:
        handles.append(ax.plot([], [], "o", markerfacecolor="white", markeredgecolor=TEXT_COLOUR, markersize=5)[0])
        labels.append("unresolved")
    if len(handles) > 1:
        legend_outside(ax, handles, labels)
