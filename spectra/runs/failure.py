"""Why a measurement failed, in one line, and what to do about it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spectra.backend.errors import InputError, first_line
from spectra.backend.ranks import RankError
from spectra.runs.folder import Run
from spectra.runs.provenance import versions
from spectra.runs.record import FAILED, SpectrumRecord
from spectra.runs.settings import MeasurementSettings

MEMORY = "measure with microbatch=, deflate=0, fewer parameters (params=) or on a device with more free memory"
DISK = "make room on the disk, or check that the folder can be written; the next measurement tries again"
RANKS = "look at the other ranks' messages for the cause"
UNKNOWN = "pass strict=True to get the error with its traceback"


@dataclass(frozen=True)
class Failure:
    """Why a measurement failed.

    Attributes:
        reason: What went wrong, in one line.
        remedy: What to do about it; "" where the reason says it.
    """

    reason: str
    remedy: str

    @classmethod
    def of(cls, error: Exception, *, where: str = "") -> Failure:
        """The failure that an error is.

        Args:
            error: What was raised.
            where: What raised it, if it is not the measurement itself.

        Returns:
            The message of an InputError, which says all; else the kind of error, the first line of its message, and
            what helps against errors of its kind.
        """
        if isinstance(error, InputError):
            text, remedy = str(error), ""
        else:
            kind, line = type(error).__name__, first_line(error)
            text, remedy = kind if line == kind else f"{kind}: {line}", _remedy(error)
        return cls(" ".join((f"{where} {text}" if where else text).split()), remedy)

    def to_record(
        self, settings: MeasurementSettings, *, mode: str, step: int, label: str = "", seconds: float = 0.0
    ) -> SpectrumRecord:
        """The record of a measurement that failed.

        Args:
            settings: How it was to be measured.
            mode: Which Hessian.
            step: The training step.
            label: A name for the occasion.
            seconds: The time that was spent.

        Returns:
            The record.
        """
        return SpectrumRecord(
            step=step,
            mode=mode,
            loss=float("nan"),
            gradient_norm=float("nan"),
            dimension=0,
            estimates={},
            reorthogonalize="",
            products=0,
            seconds=seconds,
            label=label,
            versions=versions(),
            status=FAILED,
            reason=self.reason,
            remedy=self.remedy,
            **settings.to_record(),
        )

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


def record_unmade(
    out: str | os.PathLike[str],
    failure: Failure,
    settings: MeasurementSettings,
    *,
    facts: Mapping[str, Any],
    modes: Iterable[str],
    step: int,
) -> None:
    """Record that nothing can be measured, for want of a probe: in a new folder, or in one of the same training.

    A folder that holds another run, or that cannot be written, is left as it is.

    Args:
        out: The run folder.
        failure: Why there is no probe.
        settings: How it was to measure.
        facts: What is known for config.json; what is not known is not compared.
        modes: Which Hessians were to be measured, a record for each.
        step: The training step.
    """
    config = {**settings.to_config(), **facts}
    with contextlib.suppress(Exception), Run.open_or_create(out, config, only_compared=config) as run:
        there = {(record.mode, record.step, record.reason) for record in run.records}
        for mode in modes:
            if (mode, step, failure.reason) not in there:
                run.append(failure.to_record(settings, mode=mode, step=step, label="start"))


def _remedy(error: Exception) -> str:
    """What to do about an error that is no InputError."""
    if is_out_of_memory(error):
        return MEMORY
    if isinstance(error, OSError):
        return DISK
    return RANKS if isinstance(error, RankError) else UNKNOWN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a device."""
    # on a CPU torch raises a plain RuntimeError
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def give_memory_back() -> None:
    """Free what a failed measurement held, so that the training has it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a device that is at fault
            torch.cuda.empty_cache()
