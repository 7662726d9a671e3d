"""Figures of spectra. Every function draws on one Axes and returns it; none saves, shows or changes global settings.

Where a run or a study lacks part of what its config.json plans, a figure says so above its axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE
from spectra.operators.hessian.operator import HessianOperator
from spectra.runs.folder import HasRun, Run, open_run
from spectra.runs.series import Steps
from spectra.views.cumulative import draw_bands
from spectra.views.curves import Curve, curves_of, reasons
from spectra.views.densities import draw_densities
from spectra.views.directions import (
    Direction,
    default_radius,
    directions_of,
    draw_loss_along,
    draw_weights,
    most_layers,
    weights_by_layer,
)
from spectra.views.directions import loss_along as loss_on_line
from spectra.views.layers import SHOWN, draw_layers, height_of, table_of
from spectra.views.ridges import draw_ridges
from spectra.views.style import PANEL, forget, new_axes, note
from spectra.views.tails import draw_tails
from spectra.views.trajectories import all_series, draw_trajectories, runs_shown
from spectra.views.wording import unfinished_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cumulative(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = "last",
    level: float = CONFIDENCE,
    labels: Sequence[str] | None = None,
    scale: str = "symlog",
    legend: str = "auto",
) -> Axes:
    """Draw the share of eigenvalues below each value as a band that holds the whole curve, for each record.

    A line is drawn in the middle of the band where its half-width is at most .05; elsewhere the band is all that is
    known. The curves of one run are coloured by training step. Those of several runs have the colour and line that the
    runs' presentation names, else a colour for each run, and a marker and a hatch each.

    Args:
        spectra: A run, a probe, a study (all of its runs), a folder of a run or a study, a SpectralDensity, or a list
            of these.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        level: The probability with which each band holds its curve; see `SpectralDensity.band`.
        labels: A label for each curve, in place of training steps and names of runs.
        scale: Of the x axis: "symlog" (linear near zero, logarithmic beyond), "linear", or "auto", which is "symlog"
            where outliers would press the other eigenvalues into a line.
        legend: "outside" the axes, "inside", "none", or "auto" for inside in narrow axes and outside of wide ones.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, an option is not known, or labels and curves differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    with _axes(ax) as ax:
        draw_bands(ax, curves, level=level, scale=scale, legend=legend)
        note(ax, _remarks(spectra, curves))
    return ax


def tails(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = "last",
    level: float = CONFIDENCE,
    labels: Sequence[str] | None = None,
    side: str = "both",
    legend: str = "auto",
) -> Axes:
    """Draw the number of eigenvalues above t, and below -t, over t, on logarithmic axes, as bands.

    The bands follow from those of `cumulative`. An eigenvalue that is known, such as a deflated outlier, is a step of
    height 1. What lies below -t is dashed and hatched. A line is drawn where the number is known to a factor of 2.5.

    Args:
        spectra: What `cumulative` takes.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        level: The probability with which the bands of a spectrum hold for all t at once.
        labels: A label for each spectrum, in place of training steps and names of runs.
        side: "above", "below" or "both".
        legend: See `cumulative`.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, an option is not known, or labels and curves differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    with _axes(ax) as ax:
        draw_tails(ax, curves, level=level, side=side, legend=legend)
        note(ax, _remarks(spectra, curves))
    return ax


def density(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = None,
    level: float = CONFIDENCE,
    labels: Sequence[str] | None = None,
    scale: str = "auto",
    legend: str = "auto",
) -> Axes:
    """Draw the density of eigenvalues where it is resolved, and the mass known to be inside where it is not.

    The figure is a histogram whose cells are merged until the mass in each is known
    (`spectra.estimates.cells.density_cells`). A cell is filled between the bounds of its mean density, which hold for
    all cells at once. It is hatched where the mass is not known to a factor of 2.5, or the cell is too wide to show the
    shape of the density inside. Eigenvalues that are known to be zero are a bar at zero with their share; those that
    are known one by one are ticks at the bottom. Nothing is drawn beyond the smallest and the largest eigenvalue. For a
    density smoothed by a kernel see `SpectralDensity.density`.

    Args:
        spectra: What `cumulative` takes.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        level: The probability with which all masses of a spectrum lie in their intervals.
        labels: A label for each curve, in place of training steps and names of runs.
        scale: Scale of the x axis: "linear", "symlog" (linear near zero, logarithmic beyond) or "auto". "auto" is
            "symlog" where a few outliers would leave the other eigenvalues too little width.
        legend: See `cumulative`.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, an option is not known, or labels and curves differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    with _axes(ax) as ax:
        draw_densities([(ax, curves)], level=level, scale=scale, legend=legend)
        note(ax, _remarks(spectra, curves))
    return ax


