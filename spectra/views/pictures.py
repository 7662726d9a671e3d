"""The figures of a report, with captions and descriptions for readers who cannot see them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.backend.errors import InputError
from spectra.estimates.estimate import CONFIDENCE
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.folder import Run
from spectra.runs.series import available, modes, select, series
from spectra.views import plots
from spectra.views.curves import curves_of
from spectra.views.densities import draw_densities
from spectra.views.layers import SHOWN, draw_layers, height_of, table_of
from spectra.views.panels import figure_of
from spectra.views.style import TITLE_WIDTH, literal, new_figure, note, wrapped
from spectra.views.wording import describe, listed, sentence_case, unfinished_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_A_MODE = (*ESTIMATES, "zero_share", "loss", "gradient_norm")  # other quantities do not depend on the mode
LEFT_OUT = ("frobenius", "learning_rate")  # the Frobenius norm is rms times a constant
FIRST = ("validation_loss", "training_loss")  # quantities whose figures come first
MAJOR = ("validation_loss", "training_loss", "negative_share", "lambda_max", "lambda_min", "rms")  # shown at once
MAX_PANELS = 2  # most panels of a figure
RIDGE_STEPS = 3  # measured training steps from which a run has a ridge
ABOUT = {
    "cumulative": "Share of eigenvalues below each value, as a band that holds the whole curve with 95 % probability",
    "tails": "Number of eigenvalues above t and below −t, as bands",
}


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: The name of its file, without the ending.
        figure: The figure of matplotlib.
        caption: What it shows, in a sentence.
        alternative: The caption and the main numbers in words, for readers who cannot see it.
    """

    name: str
    figure: Figure
    caption: str
    alternative: str

    @property
    def minor(self) -> bool:
        """Whether it is about a quantity that few readers look for."""
        return self.name.startswith("trajectory-") and not any(
            self.name.startswith(f"trajectory-{key}") for key in MAJOR
        )

    @property
    def wide(self) -> bool:
        """Whether it needs the full width of a page."""
        return self.figure.get_figwidth() > 8


def figures(run: Run | Sequence[Run]) -> dict[str, Figure]:
    """Draw every figure of the report of a run or a study.

    Args:
        run: A run or a study, or several of them.

    Returns:
        The figures by name, such as "density" or "trajectory-rms". They are not registered with pyplot, so they need
        not be closed.
    """
    pictures = density_pictures(run) + layer_pictures(run) + trajectory_pictures(run)
    return {picture.name: picture.figure for picture in pictures}


def density_pictures(run: Run | Sequence[Run]) -> list[Picture]:
    """The figures of spectra: cumulative bands first, tails, densities, and ridges where there are several steps.

    Bands and tails have a figure for each Hessian mode, with the last spectra of a group of runs in a panel. Densities
    and ridges have the runs of a group side by side, two in a figure, and there is one of all last densities.
    """
    given = [run] if isinstance(run, Run) else list(run)
    runs = [single for single in single_runs(given) if any(map(single.keeps_density, single.measured))]
    several = len(given) > 1 or bool(given[0].runs)
    pictures: list[Picture] = []
    for kind, mode in [(kind, mode) for kind in ABOUT for mode in _modes(runs) if runs]:
        with contextlib.suppress(InputError):  # a kind of figure that these spectra have nothing to draw for
            pictures.append(_of_groups(kind, runs, mode, given))
    for mode in _modes(runs):
        having = [single for single in runs if mode is None or mode in modes(single)]
        for group, members in _groups(having).items():
            for first in range(0, len(members), MAX_PANELS):
                name = ("density", group if several else "", str(first or ""), mode)
                beside = members[first : first + MAX_PANELS]
                pictures.append(_side_by_side(_file_name(*name), beside, mode))
                if any(len(select(single, mode=mode)) >= RIDGE_STEPS for single in beside):
                    pictures.append(_ridges(_file_name("ridge", *name[1:]), beside, mode))
        if len(having) > 1:
            pictures.append(_last_spectra(having, mode, given))
    return _with_distinct_names(pictures)


