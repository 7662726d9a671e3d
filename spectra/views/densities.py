"""The curves of a density figure: which spectra are drawn, over which range and on which scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.quantities import EIGENVALUE_UNIT
from spectra.runs.folder import HasRun, Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import Steps, as_runs, measured_again, modes, select
from spectra.views.style import (
    AXIS_COLOUR,
    MAX_LEGEND_ENTRIES,
    MAX_STEPS_IN_LEGEND,
    PALETTE,
    REPEATED_LINE,
    TEXT_COLOUR,
    legend_outside,
    literal,
    run_style,
    step_bar,
    step_colour,
    symlog_axis,
    tidy,
)
from spectra.views.wording import record_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from spectra.estimates.density import SpectralDensity

SCALES = ("auto", "linear", "symlog")
SHOWN_ZEROS = 0.02  # smallest share of exact zeros that a legend names


@dataclass(frozen=True)
class Curve:
    """A density and how it is drawn.

    Attributes:
        density: The spectrum.
        label: What a legend calls it.
        style: Keywords of matplotlib.
        step: The training step if the colour stands for it, else None.
        repeated: What a second spectrum at the same training step is called, such as "after the restart"; else "".
    """

    density: SpectralDensity
    label: str
    style: dict[str, Any]
    step: int | None = None
    repeated: str = ""


def curves_of(spectra: Any, *, mode: str | None = None, steps: Steps = None) -> list[Curve]:
    """The curves that a density figure shows, one for each record of each run and for each SpectralDensity.

    Args:
        spectra: What `spectra.plots.density` takes.
        mode: The Hessian mode; None for each run's first.
        steps: Training steps, None for all, "last" for the last record.

    Returns:
        At least one curve.

    Raises:
        InputError: There is nothing to draw.
    """
    items: list[Any] = []
    for item in spectra if isinstance(spectra, list | tuple) else [spectra]:
        items += _measured_runs(as_runs(item), mode) if isinstance(item, Run | HasRun | str | Path) else [item]
    several = sum(isinstance(item, Run) for item in items) > 1
    curves: list[Curve] = []
    for position, item in enumerate(items):
        if isinstance(item, Run):
            curves += _curves_of_several(item, mode, steps, position) if several else _curves_of_one(item, mode, steps)
        else:
            style = {"color": PALETTE[position % len(PALETTE)]}
            curves.append(Curve(item, "spectrum" if len(items) == 1 else f"spectrum {position + 1}", style))
    if not curves:
        raise InputError("there is no spectrum to draw: give a run, a SpectralDensity or a list of these")
    return curves


def draw_densities(
    panels: Sequence[tuple[Axes, Sequence[Curve]]], *, bandwidth: float | None = None, scale: str = "auto"
) -> None:
    """Draw densities in panels that share their range and scale.

    Args:
        panels: Axes, each with the curves to draw on it.
        bandwidth: Standard deviation of the kernel, in units of the eigenvalues; see `SpectralDensity.density`.
        scale: Scale of the x axis; see `spectra.plots.density`.

    Raises:
        InputError: The scale is not known.
    """
    if scale not in SCALES:
        raise InputError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}")
    curves = [curve for _, members in panels for curve in members]
    threshold = None if scale == "linear" else _linear_threshold(curves, always=scale == "symlog")
    grid = _grid(curves, threshold)
    heights = [curve.density.density(grid, bandwidth) for curve in curves]
    top = max(float(height.max()) for height in heights)
    bottom = _lowest_height(curves, grid, heights, top)
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
        ax.axvline(0, color=AXIS_COLOUR, linewidth=0.8, zorder=0.5)
        _add_legend(ax, members, lines)


def draw_bands(ax: Axes, curves: Sequence[Curve], *, level: float, scale: str) -> None:
    """Draw the band of each cumulative share, with the interpolated curve inside it.

    Args:
        ax: The axes.
        curves: What to draw.
        level: The probability with which each band holds its curve.
        scale: Of the x axis; see `spectra.plots.cumulative`.

    Raises:
        InputError: The scale is not known, or the level is not between 0 and 1.
    """
    if scale not in SCALES:
        raise InputError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}")
    threshold = None if scale == "linear" else _linear_threshold(curves, always=scale == "symlog")
    grid = _grid(curves, threshold)
    lines = []
    for curve in curves:
        band, opacity = curve.density.band(level), curve.style.get("alpha", 1.0) * (0.25 if len(curves) < 3 else 0.15)
        points = np.unique(np.concatenate([grid, band.thresholds.clip(grid[0], grid[-1])]))
        low, high = band.at(points)
        ax.fill_between(points, low, high, color=curve.style["color"], alpha=opacity, linewidth=0)
        middle = curve.density.cumulative(points).clip(low, high)  # wide gaps between nodes take it out of the band
        lines += ax.plot(points, middle, linewidth=1.5, label=curve.label, **curve.style)
    if threshold is not None:
        symlog_axis(ax, grid[0], grid[-1], threshold)
    ax.set_xlim(grid[0], grid[-1])
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel(f"eigenvalue λ ({EIGENVALUE_UNIT})")
    ax.set_ylabel(f"share of eigenvalues below λ ({100 * level:g} % band)")
    tidy(ax)
    ax.axvline(0, color=AXIS_COLOUR, linewidth=0.8, zorder=0.5)
    _add_legend(ax, curves, lines)


def _measured_runs(runs: list[Run], mode: str | None) -> list[Run]:
    """The runs with a spectrum of the mode; all of them where none has, so that an error can say what is missing."""
    return [run for run in runs if run.measured and (mode is None or mode in modes(run))] or runs


def _curves_of_one(run: Run, mode: str | None, steps: Steps) -> list[Curve]:
    """The curves of a run that is drawn alone: the colour stands for the training step."""
    records = _selected(run, mode, steps)
    last = max(record.step for record, _ in records)
    curves = []
    for record, repeated in records:
        density = run.density(record)
        style = {"color": step_colour(record.step, last), "linestyle": REPEATED_LINE if repeated else "solid"}
        curves.append(Curve(density, f"step {record.step}{_zeros(density)}", style, record.step, repeated))
    return curves


def _curves_of_several(run: Run, mode: str | None, steps: Steps, position: int) -> list[Curve]:
    """The curves of a run that is drawn with others: colour and line are the run's, earlier training steps paler."""
    records = _selected(run, mode, steps)
    last = max(record.step for record, _ in records)
    name = literal(run.presentation.label)
    curves = []
    for record, repeated in records:
        density = run.density(record)
        style = run_style(run, position) | {"alpha": 0.35 + 0.65 * record.step / last if last else 1.0}
        words = f"{name}, step {record.step}" + (f", {repeated}" if repeated else "")
        curves.append(Curve(density, words + _zeros(density), style))
    return curves