def ridge(
    spectra: Any,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    steps: Steps = None,
    level: float = CONFIDENCE,
    labels: Sequence[str] | None = None,
    scale: str = "auto",
    legend: str = "auto",
) -> Axes:
    """Draw densities one above another, a row for each record, the first at the bottom.

    Each row is a density as `density` draws it, with a logarithmic height above its base line. The dark part of a cell
    lies between the bounds of its mean density. Of more than 16 records, 16 evenly spaced ones are drawn.

    Args:
        spectra: What `cumulative` takes.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        steps: The training steps whose spectra are drawn: one or several, None for all, "last" for the last record.
        level: The probability with which all masses of a spectrum lie in their intervals.
        labels: A label for each row, in place of training steps and names of runs.
        scale: Scale of the x axis; see `density`.
        legend: "none" leaves out what hatching means; else it stands inside.

    Returns:
        The axes.

    Raises:
        InputError: There is nothing to draw, an option is not known, or labels and rows differ in number.
    """
    curves = _with_labels(curves_of(spectra, mode=mode, steps=steps), labels)
    with _axes(ax) as ax:
        draw_ridges([(ax, curves)], level=level, scale=scale, legend=legend)
        note(ax, _remarks(spectra, curves))
    return ax


def trajectory(
    runs: Any, quantity: str, *, ax: Axes | None = None, mode: str | None = None, legend: str = "auto"
) -> Axes:
    """Draw a quantity over training steps: a line for each run, with its 95 % interval as a band.

    An unresolved estimate is pale: a bar for its interval and a hollow marker, without a line. A dotted vertical line
    joins two measurements at the same training step. A reference run with a single measurement is a horizontal line.
    Runs without the quantity are left out if another run has it.

    Args:
        runs: A run, a probe, a study (all of its runs), a folder of a run or a study, a list of these, a list of
            records, or a list of SpectralDensity, whose positions in the list stand for training steps.
        quantity: An estimate such as "rms", "loss", or a key of the records' extras or of the telemetry.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default each run's first.
        legend: See `cumulative`.

    Returns:
        The axes.

    Raises:
        InputError: No run has the quantity; the message lists what there is.
    """
    found = runs_shown(runs)
    drawn = all_series(found, quantity, mode)
    with _axes(ax) as ax:
        draw_trajectories(ax, found, drawn, quantity, legend=legend)
        note(ax, _unfinished(runs))
    return ax


def layers(
    blocks: Any,
    quantities: str | Sequence[str] = SHOWN,
    *,
    ax: Axes | None = None,
    mode: str | None = None,
    step: int | None = None,
) -> Axes:
    """Draw a heat map of curvature by layer: a row for each block, a column for each quantity or training step.

    A share is as dark as it is large. A size, |lambda_max| or a trace, is darker the fewer decades it lies below the
    largest of its column; below three decades it is palest. Unresolved estimates are hatched.

    Args:
        blocks: What `slq(op, blocks="layers")` or `trace(op, blocks="layers")` returns, {name: result}; or a run, a
            probe or a folder of a run that measured blocks.
        quantities: Keys of quantities such as "rms", a column each; or one key, whose values in a run are drawn with a
            column for each training step. An `Estimate` for each block is its own column.
        ax: Where to draw; by default on a new figure.
        mode: The Hessian mode; by default the run's first.
        step: The training step of a run that is drawn; by default the last.

    Returns:
        The axes.

    Raises:
        InputError: There are no blocks, or a quantity, mode or step is not there.

    Example:
        Which layers curve most::

            spectra.plots.layers(spectra.slq(operator, blocks="layers", probes=8, steps=30))
    """
    table = table_of(blocks, quantities, mode=mode, step=step)
    own = ax is None
    with _axes(ax) as ax:
        if own:
            ax.figure.set_size_inches(PANEL[0], height_of(table))  # type: ignore[union-attr]
        draw_layers(ax, table)
    return ax


