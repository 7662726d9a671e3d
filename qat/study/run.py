"""One run of a study: quantize a copy of the full-precision model, train it by one method, measure it along the way."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qat.hessian import hessian_operator
from qat.layers.convert import ConversionReport, quantize_model
from qat.layers.linear import quant_layers
from qat.study.config import StudyConfig
from qat.study.measure import MeasuringCallback, study_probe
from qat.study.presentation import presentation, run_label
from qat.study.start import Start
from qat.study.table import Row, spectrum_columns
from qat.training.callback import WinQCallback
from qat.training.evaluate import evaluate
from qat.training.telemetry import Telemetry
from qat.training.train import TrainResult, train

NOISE_DRAWS = 4


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        model: The trained model; None where it stayed in a worker's process.
        result: How the training went.
        row: Its row of the table, but for `steps_to_baseline_loss`.
        spectra: How many spectra were measured.
    """

    model: nn.Module | None
    result: TrainResult
    row: Row
    spectra: int


def train_method(start: Start, config: StudyConfig, bits: float, method: str, folder: Path) -> Outcome:
    """Quantize a copy of the full-precision model, train it, and measure spectra along the way.

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
    model = copy.deepcopy(start.model)
    converted = quantize_model(model, config.quantization(bits))
    model.to(start.device)
    name = f"{bits:g} bit, {method}"
    modes = {
        mode: partial(hessian_operator, mode=mode, sigma=config.winq.sigma or None, draws=NOISE_DRAWS)
        for mode in config.modes
    }
    settings = _settings(start, config, bits, method, converted)
    probe = study_probe(model, start, config, folder, name=name, modes=modes, settings=settings)
    measure = MeasuringCallback(probe, config.measuring_steps())
    callbacks: list[TrainerCallback] = [measure]
    if method == "winq":
        callbacks = [WinQCallback(**asdict(config.winq), around_reset=measure.around_reset), measure]
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
    final = evaluate(model, start.validation, batch_size=config.train.batch_size)
    row = {
        "label": run_label(bits, method),
        "bits": bits,
        "method": method,
        "validation_loss": final.loss,
        "perplexity": final.perplexity,
        "steps": result.steps,
        "mode": config.modes[0],
        **spectrum_columns(probe.records),
    }
    return Outcome(model, result, row, len(probe.records))


def dequantized(trained: nn.Module, full_precision: nn.Module) -> nn.Module:
    """The trained model as a plain one: the quantized values Q(W) stand in ordinary layers.

    Args:
        trained: A quantized model.
        full_precision: The model it was made of; it is copied, not changed.

    Returns:
        A copy of the full-precision model with the trained model's parameters, and Q(W) where it has quantized layers.
    """
    model = copy.deepcopy(full_precision)
    quantized = {f"{name}.weight": layer.quantized_weight() for name, layer in quant_layers(trained)}
    values = dict(trained.named_parameters()) | quantized
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def _settings(
    start: Start, config: StudyConfig, bits: float, method: str, converted: ConversionReport
) -> dict[str, Any]:
    """What the run's config.json says of how it was trained, and how it is to be shown."""
    return {
        "bits": bits,
        "method": method,
        "quantizer": converted.quantizer,
        "quantized_weights": converted.weight_count,
        "quantized_modules": len(converted.swapped),
        **asdict(config.train),
        **(asdict(config.winq) if method == "winq" else {}),
        "length": config.length,
        **start.facts,
        "presentation": presentation(bits=bits, method=method),
    }
