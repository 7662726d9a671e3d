"""Spectra along a study: the probe that every run shares, when it measures, and the full-precision reference."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from qat.layers.convert import quantize_model
from qat.layers.linear import full_precision_names
from qat.study.config import StudyConfig
from qat.study.presentation import REFERENCE_LABEL, presentation
from qat.study.resume import check_same, go_back
from qat.study.start import Start
from qat.training.evaluate import Evaluation, evaluate
from qat.training.progress import MeasuringBar
from spectra.backend.errors import NonFiniteError
from spectra.operators.hessian.operator import HessianOperator
from spectra.runs.folder import Run, is_recorded
from spectra.runs.planned import PLANNED_RECORDS
from spectra.runs.probe import SpectrumProbe


def study_probe(
    model: nn.Module,
    start: Start,
    config: StudyConfig,
    folder: Path,
    *,
    name: str,
    modes: Mapping[str, Any],
    settings: Mapping[str, Any],
    params: Any = None,
    loss: Callable[..., Any] | None = None,
) -> SpectrumProbe:
    """A probe with the study's batches, settings and seed, so that its spectra are paired with those of other runs.

    Args:
        model: The model to measure, on the study's device.
        start: Where the measured batches come from.
        config: The study's settings.
        folder: The run folder to make.
        name: What the progress bar says.
        modes: Builders of operators by the name of the Hessian mode, as in `spectra.SpectrumProbe`.
        settings: What the run's config.json says beside the probe's own facts.
        params: Which parameters to measure, as in `spectra.HessianOperator`.
        loss: The loss whose Hessian is measured; None: the model's own, the cross-entropy.

    Returns:
        The probe. Its run folder exists.
    """
    return SpectrumProbe(
        model,
        start.batches,
        out=folder,
        modes=modes,
        params=params,
        loss=loss,
        probes=config.probes,
        steps=config.lanczos_steps,
        deflate=config.deflate,
        count_products=config.count_products,
        engine="reverse",  # a choice by measurement may differ from run to run, and with it the last digits
        seed=config.train.seed,
        config=settings,
        progress=MeasuringBar(name),
        strict=True,  # a study without one of its spectra is not finished
    )


def measure_full_precision(start: Start, config: StudyConfig, folder: Path) -> Evaluation:
    """Measure the full-precision model's Hessian in the weights that will be quantized: the study's reference.

    A folder that holds this spectrum already is kept.

    Args:
        start: The model and the batches.
        config: The study's settings.
        folder: The run folder to make.

    Returns:
        The model's validation loss.
    """
    model = copy.deepcopy(start.model).to(start.device)
    settings = {"method": REFERENCE_LABEL, **start.facts, PLANNED_RECORDS: 1}
    check_same(folder, settings)
    if not (is_recorded(folder) and Run(folder).records):
        go_back(folder)
        _measure_reference(model, start, config, folder, settings)
    return evaluate(model, start.validation, batch_size=config.train.batch_size)


def _measure_reference(
    model: nn.Module, start: Start, config: StudyConfig, folder: Path, settings: Mapping[str, Any]
) -> None:
    """The one spectrum of the full-precision model."""
    probe = study_probe(
        model,
        start,
        config,
        folder,
        name=REFERENCE_LABEL,
        modes={"full": HessianOperator},
        settings={**settings, "presentation": presentation()},
        params=quantized_names(start, config),
    )
    probe.measure(0, "start")


def quantized_names(start: Start, config: StudyConfig) -> Callable[[str, Any], bool]:
    """Which parameters of the full-precision model will be quantized.

    Args:
        start: The model.
        config: The study's settings.

    Returns:
        A selection of parameters, as in `spectra.HessianOperator`.
    """
    quantized = copy.deepcopy(start.model)
    quantize_model(quantized, config.quantization(config.bits[0]))
    names = frozenset(full_precision_names(quantized))
    return lambda name, parameter: name in names


class CarriedState:
    """The state of a probe in checkpoints. It changes with a measurement; until then the file is linked, not written.

    Args:
        probe: The probe.
    """

    def __init__(self, probe: SpectrumProbe) -> None:
        self.probe = probe
        self.written: Path | None = None
        self.records = 0  # that the probe had then

    def save_state(self, path: Path) -> None:
        """Write the state, or link the file of the checkpoint before."""
        if self.written is not None and self.records == len(self.probe.records):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it was removed, or the file system has no links
                os.link(self.written, path)
        if not path.exists() or self.records != len(self.probe.records):
            self.probe.save_state(path)
        self.written, self.records = path, len(self.probe.records)

    def load_state(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        self.probe.load_state(path)
        self.written, self.records = path, len(self.probe.records)


class MeasuringCallback(TrainerCallback):
    """Measures spectra at given training steps, and before and after each reset of WinQ.

    Args:
        probe: What measures.
        steps: The training steps at which it measures, unless WinQ resets there.
    """

    def __init__(self, probe: SpectrumProbe, steps: Sequence[int]) -> None:
        self.probe, self.steps = probe, frozenset(steps)
        self.resets: set[int] = set()

    def __call__(self, step: int, label: str) -> None:
        """Measure now, as of this training step. Raises NonFiniteError that names the step."""
        try:
            self.probe.measure(step, label)
        except NonFiniteError as error:
            kept = "" if self.probe.run is None else f"; what was recorded is in {self.probe.run.folder}"
            raise NonFiniteError(f"at step {step}, {error}, and use a lower learning rate{kept}") from None

    def around_reset(self, event: str, step: int) -> None:
        """For `qat.WinQCallback(around_reset=...)`: measure under the label "before-reset" or "after-reset"."""
        self.resets.add(step)
        self(step, event)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where a spectrum is due and no reset of this step has measured it already."""
        if state.global_step in self.steps - self.resets:
            self(state.global_step, "quarter")