def _selected(run: Run, mode: str | None, steps: Steps) -> list[tuple[SpectrumRecord, str]]:
    """The selected records whose Lanczos matrices were kept, in the order of measuring.

    Beside each stands what it is called if it follows another one at the same training step, else "".
    """
    chosen, every = select(run, mode=mode, steps=steps), select(run, mode=mode)
    records = [
        (record, (literal(record_words(run, record)) or "measured again") if again else "")
        for record, again in zip(every, measured_again(every), strict=True)
        if run.keeps_density(record) and record in chosen
    ]
    if not records:
        raise InputError(f"{run.folder} kept no Lanczos matrices to draw a density from: measure it again")
    return records


def _zeros(density: SpectralDensity) -> str:
    """The share of eigenvalues that are exactly zero, for a legend: the kernel shows them as a hill around zero."""
    zeros = density.zero_share()
    return f", {zeros:.0%} at 0" if zeros >= SHOWN_ZEROS else ""


def _add_legend(ax: Axes, curves: Sequence[Curve], lines: list[Line2D]) -> None:
    """A legend, in which repeated spectra of one kind share an entry, or a colour bar where training steps are many."""
    from matplotlib.lines import Line2D

    first = {curve.step for curve in curves if not curve.repeated}
    shared = [curve.repeated if curve.step in first else "" for curve in curves]
    handles = [line for line, words in zip(lines, shared, strict=True) if not words]
    if len(handles) > MAX_STEPS_IN_LEGEND and all(curve.step is not None for curve in curves):
        step_bar(ax, max(curve.step or 0 for curve in curves))
        handles = []
    for words in dict.fromkeys(filter(None, shared)):
        handles.append(Line2D([], [], color=TEXT_COLOUR, linewidth=1.5, linestyle=REPEATED_LINE, label=words))
    if 0 < len(handles) <= MAX_LEGEND_ENTRIES:
        legend_outside(ax, handles, [str(handle.get_label()) for handle in handles])


def _linear_threshold(curves: Sequence[Curve], *, always: bool) -> float | None:
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
    """Points evenly spaced as the axis shows them, over every node that carries weight in any curve, (points,)."""
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


def _lowest_height(curves: Sequence[Curve], grid: np.ndarray, heights: Sequence[np.ndarray], top: float) -> float:
    """Where the y axis starts: the power of ten below the height that nearly every single eigenvalue reaches."""
    reached = []
    for curve, height in zip(curves, heights, strict=True):
        nodes = curve.density.nodes[curve.density.weights > 0.01 / curve.density.dimension]
        reached.append(float(np.quantile(np.interp(nodes, grid, height), 0.02)))
    return 10.0 ** math.floor(math.log10(max(min(reached), 1e-12 * top)))
