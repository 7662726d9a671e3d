"""Resuming a study that was interrupted: which runs are finished, and how the others start again.

A run is finished if every spectrum and every validation loss that its settings ask for is on the disk. It is kept. Any
other run starts again in an empty folder, and ends with the same records as a run that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.study.config import StudyConfig
from qat.training.winq import reset_steps
from spectra.runs.folder import CONFIG, LANCZOS, RECORDS, TELEMETRY, Run, check_free, is_recorded, refuse_differences
from spectra.runs.jsonlines import plain
from spectra.runs.lock import WriterLock

NOT_COMPARED = ("out", "workers", "presentation")  # they change no number

Curve = tuple[tuple[int, float], ...]


def planned_marks(config: StudyConfig, method: str) -> tuple[tuple[int, str], ...]:
    """The training steps at which a run is measured, with the labels of the records.

    Args:
        config: The study's settings.
        method: "baseline" or "winq".

    Returns:
        Pairs (training step, label) in the order of measuring.
    """
    resets = set(reset_steps(config.winq.every, config.train.steps)) if method == "winq" else set()
    marks = [(0, "start")]
    for step in sorted({*config.measuring_steps(), *resets}):
        marks += [(step, "before-reset"), (step, "after-reset")] if step in resets else [(step, "quarter")]
    return (*marks, (config.train.steps, "end"))


def planned_records(config: StudyConfig, method: str) -> int:
    """How many records a finished run has."""
    return len(planned_marks(config, method)) * len(config.modes)


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
    planned = [(*mark, mode) for mark in planned_marks(config, method) for mode in config.modes]
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


def start_again(folder: Path) -> None:
    """Remove the records of a run that was interrupted; other files in its folder stay.

    Its config.json stays too, so that the folder is still that of a run if this is interrupted.

    Args:
        folder: The run's folder; it may not be there.

    Raises:
        InputError: Another process writes there.
    """
    if not (folder / CONFIG).is_file():
        return
    lock = WriterLock(folder)
    if (folder / RECORDS).exists():
        os.truncate(folder / RECORDS, 0)
    for path in (folder / TELEMETRY, *(folder / LANCZOS).glob("*-step-*")):
        path.unlink(missing_ok=True)
    lock.release()


def kept_in_words(folders: Sequence[tuple[Path, str]], config: StudyConfig, *, beside: str | None = None) -> str:
    """What an interrupted command leaves, for its last line.

    Args:
        folders: The folder and the method of each planned run.
        config: The study's settings.
        beside: A folder that a finished run has beside its records.

    Returns:
        A sentence that counts the finished runs.
    """
    again = "the same command goes on from there"
    if not is_recorded(config.out):
        return "interrupted: nothing was recorded yet"
    recorded = [(folder, method) for folder, method in folders if is_recorded(folder)]
    whole = [(folder, method) for folder, method in recorded if beside is None or (folder / beside).is_dir()]
    finished = sum(is_finished(Run(folder), config, method) for folder, method in whole)
    kept = f"{finished} of {len(folders)} runs are finished and kept in {config.out}"
    return f"interrupted: {kept}, an unfinished run starts again: {again}"
