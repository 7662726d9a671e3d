"""A whole study: quantize one full-precision model at several bit-widths, train it by several methods, and compare.

Every run starts from the same weights, sees the same batches in the same order, and is measured with the same probe
vectors on the same sequences. Two runs differ in the bit-width or the method alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qat.study.config import StudyConfig
from qat.study.measure import measure_full_precision
from qat.study.run import Outcome, dequantized, train_method
from qat.study.start import prepare
from qat.study.table import Curve, Row, for_report, terminal, with_steps_to_baseline, write_table
from qat.study.workers import run_jobs
from qat.training.evaluate import Evaluation
from spectra.backend.errors import InputError
from spectra.runs.folder import Run, check_free
from spectra.views import page


def compare(config: StudyConfig, *, say: Callable[[str], None] = print) -> list[Row]:
    """Run a whole study: one run for each bit-width and method, then table, figures and report.

    Args:
        config: The study's settings; `config.out` is the folder to make.
        say: Told what happens, a line at a time.

    Returns:
        The rows of the table.

    Raises:
        InputError: Something cannot be used as given; this is found before anything slow.
        NonFiniteError: A training or a measurement broke. What was recorded until then is kept and reported on.
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
        heading = _heading(reference, config)
        jobs = [(config, *run) for run in plan]
        for index, outcome in run_jobs(_train_without_model, start, jobs, workers=config.workers):
            outcomes[index] = outcome
            say(_outcome_line(outcome))
    except InputError:
        with contextlib.suppress(InputError):  # the error to report is the one that stopped the study
            _write_results(study, outcomes, heading)
        raise
    rows = _write_results(study, outcomes, heading)
    say("\n" + heading + "\n\n" + terminal(rows) + "\n")
    say(f"written to {out}: table.md, figures/, report.html")
    return rows


def train_one(config: StudyConfig, *, save_model: bool = True, say: Callable[[str], None] = print) -> Row:
    """Train by the first method at the first bit-width; `config.out` becomes the run folder.

    Args:
        config: The settings.
        save_model: Whether to leave the trained model in `out/model`, with the quantized values as its weights, for
            any tool that loads a Hugging Face model.
        say: Told what happens, a line at a time.

    Returns:
        The row of the table.

    Raises:
        InputError: As in `compare`.
        NonFiniteError: As in `compare`.
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


def _train_without_model(*given: Any) -> Outcome:
    """`train_method` without the model, which need not travel from a worker's process."""
    return replace(train_method(*given), model=None)


def _heading(reference: Evaluation, config: StudyConfig) -> str:
    return (
        f"Full precision before training: validation loss {reference.loss:.4f}, perplexity "
        f"{reference.perplexity:.2f}. Then {config.train.steps} steps at a learning rate of "
        f"{config.train.learning_rate:g}, schedule {config.train.schedule}, seed {config.train.seed}: which method "
        "wins can depend on all of these."
    )


def _outcome_line(outcome: Outcome) -> str:
    row, result = outcome.row, outcome.result
    return (
        f"{row['bits']:g} bit, {row['method']}: validation loss {result.validation_loss:.4f} "
        f"after {result.steps} steps and {outcome.spectra} spectra, {result.seconds:.0f} s"
    )


def _write_results(study: Run, outcomes: dict[int, Outcome], heading: str) -> list[Row]:
    """Table, figures and report of the runs that are finished: all of them, or those before an error."""
    finished = [outcomes[index] for index in sorted(outcomes)]
    curves: list[Curve] = [outcome.result.curve for outcome in finished]
    rows = with_steps_to_baseline([outcome.row for outcome in finished], curves)
    if rows:
        write_table(rows, study.folder, heading=heading)
    _write_report(study, table=for_report(rows))
    return rows


def _write_report(run: Run, *, table: Sequence[Row] | None = None) -> None:
    """report.html and figures/ of a run or a study, unless nothing was measured."""
    if any(single.records for single in (run, *run.runs)):
        page.write(run, table=table, images=True)
