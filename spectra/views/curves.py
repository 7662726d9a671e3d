"""Which spectra a figure shows, what a legend calls them, and how their lines look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.runs.folder import HasRun, Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import Steps, as_runs, measured_again, modes, select
from spectra.views.style import (
    HATCHES,
    MARKERS,
    PALETTE,
    REPEATED_LINE,
    literal,
    run_marks,
    run_style,
    step_colour,
)
from spectra.views.wording import record_words

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN_ZEROS = 0.02  # smallest share of exact zeros that a legend names


@dataclass(frozen=True)
class Curve:
    """A spectrum and how it is drawn.

    Attributes:
        density: The spectrum.
        label: What a legend calls it.
        style: Keywords of matplotlib for a line.
        step: The training step if the colour stands for it, else None.
        repeated: What a second spectrum at the same training step is called, such as "after the restart"; else "".
        marker: The marker that tells it apart without colour; "" for none.
        hatch: The hatch of its bands; "" for none.
        place: The training step it was measured at, or its position among the spectra given.
    """

    density: SpectralDensity
    label: str
    style: dict[str, Any]
    step: int | None = None
    repeated: str = ""
    marker: str = ""
    hatch: str = ""
    place: int = 0

    @property
    def colour(self) -> Any:
        """The colour of everything that belongs to it."""
        return self.style["color"]

    @property
    def opacity(self) -> float:
        """The opacity of its line."""
        return self.style.get("alpha", 1.0)


def curves_of(spectra: Any, *, mode: str | None = None, steps: Steps = None) -> list[Curve]:
    """The curves that a figure of spectra shows, one for each record of each run and for each SpectralDensity.

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
            curves.append(_curve_of_density(item, position, len(items)))
    if not curves:
        raise InputError("there is no spectrum to draw: give a run, a SpectralDensity or a list of these")
    return curves


def _curve_of_density(item: Any, position: int, count: int) -> Curve:
    """The curve of a density that belongs to no run."""
    if isinstance(item, SpectrumRecord):
        raise InputError(
            f"a record (here of step {item.step}) holds numbers, and not the Lanczos matrices that a curve is drawn "
            "from: give its run, with steps=[...], or run.density(record)"
        )
    if not isinstance(item, SpectralDensity):
        raise InputError(f"a run, a SpectralDensity or a list of these is expected, got {type(item).__name__}")
    return Curve(
        item,
        "spectrum" if count == 1 else f"spectrum {position + 1}",
        {"color": PALETTE[position % len(PALETTE)], "linestyle": "solid"},
        marker=MARKERS[position % len(MARKERS)] if count > 1 else "",
        hatch=HATCHES[position % len(HATCHES)] if count > 1 else "",
        place=position,
    )


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
        colour = PALETTE[0] if len(records) == 1 else step_colour(record.step, last)
        style = {"color": colour, "linestyle": REPEATED_LINE if repeated else "solid"}
        label = f"step {record.step}{_zeros(density)}"
        curves.append(Curve(density, label, style, record.step, repeated, place=record.step))
    return curves


def _curves_of_several(run: Run, mode: str | None, steps: Steps, position: int) -> list[Curve]:
    """The curves of a run that is drawn with others: colour, line and marker are the run's, earlier steps paler."""
    records = _selected(run, mode, steps)
    last = max(record.step for record, _ in records)
    name = literal(run.presentation.label)
    marker, hatch = run_marks(run, position)
    curves = []
    for record, repeated in records:
        density = run.density(record)
        style = run_style(run, position) | {"alpha": 0.35 + 0.65 * record.step / last if last else 1.0}
        words = f"{name}, step {record.step}" + (f", {repeated}" if repeated else "")
        label = words + _zeros(density)
        curves.append(Curve(density, label, style, marker=marker, hatch=hatch, place=record.step))
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
    """The share of eigenvalues that are known to be zero, for a legend."""
    zeros = density.zero_share()
    return f", {zeros:.0%}\u00a0at\u00a00" if zeros >= SHOWN_ZEROS else ""


def reasons(curves: Sequence[Curve]) -> str:
    """Why the spectra cannot be relied on, in words; "" where nothing speaks against them."""
    found = [curve.density.origin.unverified for curve in curves]
    return "a check of the operator failed: not to be relied on" if any(found) else ""
