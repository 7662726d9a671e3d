"""What the callbacks of training programs share: options checked when they are made, failures that end no training."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from spectra.backend.errors import InputError
from spectra.operators.hessian.checks import hessian_mode
from spectra.runs.failure import Failure, record_unmade
from spectra.runs.folder import FolderError
from spectra.runs.probe import SpectrumProbe
from spectra.runs.settings import MeasurementSettings

NO_SPECTRUM = "no spectrum of this training"


def check_options(batch_count: Any, options: Mapping[str, Any]) -> None:
    """Check what a callback is made with, before the training.

    Args:
        batch_count: How many batches are to be taken from the training data.
        options: Options of `SpectrumProbe`, and fields of `MeasurementSettings`.

    Raises:
        InputError: If the count is below 1, there is no such option, or a field is out of its range.
    """
    if batch_count < 1:
        raise InputError(f"batch_count must be at least 1 batch, got {batch_count}")
    MeasurementSettings().changed(**_fields(options))


@contextlib.contextmanager
def recording_why_unmade(out: str, model: nn.Module, step: int, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a probe is made; what fails is raised, and unless `strict` recorded in the run folder before.

    Args:
        out: The folder.
        model: The model that is trained.
        step: The training step.
        options: What the probe is made with, "strict" among it.
    """
    try:
        yield
    except Exception as error:
        if not options.get("strict") and not isinstance(error, FolderError):
            _record_why_unmade(out, Failure.of(error), model, step, options)
        raise


def _record_why_unmade(out: str, failure: Failure, model: nn.Module, step: int, options: Mapping[str, Any]) -> None:
    """Record in a run folder why there is no probe."""
    settings = options.get("settings") or MeasurementSettings()
    with contextlib.suppress(Exception):  # what is wrong may be the settings
        settings = settings.changed(**_fields(options))
        facts = {"model": type(model).__name__, **(options.get("config") or {})}
        modes = options.get("modes") or [hessian_mode(model)]
        record_unmade(out, failure, settings, facts=facts, modes=modes, step=step)


@contextlib.contextmanager
def ending_no_training(strict: bool, what: str = NO_SPECTRUM) -> Iterator[None]:
    """Inside, what fails is a warning.

    Args:
        strict: Whether it is raised instead.
        what: What the warning begins with.
    """
    try:
        yield
    except Exception as error:
        if strict:
            raise
        warn(f"{what}: {Failure.of(error)}")


def warn(message: str) -> None:
    """Warn. Where warnings are errors, nothing is raised.

    Args:
        message: The warning.
    """
    with contextlib.suppress(Warning):
        warnings.warn(message, stacklevel=4)


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields of `MeasurementSettings`."""
    known = inspect.signature(SpectrumProbe).parameters
    return {name: value for name, value in options.items() if name not in known}
