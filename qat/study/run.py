"""One run of a study: quantize a copy of the full-precision model, train it by one method, measure it along the way.

The reference is a run too, of the model that is not quantized.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback

from qat.hessian import hessian_operator
from qat.layers.convert import ConversionReport, quantize_model
from qat.study.config import StudyConfig
from qat.study.measure import CarriedState, MeasuringCallback, quantized_names, study_probe
from qat.study.plan import PlannedRun
from qat.study.presentation import presentation
from qat.study.resume import (
    Curve,
    check_same,
    go_back,
    is_finished,
    measured_modes,
    planned_marks,
    planned_records,
    validation_curve,
)
from qat.study.shared_start import SharedStart
from qat.study.start import Start
from qat.study.table import Row, spectrum_columns
from qat.training.callback import PARQCallback, WinQCallback
from qat.training.checkpoints import Checkpoints
from qat.training.distillation import Distillation
from qat.training.evaluate import perplexity_of
from qat.training.ranks import agreed
from qat.training.step import Loss, computation_facts, next_token_loss
from qat.training.telemetry import Telemetry
from qat.training.train import train
from qat.training.winq import AroundReset
from spectra.integrations.loading import quiet_transformers
from spectra.operators.hessian.operator import HessianOperator
from spectra.runs.folder import Run, is_recorded
from spectra.runs.planned import PLANNED_RECORDS

NOISE_DRAWS = 4
MEASURED_LOSSES = {"cross-entropy": "the cross-entropy", "training": "the training loss"}  # in words


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        row: Its row of the table, without `steps_to_baseline_loss`.
        curve: Pairs (training step, validation loss), from step 0 to the last.
        spectra: How many spectra were measured.
        seconds: How long the training took; NaN for a run that an earlier call has finished.
        model: The trained model; None where it stayed in a worker's process, and for a run that was finished earlier.
    """

    row: Row
    curve: Curve
    spectra: int
    seconds: float = math.nan
    model: nn.Module | None = None


@quiet_transformers()
def train_method(start: Start, config: StudyConfig, plan: PlannedRun, *, shared: SharedStart | None = None) -> Outcome:
    """Make the run's model of a copy of the full-precision one, train it, and measure spectra along the way.

    A run that was interrupted goes on from its last checkpoint; without one, what it left in the folder is removed.

    Args:
        start: The model, the text and the measured batches.
        config: The study's settings.
        plan: Which run.
        shared: Where runs from the same start leave its spectrum for each other.

    Returns:
        The trained model and its row of the table.

    Raises:
        InputError: A checkpoint cannot be read.
        NonFiniteError: A loss or a Hessian-vector product held NaN or infinity; what was recorded is kept.
    """
    checkpoint = agreed(go_back(plan.folder))
    model, options, facts = _model_of(start, config, plan)
    facts |= computation_facts(config.train, model, start.device)
    settings = {**run_settings(config, plan), **facts, **start.facts, "presentation": _shown(plan)}
    loss = _loss(start, config, plan)
    if config.measured_loss == "training" and not plan.is_reference:
        options["loss"] = loss
    probe = study_probe(model, start, config, plan.folder, name=plan.name, settings=settings, **options)
    if config.distillation is not None and not plan.is_reference:
        measured = MEASURED_LOSSES[config.measured_loss]
        probe.notes.append(f"{measured} is measured; trained with {config.distillation.in_words()}")
    marks = {step for step, label in planned_marks(config, plan.method) if label == "quarter"}
    measure = MeasuringCallback(probe, sorted(marks))
    if checkpoint is None and not (shared is not None and shared.take(probe)):
        measure(0, "start")
        if shared is not None:
            shared.give(probe)
    telemetry = None if plan.is_reference else Telemetry(model)
    parts: dict[str, Any] = {"probe": CarriedState(probe)} | ({} if telemetry is None else {"telemetry": telemetry})
    assert probe.run is not None
    result = train(
        model,
        start.train,
        start.validation,
        replace(config.train, seed=plan.seed),
        name=plan.name,
        run=probe.run,
        callbacks=[*_callbacks(config, plan, measure.around_reset), measure],
        telemetry=telemetry,
        device=start.device.type,
        checkpoints=Checkpoints(plan.folder, every=config.save_every, resumed=checkpoint, parts=parts),
        loss=loss,
    )
    measure(config.train.steps, "end")
    return replace(outcome_of(probe.run, config, plan), seconds=result.seconds, model=model)


