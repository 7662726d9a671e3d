"""A quantity over the course of a run, as numbers: what figures and reports draw."""

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


@dataclass(frozen=True)
class Point:
    """A quantity at one training step.

    Attributes:
        step: The training step.
        estimate: The value with its interval.
        label: The label of its record, which tells apart what was measured at the same training step.
        again: Whether an earlier record of the same mode stands at the same training step.
    """

    step: int
    estimate: Estimate
    label: str = ""
    again: bool = False


@dataclass(frozen=True)
class Series:
    """A quantity over a run.

    Attributes:
        points: The points, in the order of measuring.
        measured: True for numbers of records; False for logged numbers, which have no interval and no labels.
    """

    points: tuple[Point, ...]
    measured: bool


def as_runs(runs: Any) -> list[Run]:
    """Open runs.

    Args:
        runs: A run, a study, the folder of either, or a list of these.

    Returns:
        The runs, with the runs of a study in its place.

    Raises:
        InputError: If a folder holds no run.
    """
    items = runs if isinstance(runs, list | tuple) else [runs]
    opened = [open_run(item) for item in items]
    return [single for run in opened for single in (run.runs or [run])]


def modes(run: Run) -> list[str]:
    """The Hessian modes measured in a run, in the order of the first spectrum of each."""
    return list(dict.fromkeys(record.mode for record in run.measured))


def select(run: Run, *, mode: str | None = None, steps: Steps = None) -> list[SpectrumRecord]:
    """The records of one mode at some training steps, in the order of measuring.

    Records of failed measurements are left out.

    Args:
        run: The run.
        mode: Which Hessian. None: the run's first.
        steps: A training step, several, "last" for the last record alone, or None for all.

    Returns:
        The records, at least one.

    Raises:
        InputError: If there is no such mode or step; the message says which there are.
    """
    records = run.measured
    if not records:
        failed = [record for record in run.records if not record.is_measured]
        why = f", its measurements failed ({failed[-1].reason})" if failed else ""
        raise InputError(f"{run.folder} holds no spectrum yet{why}: measure one first")
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


def measured_again(records: Sequence[SpectrumRecord]) -> list[bool]:
    """For each record, whether an earlier one of the same mode stands at the same training step."""
    places = [(record.mode, record.step) for record in records]
    return [place in places[:index] for index, place in enumerate(places)]


def series(run: Run, quantity: str, *, mode: str | None = None) -> Series:
    """A quantity over a run, from its records or its telemetry. Failed measurements are left out.

    Args:
        run: The run.
        quantity: The key of an estimate, a number of a record, of its extras or its checks, or a key of the
            telemetry. "loss" is that of the measured batches, "training_loss" that of the telemetry. What stands in
            both the records and the telemetry is taken from where there are more points of it.
        mode: Which Hessian, for numbers of records. None: the run's first.

    Returns:
        The points in order.

    Raises:
        InputError: If the run has no such quantity; the message lists those it has.
    """
    records = select(run, mode=mode) if run.measured else []
    from_records = tuple(
        Point(record.step, estimate, record.label, again)
        for record, again in zip(records, measured_again(records), strict=True)
        if (estimate := _of_record(record, quantity)) is not None
    )
    if from_records and quantity in ESTIMATES:
        return Series(from_records, measured=True)
    logged = _logged(run, "loss" if quantity == "training_loss" else quantity)
    if from_records and (quantity in ("loss", "gradient_norm") or len(from_records) > len(logged)):
        return Series(from_records, measured=True)
    if not logged:
        raise InputError(f"{run.folder} has no {quantity!r}: choose among {', '.join(available(run))}")
    return Series(logged, measured=False)


def available(run: Run) -> list[str]:
    """The quantities that a run holds, those that `spectra` knows first."""
    names: dict[str, None] = {}
    for record in run.measured:
        names |= dict.fromkeys((*record.estimates, "loss", "gradient_norm", *record.extras))
    for line in run.telemetry:
        names |= dict.fromkeys("training_loss" if key == "loss" else key for key in line if _is_number(line[key]))
    names.pop("step", None)
    return [name for name in QUANTITIES if name in names] + [name for name in names if name not in QUANTITIES]


def _logged(run: Run, key: str) -> tuple[Point, ...]:
    """The points of the telemetry's lines that have a training step and a number for the key."""
    lines = [line for line in run.telemetry if "step" in line and _is_number(line.get(key))]
    return tuple(Point(int(line["step"]), _without_interval(line[key])) for line in lines)


def _of_record(record: SpectrumRecord, quantity: str) -> Estimate | None:
    """The quantity as a record has it, None if it does not."""
    if quantity in record.estimates:
        return record.estimates[quantity]
    if quantity in ("loss", "gradient_norm"):
        return _without_interval(getattr(record, quantity))
    numbers = record.checks | record.extras
    return _without_interval(numbers[quantity]) if quantity in numbers else None


def _without_interval(number: float) -> Estimate:
    """A number as an estimate whose interval is that number."""
    return Estimate(float(number), float(number), float(number))


def _is_number(value: Any) -> bool:
    """Whether the value is a number other than NaN, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
