"""What an interactive view offers to choose from, and which spectra a choice shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.runs.folder import HasRun, Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import as_runs, modes, select
from spectra.views.curves import Curve, curves_of
from spectra.views.panels import grouped
from spectra.views.style import PALETTE, REPEATED_LINE, run_marks, run_style
from spectra.views.wording import listed


@dataclass(frozen=True)
class Choice:
    """What is chosen: the group of runs, the Hessian mode, the training step, and the runs that are switched off.

    Attributes:
        group: The name of a group of runs, such as a bit-width.
        mode: The Hessian mode; None for the first one of each run.
        step: The training step.
        hidden: Positions in the group of the runs that are not shown.
    """

    group: str
    mode: str | None
    step: int
    hidden: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shown:
    """A spectrum that a choice shows.

    Attributes:
        curve: The spectrum, and how static figures draw it.
        name: The name of its run, and which spectrum it is where there are several at its training step.
        negative_share: The share of eigenvalues below zero, as the run's tables have it.
        key: What tells the spectrum apart from all others.
    """

    curve: Curve
    name: str
    negative_share: Estimate
    key: tuple[str, str]


class Choices:
    """The groups, modes and training steps of some runs, and the spectra at each.

    Args:
        runs: A run, a probe, a study, the folder of either, or a list of these.

    Raises:
        InputError: None of them kept a spectrum.
    """

    def __init__(self, runs: Any) -> None:
        items = list(runs) if isinstance(runs, list | tuple) else [runs]
        for item in items:
            if isinstance(item, SpectralDensity | SpectrumRecord) or not isinstance(item, Run | HasRun | str | Path):
                raise InputError(
                    f"a run, a probe, a folder or a list of these is expected, got {type(item).__name__}: "
                    "spectra.plots.cumulative draws a SpectralDensity"
                )
        found = [run for run in as_runs(items) if any(map(run.keeps_density, run.measured))]
        if not found:
            curves_of(items)  # says what is missing
        self._groups = dict(grouped(found))
        self._densities: dict[tuple[str, str], SpectralDensity] = {}

    @property
    def groups(self) -> list[str]:
        """The names of the groups; "" for a single one without a name."""
        return list(self._groups)

    def runs(self, group: str) -> list[Run]:
        """The runs of a group, with those that all are compared with."""
        return self._groups[group]

    def modes(self, group: str) -> list[str | None]:
        """The Hessian modes to choose from; [None] where no run has several, which stands for the mode of each."""
        runs = self._groups[group]
        if all(len(modes(run)) < 2 for run in runs):
            return [None]
        return list(dict.fromkeys(mode for run in runs for mode in modes(run)))

    def steps(self, group: str, mode: str | None) -> list[int]:
        """The training steps at which a run of the group, other than a fixed level, kept a spectrum of the mode."""
        runs = self._groups[group]
        moving = [run for run in runs if not run.presentation.reference]
        found = {record.step for run in moving for record in _kept(run, mode)}
        return sorted(found or {record.step for run in runs for record in _kept(run, mode)})

    def first(self) -> Choice:
        """The choice that a view begins with: the last training step of the first mode of the first group."""
        group = self.groups[0]
        mode = self.modes(group)[0]
        return Choice(group, mode, self.steps(group, mode)[-1])

    def fitted(self, choice: Choice) -> Choice:
        """The choice with the nearest there is: a mode that the group lacks is its first, a step the nearest one."""
        there = self.modes(choice.group)
        mode = choice.mode if choice.mode in there else there[0]
        step = min(self.steps(choice.group, mode), key=lambda step: abs(step - choice.step))
        hidden = frozenset(place for place in choice.hidden if place < len(self._groups[choice.group]))
        return replace(choice, mode=mode, step=step, hidden=hidden)

    def shown(self, choice: Choice) -> list[Shown]:
        """The spectra of a choice. Colours and lines are those of static figures of the whole group."""
        found = []
        for position, run in enumerate(self._groups[choice.group]):
            if position not in choice.hidden:
                found += self._at(run, position, choice, several=len(self._groups[choice.group]) > 1)
        return found

    def lacking(self, choice: Choice) -> str:
        """Which of the runs that are switched on have no spectrum at the chosen step, in words; "" for none."""
        names = [
            run.presentation.label
            for position, run in enumerate(self._groups[choice.group])
            if position not in choice.hidden and not _chosen(run, choice)
        ]
        mode = f" of the mode {choice.mode}" if choice.mode else ""
        return f"No spectrum{mode} at step {choice.step}: {listed(names)}" if names else ""

    def reach(self, group: str, mode: str | None) -> list[Curve]:
        """The last spectrum of every run of a group, from which the axis gets its scale."""
        return [
            shown.curve
            for position, run in enumerate(self._groups[group])
            for record in _kept(run, mode)[-1:]
            for shown in self._at(run, position, Choice(group, mode, record.step), several=True)
        ]

    def records(self, group: str, mode: str | None) -> list[SpectrumRecord]:
        """Every record of the mode in a group whose spectrum was kept."""
        return [record for run in self._groups[group] for record in _kept(run, mode)]

    def _at(self, run: Run, position: int, choice: Choice, *, several: bool) -> list[Shown]:
        """The spectra of one run at the chosen step."""
        records = _chosen(run, choice)
        if not records:
            return []
        step = records[0].step
        found = []
        for record, drawn in zip(records, curves_of(run, mode=records[0].mode, steps=step), strict=True):
            curve = self._styled(drawn, run, position, several=several)
            key = (str(run.folder), str(record.lanczos))
            curve = replace(curve, density=self._densities.setdefault(key, curve.density))
            share = record.estimates.get("negative_share") or curve.density.negative_share()
            words = [run.presentation.label, f"step {step}" if step != choice.step else "", drawn.repeated]
            found.append(Shown(curve, ", ".join(filter(None, words)), share, key))
        return found

    @staticmethod
    def _styled(curve: Curve, run: Run, position: int, *, several: bool) -> Curve:
        """The curve as static figures show the run: alone, or among the others of its group."""
        if not several:
            style = {"color": PALETTE[0], "linestyle": REPEATED_LINE if curve.repeated else "solid"}
            return replace(curve, style=style)
        marker, hatch = run_marks(run, position)
        style = run_style(run, position)
        if curve.repeated:
            style["linestyle"] = REPEATED_LINE
        return replace(curve, style=style, marker=marker, hatch=hatch)


def _kept(run: Run, mode: str | None) -> list[SpectrumRecord]:
    """The records of a mode whose Lanczos matrices were kept; none where the run lacks the mode."""
    if not run.measured or (mode is not None and mode not in modes(run)):
        return []
    return [record for record in select(run, mode=mode) if run.keeps_density(record)]


def _chosen(run: Run, choice: Choice) -> list[SpectrumRecord]:
    """The records of a run that a choice shows: those of its step, or the single one of a run that is a level."""
    records = _kept(run, choice.mode)
    if run.presentation.reference and len(records) == 1:
        return records
    return [record for record in records if record.step == choice.step]
