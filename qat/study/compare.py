"""The main job: quantize one full-precision model at several bit-widths, train it by several methods, and compare.

Everything starts from the same weights, sees the same batches in the same order, and is measured with the same probes
on the same sequences, so that what differs between two runs is the bit-width or the method.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qat.hessian import hessian_operator
from qat.layers.convert import quantize_model
from qat.layers.linear import quant_layers, weight_names
from qat.study.config import StudyConfig, choose_device
from qat.study.models import (
    check_fit,
    load_model,
    small_llama,
    tokenizer_for,
    trained_small_llama,
)
from qat.study.table import Curve, Row, for_report, spectrum_columns, terminal, with_steps_to_baseline, write_table
from qat.study.workers import run_jobs
from qat.text.corpus import Blocks, Text, load_text, make_blocks, trained_tokenizer
from qat.training.callback import WinQCallback
from qat.training.evaluate import Evaluation, evaluate
from qat.training.progress import MeasuringBar
from qat.training.telemetry import Telemetry
from qat.training.train import TrainResult, train
from spectra.backend.errors import InputError, NonFiniteError
from spectra.integrations.loading import quiet_transformers
from spectra.operators.hessian.operator import HessianOperator
from spectra.runs.folder import Run, check_free
from spectra.runs.probe import SpectrumProbe
from spectra.views import page

NOISE_DRAWS = 4


@dataclass(frozen=True)
class Start:
    """What every run of a study starts from: the full-precision model, the text in blocks, the measured batches."""

    model: nn.Module
    tokenizer: Any
    train: Blocks
    validation: Blocks
    batches: list[dict[str, torch.Tensor]]
    device: torch.device
    facts: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A trained model, its training, its row of the table but for the steps to the baseline's loss, how many spectra.

    The model is left out where a worker trained it.
    """

    model: nn.Module | None
    result: TrainResult
    row: Row
    spectra: int


def compare(config: StudyConfig, *, say: Callable[[str], None] = print) -> list[Row]:
    """Run the whole study and write it to config.out: a run for each bit-width and method, table, figures, report.

    Returns the rows of the table. Raises InputError before anything slow for what cannot be used, and NonFiniteError
    when a training or a measurement breaks; what was recorded until then is kept and reported on.
    """
    out = Path(config.out)
    plan = [(bits, method, out / f"{bits:g}bit-{method}") for bits in config.bits for method in config.methods]
    for folder in (out, out / "full-precision", *(folder for _, _, folder in plan)):
        check_free(folder)
    start = prepare(config, say=say)
    study = Run.create(out, {"study": "compare", **asdict(config), **start.facts})
    outcomes: dict[int, Outcome] = {}
    heading = ""
    try:
        reference = measure_full_precision(start, config, out / "full-precision")
        say(f"full precision: validation loss {reference.loss:.4f}, perplexity {reference.perplexity:.2f}")
        heading = (
            f"Full precision before training: validation loss {reference.loss:.4f}, perplexity "
            f"{reference.perplexity:.2f}. Then {config.train.steps} steps at a learning rate of "
            f"{config.train.learning_rate:g}, schedule {config.train.schedule}, seed {config.train.seed}: which method "
            "wins can depend on all of these."
        )
        jobs = [(config, *run) for run in plan]
        for index, outcome in run_jobs(_train_alone, start, jobs, workers=config.workers):
            outcomes[index] = outcome
            say(_outcome_line(outcome))
    except InputError:
        with contextlib.suppress(InputError):  # what is there is shown, and the error that stopped us is the one told
            _write_results(study, outcomes, heading)
        raise
    rows = _write_results(study, outcomes, heading)
    say("\n" + heading + "\n\n" + terminal(rows) + "\n")
    say(f"written to {out}: table.md, figures/, report.html")
    return rows


def train_one(config: StudyConfig, *, save_model: bool = True, say: Callable[[str], None] = print) -> Row:
    """Train by the first method at the first bit-width; config.out becomes the run folder.

    save_model: leave the trained model in out/model, with the quantized values as its weights, for any tool that
    loads a Hugging Face model. Raises as `compare` does.
    """
    out, bits, method = Path(config.out), config.bits[0], config.methods[0]
    check_free(out)
    start = prepare(config, say=say)
    try:
        outcome = train_method(start, config, bits, method, out)
    except InputError:
        with contextlib.suppress(InputError):
            _write_report(Run(out))
        raise
    _write_report(Run(out))
    if save_model:
        assert outcome.model is not None
        dequantized(outcome.model, start.model).save_pretrained(out / "model")  # type: ignore[operator]
        start.tokenizer.save_pretrained(out / "model")
    say(terminal([outcome.row]))
    say(f"written to {out}: telemetry.jsonl, figures/, report.html" + (", model/" if save_model else ""))
    return outcome.row


def prepare(config: StudyConfig, *, say: Callable[[str], None] = print) -> Start:
    """Text, tokenizer, blocks, full-precision model. What can be refused is refused before a model is trained."""
    text = load_text(config.text, config.dataset)
    small = replace(config.small_llama, length=min(config.length, config.small_llama.length))
    with quiet_transformers():
        if config.model is None:
            tokenizer = trained_tokenizer(text, small.vocabulary_size)
            model = small_llama(len(tokenizer), small)
        else:
            model = load_model(config.model, trust_remote_code=config.trust_remote_code)
            tokenizer = tokenizer_for(
                model, config.model, text, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code
            )
        blocks, validation = make_blocks(text, tokenizer, length=config.length, train_blocks=config.train.batch_size)
        for part in (blocks, validation):
            check_fit(model, part)
        quantize_model(copy.deepcopy(model), config.quantization(config.bits[0]))
        _describe(say, text, blocks, validation, model)
        if config.model is None:
            model = trained_small_llama(text, tokenizer, small, say=say)
    device = choose_device(config.device)
    facts = {
        "text_source": text.source,
        "model_name": config.model or "small Llama",
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": blocks.blocks.numel(),
        "validation_tokens": validation.blocks.numel(),
        "measured_on": "training sequences",
    }
    return Start(
        model=model.eval(),
        tokenizer=tokenizer,
        train=blocks,
        validation=validation.evenly(config.validation_sequences),
        batches=_batches(blocks.evenly(config.measure_sequences), config.train.batch_size, device),
        device=device,
        facts=facts,
    )


