"""Resuming a study that was interrupted: which runs are finished, and where the others go on.

A run is finished if every spectrum and every validation loss that its settings ask for is on the disk. It is kept. Any
other run goes on from its last checkpoint, or starts again in an empty folder where it has none, and ends with the same
records as a run that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.study.config import REFERENCE, StudyConfig
from qat.study.plan import PlannedRun
from qat.training.checkpoints import Checkpoint, last_checkpoint, remove_checkpoints
from qat.training.winq import reset_steps
from spectra.runs.folder import CONFIG, LANCZOS, RECORDS, TELEMETRY, Run, check_free, is_recorded, refuse_differences
from spectra.runs.jsonlines import plain
from spectra.runs.lock import WriterLock

NOT_COMPARED = ("out", "workers", "presentation", "save_every")  # they change no number

Curve = tuple[tuple[int, float], ...]


def planned_marks(config: StudyConfig, method: str) -> tuple[tuple[int, str], ...]:
    """The training steps at which a run is measured, with the labels of the records.

    Args:
        config: The study's settings.
        method: "baseline", "winq", or "full-precision", which is measured at its start and its end alone.

    Returns:
        Pairs (training step, label) in the order of measuring.
    """
    if method == REFERENCE:
        return (0, "start"), (config.train.steps, "end")
    resets = set(reset_steps(config.winq.every, config.train.steps)) if method == "winq" else set()
    marks = [(0, "start")]
    for step in sorted({*config.measuring_steps(), *resets}):
        marks += [(step, "before-reset"), (step, "after-reset")] if step in resets else [(step, "quarter")]
    return (*marks, (config.train.steps, "end"))


def planned_records(config: StudyConfig, method: str) -> int:
    """How many records a finished run has."""
    return len(planned_marks(config, method)) * len(measured_modes(config, method))


def measured_modes(config: StudyConfig, method: str) -> tuple[str, ...]:
    """The Hessians that are measured of a run."""
    return ("full",) if method == REFERENCE else config.modes


def validation_curve(run: Run) -> Curve:
    """The validation losses in a run's telemetry: pairs (training step, loss)."""
    return tuple((line["step"], line["validation_loss"]) for line in run.telemetry if "validation_loss" in line)


def is_finished(run: Run, config: StudyConfig, method: str) -> bool:
    """Whether a run has every spectrum and every validation loss.

    Args:
        run: The run.
        config: The study's settings.
        method: "baseline" or "winq".

    Returns:
        Whether nothing is missing.
    """
    planned = [(*mark, mode) for mark in planned_marks(config, method) for mode in measured_modes(config, method)]
    if [(record.step, record.label, record.mode) for record in run.records] != planned:
        return False
    return tuple(step for step, _ in validation_curve(run)) == config.train.evaluation_steps()


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder holds nothing, or what the same settings have left there.

    Args:
        folder: The folder; it may not be there.
        settings: Entries of config.json; others that stand there are not compared.

    Raises:
        InputError: Something else is recorded there; a difference of the settings is named.
    """
    if not is_recorded(folder) or not (folder / CONFIG).is_file():
        check_free(folder)
        return
    run = Run(folder)
    others = {name for name in run.config if name not in settings}
    refuse_differences(run, plain(dict(settings)), {*NOT_COMPARED, *others})


def go_back(folder: Path) -> Checkpoint | None:
    """Take a run that was interrupted back to its last checkpoint: what was recorded later is removed.

    Without a checkpoint all its records are removed. Other files in its folder stay. Its config.json stays too, so that
    the folder is still that of a run if this is interrupted.

    Args:
        folder: The run's folder; it may not be there.

    Returns:
        The checkpoint; None where the run starts again.

    Raises:
        InputError: Another process writes there.
    """
    if not (folder / CONFIG).is_file():
        return None
    lock = WriterLock(folder)
    checkpoint = last_checkpoint(folder)
    sizes = {} if checkpoint is None else checkpoint.sizes
    for name in (RECORDS, TELEMETRY):
        if (folder / name).exists():
            os.truncate(folder / name, sizes.get(name, 0))
    if checkpoint is None:
        (folder / TELEMETRY).unlink(missing_ok=True)
    named = set() if checkpoint is None else {record.lanczos for record in Run(folder).records}
    for path in (folder / LANCZOS).glob("*-step-*"):
        if f"{LANCZOS}/{path.name}" not in named:
            path.unlink()
    remove_checkpoints(folder, but=checkpoint)
    lock.release()
    return checkpoint


def kept_in_words(plan: Sequence[PlannedRun], config: StudyConfig, *, beside: str | None = None) -> str:
    """What an interrupted command leaves, for its last line.

    Args:
        plan: The runs.
        config: The study's settings.
        beside: A folder that a finished run has beside its records.

    Returns:
        A sentence that counts the finished runs, and says where the others go on.
    """
    if not is_recorded(config.out):
        return "interrupted: nothing was recorded yet"
    recorded = [run for run in plan if is_recorded(run.folder)]
    whole = [run for run in recorded if beside is None or (run.folder / beside).is_dir()]
    finished = [run for run in whole if is_finished(Run(run.folder), config, run.method)]
    found = [last_checkpoint(run.folder) for run in recorded if run not in finished]
    steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in found if checkpoint is not None)
    others = f"goes on from its checkpoint (step {steps})" if steps else "starts again"
    kept = f"{len(finished)} of {len(plan)} runs are finished and kept in {config.out}"
    return f"interrupted: {kept}, an unfinished run {others}: the same command goes on from there"