def trajectory_pictures(run: Run | Sequence[Run]) -> list[Picture]:
    """A figure for each quantity that a run holds at two training steps or more, and for each Hessian mode it has."""
    given = [run] if isinstance(run, Run) else list(run)
    runs = single_runs(given)
    names = dict.fromkeys(name for single in runs for name in available(single) if name not in LEFT_OUT)
    pictures = []
    for quantity in sorted(names, key=lambda name: name not in FIRST):
        for mode in _modes(runs) if quantity in OF_A_MODE else [None]:
            counts = [_count_steps(single, quantity, mode) for single in runs]
            moving = [single for single, count in zip(runs, counts, strict=True) if count > 1]
            levels = [
                single
                for single, count in zip(runs, counts, strict=True)
                if count == 1 and single.presentation.reference
            ]
            if moving:
                pictures.append(_trajectory(moving + levels, quantity, mode, given))
    return _with_distinct_names(pictures)


def single_runs(given: Sequence[Run]) -> list[Run]:
    """Runs, with those of a study in its place."""
    return [single for run in given for single in (run.runs or [run])]


def _side_by_side(name: str, runs: list[Run], mode: str | None) -> Picture:
    """The densities of runs along the training, a panel for each."""
    figure, axes = new_figure(len(runs))
    draw_densities(
        [(ax, curves_of(single, mode=mode)) for ax, single in zip(axes, runs, strict=True)], level=CONFIDENCE
    )
    _title(axes, runs)
    for ax in axes:
        ax.label_outer()
    names = listed(single.presentation.label for single in runs)
    along = " along the training" if any(len(select(single, mode=mode)) > 1 for single in runs) else ""
    caption = f"Density of eigenvalues{along} of {names}, {_mode_in_words(runs, mode)}."
    return Picture(name, figure, caption, f"{caption} {_ends_in_words(runs, mode)}")


def _of_groups(kind: str, runs: list[Run], mode: str | None, given: list[Run]) -> Picture:
    """The last spectra of runs, a panel for each group."""
    having = [single for single in runs if mode is None or mode in modes(single)]
    figure = figure_of(having, kind, mode=mode)
    note(figure.axes[-1], unfinished_words(given))
    names = listed(single.presentation.label for single in having)
    caption = f"{ABOUT[kind]}: the last spectrum of {names}, {_mode_in_words(having, mode)}."
    return Picture(_file_name(kind, mode), figure, caption, f"{caption} {_ends_in_words(having, mode)}")


def _ridges(name: str, runs: list[Run], mode: str | None) -> Picture:
    """The densities of runs along the training, a row for each training step and a panel for each run."""
    having = [single for single in runs if mode is None or mode in modes(single)]
    figure = figure_of(having, "ridge", mode=mode, steps=None)
    names = listed(single.presentation.label for single in having)
    caption = f"Density of eigenvalues of {names}, a row for each training step, {_mode_in_words(having, mode)}."
    return Picture(name, figure, caption, f"{caption} {_ends_in_words(having, mode)}")


def _title(axes: Sequence[Axes], runs: Sequence[Run]) -> None:
    """The name of each run above its panel where there are several, and what is missing of it."""
    for ax, single in zip(axes, runs, strict=True):
        title = wrapped(literal(single.presentation.label), TITLE_WIDTH) if len(runs) > 1 else ""
        lines = filter(None, (title, unfinished_words([single])))
        ax.set_title("\n".join(lines), fontsize=11, loc="left")


def _last_spectra(runs: list[Run], mode: str | None, given: list[Run]) -> Picture:
    """The last density of every run of a study in one panel."""
    figure, (ax,) = new_figure()
    plots.density(runs, ax=ax, mode=mode, steps="last")
    note(ax, unfinished_words(given))
    caption = f"The last spectrum of every run, {_mode_in_words(runs, mode)}."
    return Picture(_file_name("density-last", mode), figure, caption, f"{caption} {_ends_in_words(runs, mode)}")


