"""Densities of eigenvalues as curves: which ones, over which range, on which scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.quantities import EIGENVALUE_UNIT
from spectra.runs.folder import Run
from spectra.runs.series import AFTER_RESET, Steps, as_runs, modes, select
from spectra.views.style import (
    AFTER_RESET_LINE,
    INK,
    MOST_IN_LEGEND,
    PALETTE,
    legend_outside,
    run_name,
    run_style,
    step_bar,
    step_colour,
    symlog_axis,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from spectra.estimates.density import SpectralDensity

SCALES = ("auto", "linear", "symlog")


@dataclass(frozen=True)
class Curve:
    """A density, how it is called and drawn, and the training step it belongs to, where its colour stands for that."""

    density: SpectralDensity
    label: str
    style: dict[str, Any]
    step: int | None = None
    after_reset: bool = False


def curves_of(spectra: Any, *, mode: str | None = None, steps: Steps = None) -> list[Curve]:
    """A curve for each record of each run and for each SpectralDensity; see `spectra.plots.density`."""
    items: list[Any] = []
    for item in spectra if isinstance(spectra, list | tuple) else [spectra]:
        items += _with_spectra(as_runs(item), mode) if isinstance(item, Run | str | Path) else [item]
    several = sum(isinstance(item, Run) for item in items) > 1
    curves: list[Curve] = []
    for position, item in enumerate(items):
        if isinstance(item, Run):
            curves += _of_run(item, mode, steps, position if several else None)
        else:
            style = {"color": PALETTE[position % len(PALETTE)]}
            curves.append(Curve(item, "spectrum" if len(items) == 1 else f"spectrum {position + 1}", style))
    if not curves:
        raise InputError("there is no spectrum to draw: give a run, a SpectralDensity or a list of these")
    return curves


def _with_spectra(runs: list[Run], mode: str | None) -> list[Run]:
    """Those that have what is asked for; all of them where none has, so that one can say what is missing."""
    return [run for run in runs if run.records and (mode is None or mode in modes(run))] or runs


def draw_densities(
    panels: Sequence[tuple[Axes, Sequence[Curve]]], *, bandwidth: float | None = None, scale: str = "auto"
) -> None:
    """Draw each panel's curves on its axes, all panels over the same range and on the same scale."""
    if scale not in SCALES:
        raise InputError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}")
    curves = [curve for _, members in panels for curve in members]
    threshold = None if scale == "linear" else _threshold(curves, always=scale == "symlog")
    grid = _grid(curves, threshold)
    heights = [curve.density.density(grid, bandwidth) for curve in curves]
    top = max(float(height.max()) for height in heights)
    bottom = _floor(curves, grid, heights, top)
    remaining = iter(heights)
    for ax, members in panels:
        lines = []
        for curve in members:
            lines += ax.plot(grid, next(remaining), linewidth=1.5, label=curve.label, **curve.style)
        ax.set_yscale("log")
        ax.set_ylim(bottom, 3 * top)
        if threshold is not None:
            symlog_axis(ax, grid[0], grid[-1], threshold)
        ax.set_xlim(grid[0], grid[-1])
        ax.set_xlabel(f"eigenvalue λ ({EIGENVALUE_UNIT})")
        ax.set_ylabel("density of eigenvalues")
        tidy(ax)
        ax.axvline(0, color="#999999", linewidth=0.8, zorder=0.5)
        _name_curves(ax, members, lines)


def _name_curves(ax: Axes, curves: Sequence[Curve], lines: list[Line2D]) -> None:
    """A legend, in which the curves after a reset share one entry, or a colour bar of steps where they are many."""
    from matplotlib.lines import Line2D

    before = {curve.step for curve in curves if not curve.after_reset}
    paired = [curve.after_reset and curve.step in before for curve in curves]
    handles = [line for line, hidden in zip(lines, paired, strict=True) if not hidden]
    if len(handles) > MOST_IN_LEGEND and all(curve.step is not None for curve in curves):
        step_bar(ax, max(curve.step or 0 for curve in curves))
        handles = []
    if any(paired):
        handles.append(Line2D([], [], color=INK, linewidth=1.5, linestyle=AFTER_RESET_LINE, label="after the reset"))
    if 0 < len(handles) <= MOST_IN_LEGEND + 1:
        legend_outside(ax, handles, [str(handle.get_label()) for handle in handles])


def _of_run(run: Run, mode: str | None, steps: Steps, position: int | None) -> list[Curve]:
    """The curves of a run; position: its place among several runs, None for a single one."""
    records = [record for record in select(run, mode=mode, steps=steps) if record.lanczos is not None]
    if not records:
        raise InputError(f"{run.folder} kept no Lanczos matrices to draw a density from: measure it again")
    last = max(record.step for record in records)
    curves = []
    for record in records:
        spectrum, label, after = run.density(record), f"step {record.step}", record.label == AFTER_RESET
        if (zeros := spectrum.zero_share()) >= 0.02:  # a kernel hides them in the hill around zero
            label += f", {zeros:.0%} at 0"
        if position is None:
            style = {"color": step_colour(record.step, last), "linestyle": AFTER_RESET_LINE if after else "-"}
            curves.append(Curve(spectrum, label, style, record.step, after))
        else:
            faded = 0.35 + 0.65 * record.step / last if last else 1.0
            style = run_style(run, position) | {"alpha": faded}
            label = f"{run_name(run)}, {label}{' after the reset' if after else ''}"
            curves.append(Curve(spectrum, label, style))
    return curves


def _threshold(curves: Sequence[Curve], *, always: bool) -> float | None:
    """Where a symmetric-log axis turns linear: the power of ten that holds half of the eigenvalues, typically.

    None where the largest eigenvalue is within a hundred times the median size, which a linear axis shows well.
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


def _grid(curves: Sequence[Curve], threshold: float | None, points: int = 1200) -> np.ndarray:
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


def _floor(curves: Sequence[Curve], grid: np.ndarray, heights: Sequence[np.ndarray], top: float) -> float:
    """The decade below the height that a single eigenvalue, the least there can be, reaches in most places."""
    reached = []
    for curve, height in zip(curves, heights, strict=True):
        nodes = curve.density.nodes[curve.density.weights > 0.01 / curve.density.dimension]
        reached.append(float(np.quantile(np.interp(nodes, grid, height), 0.02)))
    return 10.0 ** math.floor(math.log10(max(min(reached), 1e-12 * top)))
