"""Figures of spectra. Every function draws on one Axes and returns it; none saves, shows or changes global settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import InputError
from spectra.plot_style import (
    INK,
    MOST_IN_LEGEND,
    PALETTE,
    legend_outside,
    new_axes,
    run_name,
    run_style,
    step_bar,
    step_colour,
    symlog_axis,
    tidy,
)
from spectra.records import Run, open_run
from spectra.series import AFTER_RESET, BEFORE_RESET, EIGENVALUE_UNIT, Point, Steps, describe, select, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.density import SpectralDensity


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
    if scale not in ("auto", "linear", "symlog"):
        raise InputError(f"expected scale to be auto, linear or symlog, got {scale!r}")
    curves = _curves(spectra, mode, steps)
    if labels is not None:
        if len(labels) != len(curves):
            raise InputError(f"expected one label for each of the {len(curves)} curves, got {len(labels)}")
        curves = [replace(curve, label=label) for curve, label in zip(curves, labels, strict=True)]
    ax = new_axes() if ax is None else ax
    threshold = None if scale == "linear" else _threshold(curves, always=scale == "symlog")
    grid = _grid(curves, threshold)
    for curve in curves:
        ax.plot(grid, curve.density.density(grid, bandwidth), linewidth=1.5, label=curve.label, **curve.style)
    heights = np.array([line.get_ydata() for line in ax.lines[-len(curves) :]], dtype=float)
    ax.set_yscale("log")
    ax.set_ylim(_floor(curves, grid, heights), 3 * heights.max())
    if threshold is not None:
        symlog_axis(ax, grid[0], grid[-1], threshold)
    ax.set_xlim(grid[0], grid[-1])
    ax.set_xlabel(f"eigenvalue λ ({EIGENVALUE_UNIT})")
    ax.set_ylabel("density of eigenvalues")
    tidy(ax)
    ax.axvline(0, color="#999999", linewidth=0.8, zorder=0.5)
    if len(curves) <= MOST_IN_LEGEND:
        ax.legend(frameon=False, fontsize=8.5, loc="upper right")
    elif all(curve.step is not None for curve in curves):
        step_bar(ax, max(curve.step or 0 for curve in curves))
    return ax


def trajectory(runs: Any, quantity: str, *, ax: Axes | None = None, mode: str | None = None) -> Axes:
    """A quantity over training steps, a line a run, with its 95 % interval as a band.

    runs: a run, a study (all of its runs), the folder of either, or a list. quantity: an estimate such as "rms",
    "loss", or a key of the records' extras or of the telemetry. Colour stands for the bit-width and line style for
    the method. A hollow marker is an unresolved estimate; a reset is a vertical dotted step from before to after it.
    Raises InputError naming what there is where a run has no such quantity.
    """
    found = as_runs(runs)
    drawn = [series(run, quantity, mode=mode) for run in found]
    ax = new_axes() if ax is None else ax
    for position, (run, line) in enumerate(zip(found, drawn, strict=True)):
        _draw(ax, line.points, run_style(run, position), label=run_name(run), markers=line.measured)
    points = [point for line in drawn for point in line.points]
    _limit_y(ax, quantity, points)
    ax.set_xlabel("training step")
    ax.set_ylabel(describe(quantity).axis)
    tidy(ax)
    handles, labels = ax.get_legend_handles_labels()
    if any(not point.estimate.resolved for point in points):
        handles.append(ax.plot([], [], "o", markerfacecolor="white", markeredgecolor=INK, markersize=5)[0])
        labels.append("unresolved")
    if len(handles) > 1:
        legend_outside(ax, handles, labels)
    return ax


def as_runs(runs: Any) -> list[Run]:
    """Runs from a run, a study, the folder of either, or a list of these. A study stands for the runs in it."""
    items = runs if isinstance(runs, list | tuple) else [runs]
    opened = [open_run(item) for item in items]
    return [single for run in opened for single in (run.runs or [run])]


# -- densities


@dataclass(frozen=True)
class _Curve:
    density: SpectralDensity
    label: str
    style: dict[str, Any]
    step: int | None = None


def _curves(spectra: Any, mode: str | None, steps: Steps) -> list[_Curve]:
    items: list[Any] = []
    for item in spectra if isinstance(spectra, list | tuple) else [spectra]:
        items += as_runs(item) if isinstance(item, Run | str | Path) else [item]
    several = sum(isinstance(item, Run) for item in items) > 1
    curves: list[_Curve] = []
    for position, item in enumerate(items):
        if isinstance(item, Run):
            curves += _of_run(item, mode, steps, position if several else None)
        else:
            style = {"color": PALETTE[position % len(PALETTE)]}
            curves.append(_Curve(item, "spectrum" if len(items) == 1 else f"spectrum {position + 1}", style))
    return curves


def _of_run(run: Run, mode: str | None, steps: Steps, position: int | None) -> list[_Curve]:
    """The curves of a run; position: its place among several runs, None for a single one."""
    records = [record for record in select(run, mode=mode, steps=steps) if record.lanczos is not None]
    if not records:
        raise InputError(f"{run.folder} kept no Lanczos matrices to draw a density from: measure it again")
    last = max(record.step for record in records)
    curves = []
    for record in records:
        label = f"step {record.step}"
        if record.label in (BEFORE_RESET, AFTER_RESET):
            label += f", {record.label.replace('-', ' ')}"
        if position is None:
            line = (0, (2, 1)) if record.label == AFTER_RESET else "-"
            style = {"color": step_colour(record.step, last), "linestyle": line}
        else:
            label = f"{run_name(run)}, {label}"
            style = run_style(run, position) | {"alpha": 0.35 + 0.65 * record.step / last if last else 1.0}
        curves.append(_Curve(run.density(record), label, style, record.step))
    return curves


def _threshold(curves: list[_Curve], *, always: bool) -> float | None:
    """Where a symmetric-log axis turns linear: the power of ten that holds half of the eigenvalues of each curve.

    None where the largest eigenvalue is within a hundred times of that, which a linear axis shows well.
    """
    medians = []
    for curve in curves:
        sizes, weights = np.abs(curve.density.nodes).ravel(), curve.density.weights.ravel()
        order = sizes.argsort()
        medians.append(sizes[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)])
    largest = max(float(np.abs(curve.density.nodes).max()) for curve in curves)
    typical = max(float(np.median(medians)), 1e-8 * largest)
    if largest == 0 or (largest < 100 * typical and not always):
        return None
    return 10.0 ** min(math.ceil(math.log10(typical)), math.floor(math.log10(largest)) - 1)


def _grid(curves: list[_Curve], threshold: float | None, points: int = 1200) -> np.ndarray:
    """Points spread evenly as the axis shows them, over all that carries weight in any curve."""
    lows, highs = [], []
    for curve in curves:
        used = curve.density.weights > 0
        nodes, margin = curve.density.nodes[used], 3 * curve.density.bandwidths()[used]
        lows.append((nodes - margin).min())
        highs.append((nodes + margin).max())
    low, high = float(min(lows)), float(max(highs))
    if threshold is None:
        return np.linspace(low, high, points)
    return threshold * np.sinh(np.linspace(np.arcsinh(low / threshold), np.arcsinh(high / threshold), points))


def _floor(curves: list[_Curve], grid: np.ndarray, heights: np.ndarray) -> float:
    """The decade below the height that a single eigenvalue, the least there can be, reaches in most places."""
    reached = []
    for curve, height in zip(curves, heights, strict=True):
        nodes = curve.density.nodes[curve.density.weights > 0.01 / curve.density.dimension]
        reached.append(np.quantile(np.interp(nodes, grid, height), 0.02))
    return 10.0 ** math.floor(math.log10(max(min(reached), 1e-12 * heights.max())))


# -- trajectories


def _draw(ax: Axes, points: Sequence[Point], style: dict[str, Any], *, label: str, markers: bool) -> None:
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
        ax.plot(steps, values, linewidth=1.6, label=label, **style)
        label = "_"  # one entry in the legend
        if markers:
            _intervals(ax, piece, style["color"])


def _intervals(ax: Axes, piece: list[Point], colour: str) -> None:
    steps = [point.step for point in piece]
    lows, highs = (np.array([getattr(point.estimate, side) for point in piece]) for side in ("low", "high"))
    known = np.isfinite(lows) & np.isfinite(highs)
    if len(piece) > 1:
        alpha = 0.16 if all(point.estimate.resolved for point in piece) else 0.07
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
