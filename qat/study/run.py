"""One run of a study: quantize a copy of the full-precision model, train it by one method, measure it along the way."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from qat.hessian import hessian_operator
from qat.layers.convert import ConversionReport, quantize_model
from qat.study.config import StudyConfig
from qat.study.measure import MeasuringCallback, study_probe
from qat.study.presentation import presentation, run_label
from qat.study.resume import (
    Curve,
    check_same,
    is_finished,
    planned_records,
    start_again,
    validation_curve,
)
from qat.study.start import Start
from qat.study.table import Row, spectrum_columns
from qat.training.callback import PARQCallback, WinQCallback
from qat.training.evaluate import perplexity_of
from qat.training.telemetry import Telemetry
from qat.training.train import train
from spectra.runs.folder import Run, is_recorded
from spectra.runs.planned import PLANNED_RECORDS

NOISE_DRAWS = 4


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


def train_method(start: Start, config: StudyConfig, bits: float, method: str, folder: Path) -> Outcome:
    """Quantize a copy of the full-precision model, train it, and measure spectra along the way.

    What an interrupted run has left in the folder is removed first.

    Args:
        start: The model, the text and the measured batches.
        config: The study's settings.
        bits: The bit-width of the quantized weights.
        method: "baseline" or "winq".
        folder: The run folder to make.

    Returns:
        The trained model and its row of the table.

    Raises:
        NonFiniteError: A loss or a Hessian-vector product held NaN or infinity; what was recorded is kept.
    """
    start_again(folder)
    model = copy.deepcopy(start.model)
    converted = quantize_model(model, config.quantization(bits))
    model.to(start.device)
    name = f"{bits:g} bit, {method}"
    modes = {
        mode: partial(hessian_operator, mode=mode, sigma=config.winq.sigma or None, draws=NOISE_DRAWS)
        for mode in config.modes
    }
    settings = {
        **run_settings(config, bits, method),
        **_conversion_facts(converted),
        **start.facts,
        "presentation": presentation(bits=bits, method=method, **activation_settings(config)),
    }
    probe = study_probe(model, start, config, folder, name=name, modes=modes, settings=settings)
    measure = MeasuringCallback(probe, config.measuring_steps())
    callbacks: list[TrainerCallback] = [measure]
    if method == "winq":
        callbacks = [WinQCallback(**asdict(config.winq), around_reset=measure.around_reset), measure]
    if config.quantizer == "parq":
        callbacks = [PARQCallback(), *callbacks]
    measure(0, "start")
    result = train(
        model,
        start.train,
        start.validation,
        config.train,
        name=name,
        run=probe.run,
        callbacks=callbacks,
        telemetry=Telemetry(model),
        device=start.device.type,
    )
    measure(config.train.steps, "end")
    assert probe.run is not None
    outcome = outcome_of(probe.run, config, bits, method)
    return replace(outcome, seconds=result.seconds, model=model)


def outcome_of(run: Run, config: StudyConfig, bits: float, method: str) -> Outcome:
    """The result of a finished run, read from its folder.

    Args:
        run: The run.
        config: The study's settings.
        bits: The bit-width of the quantized weights.
        method: "baseline" or "winq".

    Returns:
        The outcome, without a model.
    """
    records, curve = run.records, validation_curve(run)
    loss = curve[-1][1]
    row = {
        "label": run_label(bits, method, **activation_settings(config)),
        "bits": bits,
        "method": method,
        **{name: width for name, width in activation_settings(config).items() if width < 16},
        "validation_loss": loss,
        "perplexity": perplexity_of(loss),
        "steps": config.train.steps,
        "mode": config.modes[0],
        **spectrum_columns(records),
    }
    return Outcome(row, curve, len(records))


def finished_outcome(start: Start, config: StudyConfig, bits: float, method: str, folder: Path) -> Outcome | None:
    """The result of a run that an earlier call has finished; None if the run does not exist or is not finished.

    Args:
        start: What the study's runs start from.
        config: The study's settings.
        bits: The bit-width of the quantized weights.
        method: "baseline" or "winq".
        folder: The folder of the run.

    Returns:
        The outcome, without a model.

    Raises:
        InputError: The folder holds a run with other settings.
    """
    check_same(folder, {**run_settings(config, bits, method), **start.facts})
    if not is_recorded(folder):
        return None
    run = Run(folder)
    return outcome_of(run, config, bits, method) if is_finished(run, config, method) else None


def run_settings(config: StudyConfig, bits: float, method: str) -> dict[str, Any]:
    """The entries of a run's config.json that follow from the study's settings alone.

    Args:
        config: The study's settings.
        bits: The bit-width of the quantized weights.
        method: "baseline" or "winq".

    Returns:
        Plain values by name.
    """
    return {
        "bits": bits,
        "method": method,
        "quantizer": config.quantization(bits).scheme,
        **_scale_settings(config),
        **asdict(config.train),
        **(asdict(config.winq) if method == "winq" else {}),
        **({"measured_sigma": config.winq.sigma} if "noisy" in config.modes else {}),
        "modes": list(config.modes),
        "skip": list(config.skip),
        **activation_settings(config),
        "activation_symmetric": config.activation_symmetric,
        "length": config.length,
        "validation_sequences": config.validation_sequences,
        "measure_sequences": config.measure_sequences,
        "probes": config.probes,
        "lanczos_steps": config.lanczos_steps,
        "deflated": config.deflate,
        "count_products": config.count_products,
        PLANNED_RECORDS: planned_records(config, method),
    }


def activation_settings(config: StudyConfig) -> dict[str, int]:
    """The bit-widths of activations and of keys and values, for a label and for config.json."""
    return {"activation_bits": config.activation_bits, "cache_bits": config.cache_bits}


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
