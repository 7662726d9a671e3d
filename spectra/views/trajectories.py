"""A quantity over training steps, with its intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.estimates.quantities import NEAR_ZERO, summarize
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import Point, Series, as_runs, series
from spectra.runs.unsaved import UnsavedRun
from spectra.views import marks
from spectra.views.style import TEXT_COLOUR, add_legend, literal, run_marks, run_style, tidy
from spectra.views.wording import axis_name, value_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALE = 0.3  # opacity of what is unresolved, relative to the rest


def runs_shown(shown: Any) -> list[Run]:
    """Open runs; records and densities become a run that is kept in memory.

    Args:
        shown: What `spectra.plots.trajectory` takes.

    Returns:
        The runs.

    Raises:
        InputError: A folder holds no run.
    """
    items = list(shown) if isinstance(shown, list | tuple) else [shown]
    loose = [item for item in items if isinstance(item, SpectrumRecord | SpectralDensity)]
    opened = as_runs([item for item in items if not isinstance(item, SpectrumRecord | SpectralDensity)])
    if not loose:
        return opened
    run = UnsavedRun({"presentation": {"label": "spectra"}})
    for step, item in enumerate(loose):
        run.append(_record_of(item, step) if isinstance(item, SpectralDensity) else item)
    return [*opened, run]


def _record_of(density: SpectralDensity, step: int) -> SpectrumRecord:
    """A record of a density that belongs to no run."""
    return SpectrumRecord(
        step=step,
        mode=density.origin.mode,
        loss=math.nan,
        gradient_norm=math.nan,
        dimension=density.dimension,
        estimates=summarize(density, NEAR_ZERO),
        near_zero_tol=NEAR_ZERO,
        probes=len(density.alphas),
        lanczos_steps=density.alphas.shape[1],
        seed=density.seed or 0,
        reorthogonalize="exact" if density.exact else "full",
        products=int(density.lengths.sum()),
        seconds=math.nan,
    )


def draw_trajectories(
    ax: Axes, runs: Sequence[Run], drawn: Sequence[tuple[Run, Series]], quantity: str, *, legend: str
) -> None:
    """Draw series, each with its run's colour, line and marker.

    Args:
        ax: The axes.
        runs: All runs that the caller gave, whose words name the axis.
        drawn: The runs that have the quantity, each with its series.
        quantity: The key of the quantity.
        legend: Where the legend is; see `spectra.plots.trajectory`.
    """
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    for position, (run, line) in enumerate(drawn):
        style, label = run_style(run, position), literal(run.presentation.label)
        with marks.series(ax, label):
            if run.presentation.reference and len(line.points) == 1 and len(drawn) > 1:
                _draw_level(ax, line.points[0], style, label=label)
            else:
                marker = run_marks(run, position)[0] or "o"
                opacity = 0.16 if len(drawn) < 3 else 0.1
                shift = 3.0 * (position - (len(drawn) - 1) / 2)
                _draw_line(ax, line, style, label=label, marker=marker, opacity=opacity, shift=shift)
        _read_points(ax, run, line, label, style["color"])
    points = [point for _, line in drawn for point in line.points]
    _limit_y(ax, quantity, points)
    ax.set_xlabel("training step")
    ax.set_ylabel(literal(axis_name(runs, quantity)))
    tidy(ax)
    _add_legend(ax, drawn, unresolved=any(not point.estimate.resolved for point in points), place=legend)


def _read_points(ax: Axes, run: Run, line: Series, label: str, colour: Any) -> None:
    """Note the value with its interval at each point."""
    words = [run.presentation.labels.get(point.label, point.label.replace("-", " ")) for point in line.points]
    says = [
        value_in_words(point.estimate) + (f", {word}" if word else "")
        for point, word in zip(line.points, words, strict=True)
    ]
    marks.read(ax, label, colour, [point.step for point in line.points], says, axis="step ")


def all_series(runs: Sequence[Run], quantity: str, mode: str | None) -> list[tuple[Run, Series]]:
    """The series of every run that has the quantity.

    Args:
        runs: The runs.
        quantity: The key of the quantity.
        mode: The Hessian mode; None for each run's first.

    Returns:
        The runs that have it, each with its series.

    Raises:
        InputError: None has it; the error is that of the last run.
    """
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


def _draw_line(
    ax: Axes, line: Series, style: dict[str, Any], *, label: str, marker: str, opacity: float, shift: float
) -> None:
    """A line through a run's points, cut where two share a training step and at what is unresolved; with intervals."""
    pieces: list[list[Point]] = [[]]
    for point in line.points:
        if point.again and pieces[-1]:
            values = [pieces[-1][-1].estimate.value, point.estimate.value]
            ax.plot([point.step] * 2, values, color=style["color"], linestyle=":", linewidth=1.6)
            pieces.append([])
        pieces[-1].append(point)
    for piece in pieces:
        steps = [point.step for point in piece]
        values = [point.estimate.value if point.estimate.resolved else math.nan for point in piece]
        ax.plot(steps, values, linewidth=1.6 if len(line.points) < 100 else 1.0, label=label, **style)
        label = "_"  # matplotlib leaves a label that begins with _ out of the legend, so that it names a run once
        if line.measured:
            _draw_intervals(ax, piece, style["color"], marker, opacity, shift)