def loss_along(
    op: HessianOperator,
    vectors: Any,
    *,
    ax: Axes | None = None,
    radius: float | None = None,
    points: int = 21,
    labels: Sequence[str] | None = None,
    legend: str = "auto",
) -> Axes:
    """Draw the loss along vectors through the current weights, with the quadratic that the curvature predicts.

    The losses are those of the operator's batches at theta + s v for unit vectors v. The dashed lines are
    L + s g . v + s^2 v . H v / 2. The model's weights are not touched.

    Args:
        op: The Hessian of the loss.
        vectors: `Eigenpairs` from `spectra.topk`, of which the pairs with the smallest and the largest eigenvalue are
            drawn; or a vector (n,), or vectors in the columns of (n, k).
        ax: Where to draw; by default on a new figure.
        radius: How far the vectors are followed to both sides, in units of the parameters. By default until the
            quadratic term of the steepest one is a tenth of the loss, at most a tenth of the norm of the weights.
        points: How many losses are computed along each vector.
        labels: A label for each vector.
        legend: See `cumulative`.

    Returns:
        The axes.

    Raises:
        InputError: The operator has no loss, the vectors do not fit it, or an option is out of range.
    """
    directions = _directions(op, vectors, labels)
    if points < 2:
        raise InputError(f"two points or more are expected along a vector, got points={points}")
    reach = default_radius(op, directions) if radius is None else radius
    if not 0 < reach < math.inf:
        raise InputError(f"the radius must be positive and finite, got {reach}")
    distances = np.linspace(-reach, reach, points)
    found = [(direction, loss_on_line(op, direction, distances)) for direction in directions]
    with _axes(ax) as ax:
        draw_loss_along(ax, found, legend=legend)
    return ax


def weight_by_layer(
    op: HessianOperator,
    vectors: Any,
    *,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
    legend: str = "auto",
) -> Axes:
    """Draw how much of each vector lies in each layer: the part of its squared norm.

    A tick marks the part of the parameters that a layer has, which is the part that a random vector would have there.
    Of more than 40 layers, or than have room, the innermost are merged.

    Args:
        op: The Hessian, which knows the names of the parameters.
        vectors: What `loss_along` takes.
        ax: Where to draw; by default on a new figure.
        labels: A label for each vector.
        legend: See `cumulative`.

    Returns:
        The axes.

    Raises:
        InputError: The operator is not that of a model, or the vectors do not fit it.
    """
    directions = _directions(op, vectors, labels)
    with _axes(ax) as ax:
        names, parts, sizes = weights_by_layer(op, directions, most=most_layers(ax))
        draw_weights(ax, names, parts, sizes, [direction.label for direction in directions], legend=legend)
    return ax


def _directions(op: Any, vectors: Any, labels: Sequence[str] | None) -> list[Direction]:
    """The vectors with the caller's labels, where there are any."""
    if not isinstance(op, HessianOperator):
        raise InputError(f"a HessianOperator is expected, which has a loss and parameters, got {type(op).__name__}")
    directions = directions_of(op, vectors)
    if labels is None:
        return directions
    if len(labels) != len(directions):
        raise InputError(f"expected one label for each of the {len(directions)} vectors, got {len(labels)}")
    return [replace(one, label=label) for one, label in zip(directions, labels, strict=True)]


@contextlib.contextmanager
def _axes(ax: Axes | None) -> Iterator[Axes]:
    """The caller's axes, or new ones, which are closed again where drawing fails."""
    drawn = new_axes() if ax is None else ax
    try:
        yield drawn
    except BaseException:
        if ax is None:
            forget(drawn)
        raise


def _remarks(shown: Any, curves: Sequence[Curve]) -> str:
    """What stands above a figure: what is missing of what was planned, and what cannot be relied on."""
    return "; ".join(filter(None, (_unfinished(shown), reasons(curves))))


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
