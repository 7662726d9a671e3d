"""The figures of a report: which there are for a run or a study, with captions and the same in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from spectra.estimates.quantities import ESTIMATES, describe
from spectra.operators.base import Preflight
from spectra.runs.folder import Run
from spectra.runs.series import available, modes, select, series
from spectra.views import plots
from spectra.views.densities import curves_of, draw_densities
from spectra.views.style import is_reference, new_figure, run_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_A_MODE = (*ESTIMATES, "zero_share", "loss", "gradient_norm")  # the others do not depend on which Hessian is meant
CHECKS = tuple(field.name for field in fields(Preflight))  # they say how well was measured, not what
LEFT_OUT = ("frobenius", "learning_rate", *CHECKS)
FIRST = ("validation_loss", "training_loss")
MOST_PANELS = 2


@dataclass(frozen=True)
class Picture:
    """A figure, the name it would be saved under, its caption, and what it shows in words for who cannot see it."""

    name: str
    figure: Figure
    caption: str
    alternative: str

    @property
    def wide(self) -> bool:
        """Whether it wants the full width of a page."""
        return self.figure.get_figwidth() > 8


def figures(run: Run) -> dict[str, Figure]:
    """Every figure of the report of a run or a study, by name, to save or to show."""
    return {picture.name: picture.figure for picture in density_pictures(run) + trajectory_pictures(run)}


def density_pictures(run: Run) -> list[Picture]:
    """A density figure for each bit-width (or run) and Hessian mode, and for a study one of all the last spectra."""
    pictures = []
    runs = [single for single in (run.runs or [run]) if any(record.lanczos for record in single.records)]
    for mode in _modes(runs):
        suffix = f"-{mode}" if mode else ""
        having = [single for single in runs if mode is None or mode in modes(single)]
        for group, members in _groups(having).items():
            name = f"density-{group}" if run.runs else "density"
            pictures += [
                _densities(f"{name}{f'-{first}' if first else ''}{suffix}", members[first : first + MOST_PANELS], mode)
                for first in range(0, len(members), MOST_PANELS)
            ]
        if len(having) > 1:
            figure, (ax,) = new_figure()
            plots.density(having, ax=ax, mode=mode, steps="last")
            caption = f"The last spectrum of every run, {_mode_in_words(having, mode)}."
            pictures.append(Picture(f"density-last{suffix}", figure, caption, f"{caption} {_ends(having, mode)}"))
    return pictures


def trajectory_pictures(run: Run) -> list[Picture]:
    """A figure for each quantity that a run holds at two steps or more, and for each Hessian mode where it matters."""
    runs = run.runs or [run]
    names = dict.fromkeys(name for single in runs for name in available(single) if name not in LEFT_OUT)
    pictures = []
    for quantity in sorted(names, key=lambda name: name not in FIRST):
        for mode in _modes(runs) if quantity in OF_A_MODE else [None]:
            moving = [single for single in runs if _steps(single, quantity, mode) > 1]
            if moving:
                levels = [single for single in runs if is_reference(single) and _steps(single, quantity, mode) == 1]
                pictures.append(_trajectory(moving + levels, quantity, mode))
    return pictures


def _densities(name: str, runs: list[Run], mode: str | None) -> Picture:
    figure, axes = new_figure(len(runs))
    draw_densities([(ax, curves_of(single, mode=mode)) for ax, single in zip(axes, runs, strict=True)])
    for ax, single in zip(axes, runs, strict=True):
        ax.set_title(run_name(single) if len(runs) > 1 else "", fontsize=11, loc="left")
        ax.label_outer()
    along = " along the training" if any(len(select(single, mode=mode)) > 1 for single in runs) else ""
    caption = f"Density of eigenvalues{along} of {_listed(map(run_name, runs))}, {_mode_in_words(runs, mode)}."
    return Picture(name, figure, caption, f"{caption} {_ends(runs, mode)}")


def _trajectory(runs: list[Run], quantity: str, mode: str | None) -> Picture:
    figure, (ax,) = new_figure()
    plots.trajectory(runs, quantity, ax=ax, mode=mode)
    about = describe(quantity)
    caption = f"{about.name[0].upper()}{about.name[1:]}" + (f": {about.meaning}" if about.meaning else "")
    caption += f", Hessian mode {mode}." if mode else "."
    courses = []
    for single in runs:
        points = series(single, quantity, mode=mode).points
        first, last = points[0].estimate.value, points[-1].estimate.value
        course = f"from {first:.3g} to {last:.3g}" if len(points) > 1 else f"{first:.3g}"
        courses.append(f"{run_name(single)} {course}")
    suffix = f"-{mode}" if mode else ""
    return Picture(f"trajectory-{quantity}{suffix}", figure, caption, f"{caption} {_listed(courses)}.")


def _ends(runs: list[Run], mode: str | None) -> str:
    """Between which eigenvalues the last spectrum of each run lies, as far as its record says."""
    parts = []
    for run in runs:
        record = select(run, mode=mode, steps="last")[0]
        low, high = record.estimates.get("lambda_min"), record.estimates.get("lambda_max")
        if low is not None and high is not None:
            parts.append(f"{run_name(run)} at step {record.step} from {low.value:.3g} to {high.value:.3g}")
    return f"Eigenvalues reach: {_listed(parts)}." if parts else ""


def _modes(runs: list[Run]) -> list[str | None]:
    """The modes that figures are made for: where no run has several, None, which is the one of each run."""
    if all(len(modes(single)) < 2 for single in runs):
        return [None]
    return list(dict.fromkeys(mode for single in runs for mode in modes(single)))


def _mode_in_words(runs: list[Run], mode: str | None) -> str:
    return f"Hessian mode {mode or _listed(dict.fromkeys(name for single in runs for name in modes(single)))}"


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by bit-width, each on its own where it has none: what belongs side by side."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        bits = run.config.get("bits")
        name = f"{bits:g}bit" if isinstance(bits, int | float) else run.folder.resolve().name
        groups.setdefault(name, []).append(run)
    return groups


def _steps(run: Run, quantity: str, mode: str | None) -> int:
    """At how many steps the run holds the quantity."""
    if quantity not in available(run) or (mode is not None and mode not in modes(run)):
        return 0
    points = series(run, quantity, mode=mode).points
    return len({point.step for point in points if math.isfinite(point.estimate.value)})


def _listed(items) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last