def _draw_intervals(ax: Axes, piece: list[Point], colour: str, marker: str, opacity: float, shift: float) -> None:
    """A band from the low to the high ends, pale bars where the estimate is unresolved, a marker at each value.

    Pale bars of different runs are set apart by `shift` points, as they often are the same.
    """
    from matplotlib.transforms import ScaledTranslation

    figure = ax.figure
    beside = ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)  # type: ignore[union-attr]
    steps = np.array([point.step for point in piece])
    lows, highs = (np.array([getattr(point.estimate, side) for point in piece]) for side in ("low", "high"))
    known = np.isfinite(lows) & np.isfinite(highs)
    resolved = np.array([point.estimate.resolved for point in piece])
    ax.fill_between(steps, lows, highs, where=known & resolved, color=colour, alpha=opacity, linewidth=0)
    alone = known & resolved & ~_with_neighbour(known & resolved)
    ax.vlines(steps[alone], lows[alone], highs[alone], color=colour, alpha=0.35, linewidth=3)
    pale = known & ~resolved
    ax.update_datalim([*zip(steps[pale], lows[pale], strict=True), *zip(steps[pale], highs[pale], strict=True)])
    ax.autoscale_view()
    ax.vlines(steps[pale], lows[pale], highs[pale], color=colour, alpha=PALE, linewidth=2, transform=beside)
    for point in piece:
        looks: dict[str, Any] = {"color": colour}
        if not point.estimate.resolved:
            looks |= {"markerfacecolor": "white", "alpha": 2 * PALE, "transform": beside}
        ax.plot(point.step, point.estimate.value, marker, markersize=4.5, zorder=3, **looks)


def _with_neighbour(chosen: np.ndarray) -> np.ndarray:
    """For each entry, whether the one before or the one after it is chosen too."""
    padded = np.concatenate([[False], chosen, [False]])
    return padded[:-2] | padded[2:]


def _limit_y(ax: Axes, quantity: str, points: Sequence[Point]) -> None:
    """A logarithmic axis where values span decades; a share stays within 0 and 1."""
    values = [point.estimate.value for point in points if math.isfinite(point.estimate.value)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
    elif quantity.endswith("share"):
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))


def _add_legend(ax: Axes, drawn: Sequence[tuple[Run, Series]], *, unresolved: bool, place: str) -> None:
    """A legend with the names of the runs and the meaning of a hollow marker, if there are two entries or more."""
    from matplotlib.lines import Line2D

    found, labels = ax.get_legend_handles_labels()
    handles: list[Any] = list(found)
    markers = [run_marks(run, position)[0] for position, (run, _) in enumerate(drawn)]
    measured = [line.measured for _, line in drawn]
    for position, (handle, marker) in enumerate(zip(handles, markers, strict=True)):
        if measured[position] and marker:
            looks = {"color": handle.get_color(), "linestyle": handle.get_linestyle(), "marker": marker}
            handles[position] = Line2D([], [], linewidth=1.6, markersize=4.5, **looks)
    if unresolved:
        hollow = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": TEXT_COLOUR, "markersize": 5}
        handles.append(Line2D([], [], linestyle="", **hollow))
        labels.append("unresolved: pale, with its interval")
    if len(handles) > 1:
        add_legend(ax, handles, labels, place)
