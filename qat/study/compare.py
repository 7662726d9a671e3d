"""A whole study: quantize one full-precision model at several bit-widths, train it by several methods, and compare.

Every run starts from the same weights, sees the same batches in the same order, and is measured with the same probe
vectors on the same sequences. Two runs differ in the bit-width or the method alone.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qat.study.config import StudyConfig
from qat.study.measure import measure_full_precision
from qat.study.resume import NOT_COMPARED, check_same, kept_in_words
from qat.study.run import Outcome, finished_outcome, run_settings, train_method
from qat.study.start import Start, prepare
from qat.study.table import Row, for_report, terminal, with_steps_to_baseline, write_table
from qat.study.workers import run_jobs
from qat.training.evaluate import Evaluation
from spectra.backend.errors import InputError
from spectra.integrations.loading import quiet_transformers
from spectra.runs.folder import Run
from spectra.runs.planned import PLANNED_RUNS
from spectra.views import page

MODEL, REFERENCE_FOLDER = "model", "full-precision"

Planned = tuple[float, str, Path]  # bit-width, method, folder


def compare(config: StudyConfig, *, say: Callable[[str], None] = print) -> list[Row]:
    """Run a whole study: one run for each bit-width and method, then table, figures and report.

    A study that was interrupted goes on: finished runs are kept, and the others start again.

    Args:
        config: The study's settings; `config.out` is the folder to make, or that of the same study.
        say: Told what happens, a line at a time.

    Returns:
        The rows of the table.

    Raises:
        InputError: A setting, the text or the model cannot be used. This is raised before anything slow.
        NonFiniteError: A loss or a Hessian-vector product held NaN or infinity. What was recorded is kept and reported.
    """
    out = Path(config.out)
    plan = [(bits, method, out / f"{bits:g}bit-{method}") for bits in config.bits for method in config.methods]
    try:
        return _compare(config, out, plan, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_in_words([(folder, method) for _, method, folder in plan], config)) from None


def _compare(config: StudyConfig, out: Path, plan: Sequence[Planned], say: Callable[[str], None]) -> list[Row]:
    """`compare` with the plan of its runs: bit-width, method and folder of each."""
    reference_folder = out / REFERENCE_FOLDER
    runs = [reference_folder.name, *(folder.name for _, _, folder in plan)]
    settings = {"study": "compare", **asdict(config), PLANNED_RUNS: runs}
    check_same(out, settings)
    for folder in (reference_folder, *(folder for _, _, folder in plan)):
        check_same(folder, {})
    start = prepare(config, say=say)
    study = Run.open_or_create(out, {**settings, **start.facts}, not_compared=NOT_COMPARED)
    outcomes = _finished(start, config, plan)
    if outcomes:
        say(f"going on with the study in {out}: {len(outcomes)} of {len(plan)} runs are finished")
    heading = ""
    try:
        reference = measure_full_precision(start, config, reference_folder)
        say(f"full precision: validation loss {reference.loss:.4f}, perplexity {reference.perplexity:.2f}")
        heading = _heading(reference, config)
        waiting = [index for index in range(len(plan)) if index not in outcomes]
        jobs = [(config, *plan[index]) for index in waiting]
        with contextlib.closing(run_jobs(_train_without_model, start, jobs, workers=config.workers)) as ended:
            for position, outcome in ended:
                outcomes[waiting[position]] = outcome
                say(_outcome_line(outcome))
                _write_table(study, outcomes, heading, planned=len(plan))
    except InputError:
        with contextlib.suppress(InputError):  # the error to report is the one that stopped the study
            _write_results(study, outcomes, heading, planned=len(plan))
        raise
    rows = _write_results(study, outcomes, heading, planned=len(plan))
    say("\n" + heading + "\n\n" + terminal(rows) + "\n")
    say(f"written to {out}: table.md, figures/, report.html")
    return rows


def train_one(config: StudyConfig, *, save_model: bool = True, say: Callable[[str], None] = print) -> Row:
    """Train by the first method at the first bit-width; `config.out` becomes the run folder.

    A training that was interrupted starts again, and one that is finished is kept.

    Args:
        config: The settings.
        save_model: Whether to leave the trained model in `out/model`: the quantized values as its weights, for any tool
            that loads a Hugging Face model, and latents and scales beside them, for `qat.load`.
        say: Told what happens, a line at a time.

    Returns:
        The row of the table.

    Raises:
        InputError: As in `compare`.
        NonFiniteError: As in `compare`.
    """
    out, bits, method = Path(config.out), config.bits[0], config.methods[0]
    try:
        return _train_one(config, bits, method, out, save_model=save_model, say=say)
    except KeyboardInterrupt:
        beside = MODEL if save_model else None
        raise KeyboardInterrupt(kept_in_words([(out, method)], config, beside=beside)) from None


def _train_one(
    config: StudyConfig, bits: float, method: str, out: Path, *, save_model: bool, say: Callable[[str], None]
) -> Row:
    """`train_one` with what it trains."""
    check_same(out, run_settings(config, bits, method))
    start = prepare(config, say=say)
    outcome = finished_outcome(start, config, bits, method, out)
    if outcome is not None and (out / MODEL).is_dir() >= save_model:
        say(f"{out} holds the finished run")
    else:
        try:
            outcome = train_method(start, config, bits, method, out)
        except InputError:
            with contextlib.suppress(InputError):
                _write_report(Run(out))
            raise
        if save_model:
            assert outcome.model is not None
            _save_model(outcome.model, start.tokenizer, out)
    _write_report(Run(out))
    say(terminal([outcome.row]))
    say(f"written to {out}: telemetry.jsonl, figures/, report.html" + (f", {MODEL}/" if save_model else ""))
    return outcome.row


def _save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder `model`, so that it is complete or absent."""
    for left in (out / MODEL, *out.glob(f".{MODEL}-*")):  # the latter were left by a command that was killed here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=out) as work, quiet_transformers():
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        Path(work).rename(out / MODEL)