def _model_of(start: Start, config: StudyConfig, plan: PlannedRun) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model of a run on its device, what its probe measures, and what config.json says of its weights."""
    model = copy.deepcopy(start.model)
    if plan.is_reference:
        options = {"modes": {"full": HessianOperator}, "params": quantized_names(start, config)}
        return model.to(start.device), options, {}
    converted = quantize_model(model, config.quantization(plan.bits))
    modes = {
        mode: partial(hessian_operator, mode=mode, sigma=config.winq.sigma or None, draws=NOISE_DRAWS)
        for mode in config.modes
    }
    return model.to(start.device), {"modes": modes}, _conversion_facts(converted)


def _shown(plan: PlannedRun) -> dict[str, Any]:
    """The entry "presentation" of a run."""
    if plan.is_reference:
        return presentation(seed=plan.shown_seed)
    return presentation(bits=plan.bits, method=plan.method, seed=plan.shown_seed, **plan.widths)


def _callbacks(config: StudyConfig, plan: PlannedRun, around_reset: AroundReset | None) -> list[TrainerCallback]:
    """What changes the weights in training: the annealing of parq, and WinQ."""
    annealed = config.quantizer == "parq" and not plan.is_reference
    winq = [WinQCallback(**asdict(config.winq), around_reset=around_reset)] if plan.method == "winq" else []
    return [*([PARQCallback(**asdict(config.parq))] if annealed else []), *winq]


def _loss(start: Start, config: StudyConfig, plan: PlannedRun) -> Loss:
    if config.distillation is None or plan.is_reference:
        return next_token_loss
    return Distillation(copy.deepcopy(start.model).to(start.device), config.distillation)


def follow_method(start: Start, config: StudyConfig, plan: PlannedRun) -> None:
    """What ranks after the first do while the first is in `train_method`: train along, and write nothing of the run.

    Args:
        start: As on the first rank.
        config: The study's settings.
        plan: Which run.
    """
    checkpoint = agreed(None)
    model, _, _ = _model_of(start, config, plan)
    train(
        model,
        start.train,
        start.validation,
        replace(config.train, seed=plan.seed),
        name=plan.name,
        callbacks=_callbacks(config, plan, None),
        device=start.device.type,
        checkpoints=Checkpoints(plan.folder, every=config.save_every, resumed=checkpoint),
        loss=_loss(start, config, plan),
    )


def outcome_of(run: Run, config: StudyConfig, plan: PlannedRun) -> Outcome:
    """The result of a finished run, read from its folder.

    Args:
        run: The run.
        config: The study's settings.
        plan: Which run it is.

    Returns:
        The outcome, without a model.
    """
    records, curve = run.records, validation_curve(run)
    loss = curve[-1][1]
    row = {
        "label": plan.label,
        "bits": plan.bits,
        "method": plan.method,
        **{name: width for name, width in plan.widths.items() if width < 16},
        **({} if plan.shown_seed is None else {"seed": plan.shown_seed}),
        "validation_loss": loss,
        "perplexity": perplexity_of(loss),
        "steps": config.train.steps,
        "mode": measured_modes(config, plan.method)[0],
        **spectrum_columns(records),
    }
    return Outcome(row, curve, len(records))


def finished_outcome(start: Start, config: StudyConfig, plan: PlannedRun) -> Outcome | None:
    """The result of a run that an earlier call has finished; None if the run does not exist or is not finished.

    Args:
        start: What the study's runs start from.
        config: The study's settings.
        plan: Which run.

    Returns:
        The outcome, without a model.

    Raises:
        InputError: The folder holds a run with other settings.
    """
    check_same(plan.folder, {**run_settings(config, plan), **start.facts})
    if not is_recorded(plan.folder):
        return None
    run = Run(plan.folder)
    return outcome_of(run, config, plan) if is_finished(run, config, plan.method) else None


def run_settings(config: StudyConfig, plan: PlannedRun) -> dict[str, Any]:
    """The entries of a run's config.json that follow from the study's settings alone.

    Args:
        config: The study's settings.
        plan: Which run.

    Returns:
        Plain values by name.
    """
    quantized = not plan.is_reference
    distilled = config.distillation if quantized else None
    return {
        "bits": plan.bits,
        "method": plan.method,
        **({"quantizer": config.quantization(plan.bits).scheme, **_scale_settings(config)} if quantized else {}),
        **asdict(replace(config.train, seed=plan.seed)),
        **(asdict(config.winq) if plan.method == "winq" else {}),
        **({"measured_sigma": config.winq.sigma} if "noisy" in config.modes and quantized else {}),
        **({} if distilled is None else _distillation_settings(config)),
        **({"parq": asdict(config.parq)} if quantized and config.quantizer == "parq" else {}),
        "modes": list(measured_modes(config, plan.method)),
        "skip": list(config.skip),
        **plan.widths,
        **({"activation_symmetric": config.activation_symmetric} if quantized else {}),
        "length": config.length,
        "validation_sequences": config.validation_sequences,
        "measure_sequences": config.measure_sequences,
        "probes": config.probes,
        "lanczos_steps": config.lanczos_steps,
        "deflated": config.deflate,
        "count_products": config.count_products,
        PLANNED_RECORDS: planned_records(config, plan.method),
    }


def _distillation_settings(config: StudyConfig) -> dict[str, Any]:
    assert config.distillation is not None
    return {"distillation": asdict(config.distillation), "measured_loss": MEASURED_LOSSES[config.measured_loss]}


def _scale_settings(config: StudyConfig) -> dict[str, Any]:
    """The settings of the scales that are not the default; runs of earlier versions have none, and the default."""
    given = {"group_size": config.group_size, "initial_scale": config.initial_scale}
    return {name: value for name, value in given.items() if value != getattr(StudyConfig, name)}


def _conversion_facts(converted: ConversionReport) -> dict[str, Any]:
    """What the run's config.json says of the quantized weights."""
    return {
        "quantized_weights": converted.weight_count,
        "quantized_modules": len(converted.swapped),
        "quantized_share": converted.share,
    }
