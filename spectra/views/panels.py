"""Figures of several panels: a panel for each group of runs, such as a bit-width, with what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE
from spectra.runs.folder import Run
from spectra.runs.series import Steps, as_runs, modes
from spectra.views.axis import eigenvalue_axis
from spectra.views.cumulative import draw_bands
from spectra.views.curves import curves_of
from spectra.views.densities import draw_densities
from spectra.views.ridges import draw_ridges
from spectra.views.style import TITLE_WIDTH, literal, new_figure, note, wrapped
from spectra.views.tails import draw_tails
from spectra.views.wording import unfinished_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("cumulative", "tails", "density", "ridge")
MOST_PANELS = 4  # in a row


def figure_of(runs: Sequence[Run], kind: str, *, mode: str | None = None, steps: Steps = "last") -> Figure:
    """Draw spectra of runs, side by side by group where there are several groups.

    Runs that the others are compared with stand in every panel. A ridge has a panel for each run.

    Args:
        runs: Runs and studies.
        kind: "cumulative", "tails", "density" or "ridge".
        mode: The Hessian mode; None for each run's first.
        steps: The training steps; see `spectra.plots.density`.

    Returns:
        The figure, which is not registered with pyplot.

    Raises:
        InputError: The kind is not known, or there is nothing to draw.
    """
    if kind not in KINDS:
        raise InputError(f"expected a figure of {', '.join(KINDS)}, got {kind!r}")
    found = [single for single in as_runs(list(runs)) if _has_spectra(single, mode)]
    if not found:
        curves_of(list(runs), mode=mode, steps=steps)  # says what is missing
    groups = [(literal(run.presentation.label), [run]) for run in found] if kind == "ridge" else grouped(found)
    if len(groups) == 1 or len(groups) > MOST_PANELS:
        if kind == "ridge" and len(groups) > 1:
            raise InputError(f"at most {MOST_PANELS} runs have ridges side by side, got {len(groups)}: name fewer")
        groups = [("", found)]
    figure, axes = new_figure(len(groups), share_y=kind != "ridge")
    panels = [(ax, curves_of(members, mode=mode, steps=steps)) for ax, (_, members) in zip(axes, groups, strict=True)]
    every = [curve for _, curves in panels for curve in curves]
    if kind == "density":
        draw_densities(panels, level=CONFIDENCE)
    elif kind == "ridge":
        draw_ridges(panels, level=CONFIDENCE, scale="auto")
    shared = eigenvalue_axis(every, "symlog")
    ranges = []
    for ax, curves in panels:
        if kind == "cumulative":
            draw_bands(ax, curves, level=CONFIDENCE, axis=shared, scale="symlog", legend="auto")
        elif kind == "tails":
            draw_tails(ax, curves, level=CONFIDENCE, side="both", legend="auto")
            ranges.append((ax.get_xlim(), ax.get_ylim()))
    if ranges:
        axes[0].set_xlim(min(x[0] for x, _ in ranges), max(x[1] for x, _ in ranges))
        axes[0].set_ylim(min(y[0] for _, y in ranges), max(y[1] for _, y in ranges))
    for ax, (name, _) in zip(axes, groups, strict=True):
        ax.set_title(wrapped(name, TITLE_WIDTH), fontsize=11, loc="left")
        if kind != "ridge":
            ax.label_outer()
    note(axes[-1], unfinished_words(list(runs)))
    return figure


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Each group's name and runs, with the runs that all are compared with in every group."""
    references = [run for run in runs if run.presentation.reference]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not run.presentation.reference:
            groups.setdefault(literal(run.presentation.group), []).append(run)
    if not groups:
        return [("", list(runs))]
    if all(len(members) == 1 for members in groups.values()):
        return [("", list(runs))]
    return [(name, members + references) for name, members in groups.items()]


def _has_spectra(run: Run, mode: str | None) -> bool:
    """Whether the run kept a spectrum of the mode."""
    return any(map(run.keeps_density, run.measured)) and (
        mode is None or mode in modes(run) or run.presentation.reference
    )