def _finished(start: Start, config: StudyConfig, plan: Sequence[Planned]) -> dict[int, Outcome]:
    """The outcomes of the runs that an earlier call has finished, by their place in the plan."""
    found = {index: finished_outcome(start, config, *run) for index, run in enumerate(plan)}
    return {index: outcome for index, outcome in found.items() if outcome is not None}


def _train_without_model(*given: Any) -> Outcome:
    """`train_method` without the trained model, so that a worker's process need not send it."""
    return replace(train_method(*given), model=None)


def _heading(reference: Evaluation, config: StudyConfig) -> str:
    return (
        f"Full precision before training: validation loss {reference.loss:.4f}, perplexity "
        f"{reference.perplexity:.2f}. Then {config.train.steps} steps at a learning rate of "
        f"{config.train.learning_rate:g}, schedule {config.train.schedule}, seed {config.train.seed}: which method "
        "wins can depend on all of these."
    )


def _outcome_line(outcome: Outcome) -> str:
    row = outcome.row
    return (
        f"{row['bits']:g} bit, {row['method']}: validation loss {row['validation_loss']:.4f} "
        f"after {row['steps']} steps and {outcome.spectra} spectra, {outcome.seconds:.0f} s"
    )


def _write_table(study: Run, outcomes: dict[int, Outcome], heading: str, *, planned: int) -> list[Row]:
    """table.json and table.md of the runs that are finished; returns the rows."""
    finished = [outcomes[index] for index in sorted(outcomes)]
    rows = with_steps_to_baseline([outcome.row for outcome in finished], [outcome.curve for outcome in finished])
    if rows:
        unfinished = f"Unfinished: {len(rows)} of {planned} runs are done. " if len(rows) < planned else ""
        write_table(rows, study.folder, heading=unfinished + heading)
    return rows


def _write_results(study: Run, outcomes: dict[int, Outcome], heading: str, *, planned: int) -> list[Row]:
    """Table, figures and report of the runs that are finished: all of them, or those before an error."""
    rows = _write_table(study, outcomes, heading, planned=planned)
    _write_report(study, table=for_report(rows))
    return rows


def _write_report(run: Run, *, table: Sequence[Row] | None = None) -> None:
    """report.html and figures/ of a run or a study, unless nothing was measured."""
    if any(single.records for single in (run, *run.runs)):
        page.write(run, table=table, images=True)