def measure_full_precision(start: Start, config: StudyConfig, folder: Path) -> Evaluation:
    """The full-precision model's spectrum in the weights that will be quantized; returns its validation loss."""
    quantized = copy.deepcopy(start.model)
    quantize_model(quantized, config.quantization(config.bits[0]))
    names = frozenset(weight_names(quantized))
    model = copy.deepcopy(start.model).to(start.device)
    settings = {"method": "full precision", **start.facts}
    probe = _probe(
        model, start, config, folder, {"full": HessianOperator}, settings, name="full precision", names=names
    )
    probe.measure(0, "start")
    return evaluate(model, start.validation, batch_size=config.train.batch_size)


def train_method(start: Start, config: StudyConfig, bits: float, method: str, folder: Path) -> Outcome:
    """One run: quantize a copy of the full-precision model, train it, and measure spectra along the way."""
    model = copy.deepcopy(start.model)
    converted = quantize_model(model, config.quantization(bits))
    model.to(start.device)
    settings = {
        "bits": bits,
        "method": method,
        "quantizer": converted.quantizer,
        "quantized_weights": converted.weight_count,
        "quantized_modules": len(converted.swapped),
        **asdict(config.train),
        **(asdict(config.winq) if method == "winq" else {}),
        "length": config.length,
        **start.facts,
    }
    modes = {
        mode: partial(hessian_operator, mode=mode, sigma=config.winq.sigma or None, draws=NOISE_DRAWS)
        for mode in config.modes
    }
    name = f"{bits:g} bit, {method}"
    probe = _probe(model, start, config, folder, modes, settings, name=name)
    measure = _MeasuringCallback(probe, config.measuring_steps())
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
    """A copy of the full-precision model with the trained model's parameters, Q(W) where it has quantized layers."""
    model = copy.deepcopy(full_precision)
    quantized = {f"{name}.weight": layer.quantized_weight() for name, layer in quant_layers(trained)}
    values = dict(trained.named_parameters()) | quantized
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


class _MeasuringCallback(TrainerCallback):
    """Spectra at the given steps of a training, and before and after each reset of WinQ."""

    def __init__(self, probe: SpectrumProbe, steps: Sequence[int]) -> None:
        self.probe, self.steps = probe, frozenset(steps)
        self.resets: set[int] = set()

    def __call__(self, step: int, label: str) -> None:
        try:
            self.probe.measure(step, label)
        except NonFiniteError as error:
            kept = "" if self.probe.run is None else f"; what was recorded is in {self.probe.run.folder}"
            raise NonFiniteError(f"at step {step}, {error}, and use a lower learning rate{kept}") from None

    def around_reset(self, event: str, step: int) -> None:
        self.resets.add(step)
        self(step, event)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.steps - self.resets:
            self(state.global_step, "quarter")


def _probe(
    model: nn.Module,
    start: Start,
    config: StudyConfig,
    folder: Path,
    modes: dict[str, Any],
    settings: dict[str, Any],
    *,
    name: str,
    names: frozenset[str] | None = None,
) -> SpectrumProbe:
    return SpectrumProbe(
        model,
        start.batches,
        out=folder,
        modes=modes,
        params=None if names is None else (lambda name, parameter: name in names),
        probes=config.probes,
        steps=config.lanczos_steps,
        deflate=config.deflate,
        engine="reverse",  # a pick by measurement might differ when run again, and with it the last digits
        seed=config.train.seed,
        config=settings,
        progress=MeasuringBar(name),
    )


def _batches(blocks: Blocks, batch_size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": rows.to(device), "labels": rows.to(device)} for rows in blocks.blocks.split(batch_size)]


def _train_alone(*given: Any) -> Outcome:
    """`train_method` without the model, which need not travel from a worker's process."""
    return replace(train_method(*given), model=None)


def _outcome_line(outcome: Outcome) -> str:
    row, result = outcome.row, outcome.result
    return (
        f"{row['bits']:g} bit, {row['method']}: validation loss {result.validation_loss:.4f} "
        f"after {result.steps} steps and {outcome.spectra} spectra, {result.seconds:.0f} s"
    )


def _write_results(study: Run, outcomes: dict[int, Outcome], heading: str) -> list[Row]:
    """Table, figures and report of what there is: all of it at the end, or what an error left."""
    finished = [outcomes[index] for index in sorted(outcomes)]
    curves: list[Curve] = [outcome.result.curve for outcome in finished]
    rows = with_steps_to_baseline([outcome.row for outcome in finished], curves)
    if rows:
        write_table(rows, study.folder, heading=heading)
    _write_report(study, table=for_report(rows))
    return rows


def _write_report(run: Run, *, table: Sequence[Row] | None = None) -> None:
    if not any(single.records for single in (run, *run.runs)):
        return
    page.write(run, table=table)
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in page.figures(run).items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def _describe(say: Callable[[str], None], text: Text, blocks: Blocks, validation: Blocks, model: nn.Module) -> None:
    source = text.source if len(text.source) < 60 else text.source[:57] + "..."
    say(
        f"text: {source}, {blocks.blocks.numel():,} tokens to train on and {validation.blocks.numel():,} to validate; "
        f"model: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
