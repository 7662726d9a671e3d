"""A quantity over the course of a run, as numbers: what plots and reports draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES, QUANTITIES
from spectra.runs.folder import Run, open_run
from spectra.runs.record import SpectrumRecord

Steps = int | Sequence[int] | Literal["last"] | None
AFTER_RESET = "after-reset"






@dataclass(frozen=True)
class Point:
    """A quantity at one step of training; label tells apart what was measured at the same step."""

    step: int
    estimate: Estimate
    label: str = ""


@dataclass(frozen=True)
class Series:
    """A quantity over a run. `measured` is False for logged numbers, which have no interval."""

    points: tuple[Point, ...]
    measured: bool


def as_runs(runs: Any) -> list[Run]:
    """Runs from a run, a study, the folder of either, or a list of these. A study stands for the runs in it."""
    items = runs if isinstance(runs, list | tuple) else [runs]
    opened = [open_run(item) for item in items]
    return [single for run in opened for single in (run.runs or [run])]




def modes(run: Run) -> list[str]:
    """The Hessian modes measured in a run, in the order of the first record of each."""
    return list(dict.fromkeys(record.mode for record in run.records))


def select(run: Run, *, mode: str | None = None, steps: Steps = None) -> list[SpectrumRecord]:
    """The records of one mode (None: the run's first) at the given steps, in the order of measuring.

    steps: None for all, "last" for the last record alone, a step or several.
    Raises InputError naming what there is where nothing is found.
    """
    records = run.records
    if not records:
        raise InputError(f"{run.folder} holds no spectrum yet: measure one first")
    known = modes(run)
    if mode is not None and mode not in known:
        raise InputError(f"expected one of the modes {', '.join(known)} of {run.folder}, got {mode!r}")
    records = [record for record in records if record.mode == (mode or known[0])]
    if steps is None:
        return records
    if steps == "last":
        return records[-1:]
    wanted = [steps] if isinstance(steps, int) else list(steps)
    measured = [record.step for record in records]
    if missing := [step for step in wanted if step not in measured]:
        listed = ", ".join(str(step) for step in dict.fromkeys(measured))
        raise InputError(f"{run.folder} has no spectrum of step {missing[0]}: choose among {listed}")
    return [record for record in records if record.step in wanted]


def series(run: Run, quantity: str, *, mode: str | None = None) -> Series:
    """A quantity over the run: an estimate, a number of a record or of its extras, or one of the telemetry.

    What stands in both the extras and the telemetry is taken from where there are more points of it. "loss" is that
    of the measured batches, "training_loss" the telemetry's. Raises InputError listing what the run has.
    """
    records = select(run, mode=mode) if run.records else []
    from_records = [
        Point(record.step, estimate, record.label)
        for record in records
        if (estimate := _of_record(record, quantity)) is not None
    ]
    if from_records and quantity in ESTIMATES:
        return Series(tuple(from_records), measured=True)
    key = "loss" if quantity == "training_loss" or (quantity == "loss" and not from_records) else quantity
    logged = [
        Point(int(line["step"]), _exact(line[key]))
        for line in run.telemetry
        if "step" in line and _is_number(line.get(key))
    ]
    if (quantity not in ("loss", "gradient_norm") and len(logged) >= len(from_records)) or not from_records:
        if not logged:
            raise InputError(f"{run.folder} has no {quantity!r}: choose among {', '.join(available(run))}")
        return Series(tuple(logged), measured=False)
    return Series(tuple(from_records), measured=True)


def available(run: Run) -> list[str]:
    """The quantities that a run holds, those that are known here first."""
    names: dict[str, None] = {}
    for record in run.records:
        names |= dict.fromkeys((*record.estimates, "loss", "gradient_norm", *record.extras))
    for line in run.telemetry:
        names |= dict.fromkeys("training_loss" if key == "loss" else key for key in line if _is_number(line[key]))
    names.pop("step", None)
    return [name for name in QUANTITIES if name in names] + [name for name in names if name not in QUANTITIES]


def _of_record(record: SpectrumRecord, quantity: str) -> Estimate | None:
    if quantity in record.estimates:
        return record.estimates[quantity]
    if quantity in ("loss", "gradient_norm"):
        return _exact(getattr(record, quantity))
    return _exact(record.extras[quantity]) if quantity in record.extras else None


def _exact(number: float) -> Estimate:
    return Estimate(float(number), float(number), float(number))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