def _trajectory(runs: list[Run], quantity: str, mode: str | None, given: list[Run]) -> Picture:
    """A quantity over the training steps of runs, which belong to the runs and studies given."""
    figure, (ax,) = new_figure()
    plots.trajectory(runs, quantity, ax=ax, mode=mode)
    note(ax, unfinished_words(given))
    about = describe(runs, quantity)
    caption = sentence_case(about.name) + (f": {about.meaning}" if about.meaning else "")
    caption += f", Hessian mode {mode}." if mode else "."
    courses = []
    for single in runs:
        points = series(single, quantity, mode=mode).points
        first, last = points[0].estimate.value, points[-1].estimate.value
        course = f"from {first:.3g} to {last:.3g}" if len(points) > 1 else f"{first:.3g}"
        courses.append(f"{single.presentation.label} {course}")
    return Picture(_file_name("trajectory", quantity, mode), figure, caption, f"{caption} {listed(courses)}.")


def _ends_in_words(runs: list[Run], mode: str | None) -> str:
    """The smallest and largest eigenvalue of the last spectrum of each run, as far as its record has them."""
    parts = []
    for run in runs:
        record = select(run, mode=mode, steps="last")[0]
        low, high = record.estimates.get("lambda_min"), record.estimates.get("lambda_max")
        if low is not None and high is not None:
            parts.append(f"{run.presentation.label} at step {record.step} from {low.value:.3g} to {high.value:.3g}")
    return f"Eigenvalues reach: {listed(parts)}." if parts else ""


def _modes(runs: list[Run]) -> list[str | None]:
    """The modes that figures are made for: [None] where no run has several, which stands for the mode of each run."""
    if all(len(modes(single)) < 2 for single in runs):  # none has blocks either
        return [None]
    return list(dict.fromkeys(mode for single in runs for mode in whole_modes(single)))


def whole_modes(run: Run) -> list[str]:
    """The Hessian modes of a run without those of its blocks, which have heat maps; of blocks alone all of them."""
    whole = {record.mode for record in run.measured if not record.block}
    return [mode for mode in modes(run) if mode in whole or not whole]


def layer_pictures(run: Run | Sequence[Run]) -> list[Picture]:
    """The heat maps of the runs that measured blocks: all quantities at the end, and the size along the training."""
    given = [run] if isinstance(run, Run) else list(run)
    pictures = []
    for single in single_runs(given):
        steps = {record.step for record in single.measured if record.block}
        name = single.presentation.label
        if steps:
            caption = f"Curvature by layer of {name} at step {max(steps)}, the Hessian in the parameters of each alone."
            pictures.append(_heat_map(_file_name("layers", name), single, SHOWN, caption))
        if len(steps) > 1:
            caption = f"Root-mean-square eigenvalue by layer of {name} over training steps."
            pictures.append(_heat_map(_file_name("layers-rms", name), single, "rms", caption))
    return _with_distinct_names(pictures)


def _heat_map(name: str, run: Run, quantities: str | Sequence[str], caption: str) -> Picture:
    """A heat map of the blocks of a run, in its first mode."""
    figure, (ax,) = new_figure()
    table = table_of(run, quantities, mode=None, step=None)
    figure.set_figheight(height_of(table))
    draw_layers(ax, table)
    return Picture(name, figure, caption, caption)


def _mode_in_words(runs: list[Run], mode: str | None) -> str:
    """The Hessian mode for a caption; all modes of the runs where none is given."""
    return f"Hessian mode {mode or listed(dict.fromkeys(name for single in runs for name in modes(single)))}"


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each group, by the name of the group."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.presentation.group, []).append(run)
    return groups


def _count_steps(run: Run, quantity: str, mode: str | None) -> int:
    """At how many training steps the run holds a finite value of the quantity."""
    if quantity not in available(run) or (mode is not None and mode not in modes(run)):
        return 0
    points = series(run, quantity, mode=mode).points
    return len({point.step for point in points if math.isfinite(point.estimate.value)})


def _file_name(*parts: str | None) -> str:
    """Parts joined by hyphens; a hyphen replaces characters that do not belong in a file name."""
    cleaned = (re.sub(r"[^\w.]+", "-", part or "").strip("-.") for part in parts)
    return "-".join(part for part in cleaned if part)


def _with_distinct_names(pictures: list[Picture]) -> list[Picture]:
    """The pictures, numbered where two would have the same name."""
    distinct: dict[str, Picture] = {}
    for picture in pictures:
        name, number = picture.name, 2
        while name in distinct:
            name, number = f"{picture.name}-{number}", number + 1
        distinct[name] = replace(picture, name=name)
    return list(distinct.values())
