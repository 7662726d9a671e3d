"""A whole study: quantize one full-precision model at several bit-widths, train it by several methods, and compare.

Every run starts from the same weights, sees the same batches in the same order, and is measured with the same probe
vectors on the same sequences. Two runs of one seed differ in the bit-width or the method alone. The reference is the
unquantized model, trained as long as the others.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qat.study.config import REFERENCE, StudyConfig
from qat.study.measure import measure_full_precision
from qat.study.plan import PlannedRun, plan_of, queue, widths_of
from qat.study.resume import NOT_COMPARED, check_same, kept_in_words
from qat.study.run import Outcome, finished_outcome, follow_method, run_settings, train_method
from qat.study.seeds import in_words, spread_rows, write_spread
from qat.study.shared_start import SharedStart, remove_starts
from qat.study.start import Start, prepare
from qat.study.table import Row, for_report, terminal, with_steps_to_baseline, write_table
from qat.study.workers import run_jobs
from qat.training.checkpoints import remove_checkpoints
from qat.training.evaluate import Evaluation, evaluate
from qat.training.ranks import agreed, batch_in_words, join, rank, rank_count, refuse_ranks
from spectra.backend.errors import InputError
from spectra.integrations.loading import quiet_transformers
from spectra.runs.folder import Run, is_recorded
from spectra.runs.planned import PLANNED_RUNS
from spectra.views import page

MODEL = "model"


def compare(config: StudyConfig, *, say: Callable[[str], None] = print) -> list[Row]:
    """Run a whole study: the reference and a run for each bit-width, method and seed; then table, figures and report.

    A study that was interrupted goes on: finished runs are kept, and the others go on from their last checkpoint.

    Args:
        config: The study's settings; `config.out` is the folder to make, or that of the same study.
        say: Told what happens, a line at a time.

    Returns:
        The rows of the table.

    Raises:
        InputError: A setting, the text or the model cannot be used. This is raised before anything slow.
        NonFiniteError: A loss or a Hessian-vector product held NaN or infinity. What was recorded is kept and reported.
    """
    refuse_ranks("qat compare")
    plan = plan_of(config)
    try:
        return _compare(config, Path(config.out), plan, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_in_words(plan, config)) from None


def _compare(config: StudyConfig, out: Path, plan: Sequence[PlannedRun], say: Callable[[str], None]) -> list[Row]:
    """`compare` with the plan of its runs."""
    folders = [run.folder for run in plan] if config.reference else [out / REFERENCE, *(run.folder for run in plan)]
    settings = {"study": "compare", **config.to_config(), PLANNED_RUNS: [folder.name for folder in folders]}
    check_same(out, settings)
    for folder in folders:
        check_same(folder, {})
    if not is_recorded(out):
        remove_starts(out)  # of another study, whose runs were deleted
    start = prepare(config, say=say)
    study = Run.open_or_create(out, {**settings, **start.facts}, not_compared=NOT_COMPARED)
    outcomes = _finished(start, config, plan)
    if outcomes:
        say(f"going on with the study in {out}: {len(outcomes)} of {len(plan)} runs are finished")
    heading = ""
    try:
        before = _full_precision(start, config, out)
        say(f"full precision before training: validation loss {before.loss:.4f}, perplexity {before.perplexity:.2f}")
        heading = _heading(before, config)
        waiting = [index for index in queue(plan, workers=config.workers) if index not in outcomes]
        jobs = [(config, plan[index], _shared(plan, plan[index])) for index in waiting]
        with contextlib.closing(run_jobs(_train_without_model, start, jobs, workers=config.workers)) as ended:
            for position, outcome in ended:
                outcomes[waiting[position]] = outcome
                say(_outcome_line(plan[waiting[position]], outcome))
                _write_table(study, outcomes, heading, planned=len(plan))
    except InputError:
        with contextlib.suppress(InputError):  # the error to report is the one that stopped the study
            _write_results(study, outcomes, heading, planned=len(plan))
        raise
    remove_starts(out)
    rows = _write_results(study, outcomes, heading, planned=len(plan))
    say("\n" + heading + "\n\n" + terminal(rows) + "\n")
    for line in in_words(spread_rows(rows)):
        say(line)
    say(f"written to {out}: table.md, figures/, report.html")
    return rows


def train_one(config: StudyConfig, *, save_model: bool = True, say: Callable[[str], None] = print) -> Row:
    """Train by the first method at the first bit-width; `config.out` becomes the run folder.

    A training that was interrupted goes on from its last checkpoint, and one that is finished is kept.

    Args:
        config: The settings.
        save_model: Whether to leave the trained model in `out/model`: the quantized values as its weights, for any tool
            that loads a Hugging Face model, and latents and scales beside them, for `qat.load`.
        say: Told what happens, a line at a time.

    Returns:
        The row of the table. Under torchrun all ranks train; the first writes, and the others return nothing.

    Raises:
        InputError: As in `compare`.
        NonFiniteError: As in `compare`.
    """
    plan = PlannedRun(config.bits[0], config.methods[0], config.train.seed, Path(config.out), **widths_of(config))
    if rank_count() > 1 and config.model is None:
        raise InputError("the default model is too small for several ranks: give --model, or start without torchrun")
    join(config.device)
    if rank() > 0:
        return _follow_one(config, plan)
    with _says_what_is_kept([plan], config, save_model=save_model):
        check_same(plan.folder, run_settings(config, plan))
        start = prepare(config, say=say)
        say(batch_in_words(config.train, config.length))
        row = _train_one(start, config, plan, save_model=save_model, say=say)
        say(terminal([row]))
        beside = f", {MODEL}/" if save_model else ""
        say(f"written to {plan.folder}: telemetry.jsonl, figures/, report.html{beside}")
    return row


def train_seeds(config: StudyConfig, *, save_model: bool = True, say: Callable[[str], None] = print) -> list[Row]:
    """`train_one` once with each seed, each in a folder of its own, `out/seed0`, and a table of all in `out`.

    Args:
        config: The settings, with several seeds.
        save_model: As in `train_one`, for each of them.
        say: Told what happens, a line at a time.

    Returns:
        The rows of the table, one for each seed.

    Raises:
        InputError: As in `compare`.
        NonFiniteError: As in `compare`.
    """
    refuse_ranks("--seeds")
    out, bits, method = Path(config.out), config.bits[0], config.methods[0]
    widths = widths_of(config)
    plan = [PlannedRun(bits, method, seed, out / f"seed{seed}", seed, **widths) for seed in config.all_seeds]
    settings = {"study": "train", **config.to_config(), PLANNED_RUNS: [run.folder.name for run in plan]}
    with _says_what_is_kept(plan, config, save_model=save_model):
        check_same(out, settings)
        if not is_recorded(out):
            remove_starts(out)
        start = prepare(config, say=say)
        study = Run.open_or_create(out, {**settings, **start.facts}, not_compared=NOT_COMPARED)
        rows = []
        for run in plan:
            rows.append(_train_one(start, config, run, save_model=save_model, say=say, shared=_shared(plan, run)))
            write_table(rows, out, spread=spread_rows(rows))
        remove_starts(out)
        write_spread(spread_rows(rows), out)
        _write_report(study, table=for_report(rows, spread_rows(rows)))
        say("\n" + terminal(rows) + "\n")
        for line in in_words(spread_rows(rows)):
            say(line)
        say(f"written to {out}: table.md, figures/, report.html, and a folder for each seed")
    return rows


@contextlib.contextmanager
def _says_what_is_kept(plan: Sequence[PlannedRun], config: StudyConfig, *, save_model: bool) -> Iterator[None]:
    """A context whose interrupt says what is kept of trainings that leave a model."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_in_words(plan, config, beside=MODEL if save_model else None)) from None


def _train_one(
    start: Start,
    config: StudyConfig,
    plan: PlannedRun,
    *,
    save_model: bool,
    say: Callable[[str], None],
    shared: SharedStart | None = None,
) -> Row:
    """One training with its model and report; a finished one is kept."""
    outcome = finished_outcome(start, config, plan)
    finished = outcome is not None and (plan.folder / MODEL).is_dir() >= save_model
    if agreed(finished):
        say(f"{plan.folder} holds the finished run")
    else:
        try:
            outcome = train_method(start, config, plan, shared=shared)
        except InputError:
            with contextlib.suppress(InputError):
                _write_report(Run(plan.folder))
            raise
        if save_model:
            assert outcome.model is not None
            _save_model(outcome.model, start.tokenizer, plan.folder)
    assert outcome is not None
    remove_checkpoints(plan.folder)
    _write_report(Run(plan.folder))
    agreed(None)  # the other ranks end with this one
    return outcome.row


def _follow_one(config: StudyConfig, plan: PlannedRun) -> Row:
    """What ranks after the first do while the first is in `train_one`."""
    start = prepare(config, say=lambda line: None)
    if not agreed(True):
        follow_method(start, config, plan)
    agreed(None)
    return {}


def _save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder `model`, so that it is complete or absent."""
    for left in (out / MODEL, *out.glob(f".{MODEL}-*")):  # the latter were left by a command that was killed here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=out) as work, quiet_transformers():
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        Path(work).rename(out / MODEL)


def _full_precision(start: Start, config: StudyConfig, out: Path) -> Evaluation:
    """The validation loss of the full-precision model; its spectrum too, where it is not trained as the reference."""
    if not config.reference:
        return measure_full_precision(start, config, out / REFERENCE)
    model = copy.deepcopy(start.model).to(start.device)
    return evaluate(model, start.validation, batch_size=config.train.batch_size)


def _shared(plan: Sequence[PlannedRun], run: PlannedRun) -> SharedStart | None:
    """Where a run shares its start; None where no other run has the same."""
    alike = [other for other in plan if other.bits == run.bits]
    return SharedStart(run.folder.parent, run.bits) if len(alike) > 1 else None


def _finished(start: Start, config: StudyConfig, plan: Sequence[PlannedRun]) -> dict[int, Outcome]:
    """The outcomes of the runs that an earlier call has finished, by their place in the plan."""
    found = {index: finished_outcome(start, config, run) for index, run in enumerate(plan)}
    finished = {index: outcome for index, outcome in found.items() if outcome is not None}
    for index in finished:
        remove_checkpoints(plan[index].folder)  # left by a command that was killed at the end of the run
    return finished


def _train_without_model(start: Start, config: StudyConfig, plan: PlannedRun, shared: SharedStart | None) -> Outcome:
    """`train_method` without the trained model, so that a worker's process need not send it, and its checkpoints."""
    outcome = replace(train_method(start, config, plan, shared=shared), model=None)
    remove_checkpoints(plan.folder)
    return outcome


def _heading(before: Evaluation, config: StudyConfig) -> str:
    seeds = "seeds " + ", ".join(map(str, config.seeds)) if config.seeds else f"seed {config.train.seed}"
    distilled = config.distillation
    loss = "" if distilled is None else f" Quantized models are trained with {distilled.in_words()}."
    if config.measured_loss == "training":
        loss += " Their spectra are those of this loss; that of the unquantized model is of the cross-entropy."
    reference = " The row of 16 bits is the unquantized model, trained as long." if config.reference else ""
    return (
        f"Full precision before training: validation loss {before.loss:.4f}, perplexity "
        f"{before.perplexity:.2f}. Then {config.train.steps} steps at a learning rate of "
        f"{config.train.learning_rate:g}, schedule {config.train.schedule}, {seeds}: which method "
        f"wins can depend on all of these.{reference}{loss}"
    )


def _outcome_line(plan: PlannedRun, outcome: Outcome) -> str:
    row = outcome.row
    return (
        f"{plan.name}: validation loss {row['validation_loss']:.4f} "
        f"after {row['steps']} steps and {outcome.spectra} spectra, {outcome.seconds:.0f} s"
    )


def _write_table(study: Run, outcomes: dict[int, Outcome], heading: str, *, planned: int) -> list[Row]:
    """table.json and table.md of the runs that are finished; returns the rows."""
    finished = [outcomes[index] for index in sorted(outcomes)]
    rows = with_steps_to_baseline([outcome.row for outcome in finished], [outcome.curve for outcome in finished])
    if rows:
        unfinished = f"Unfinished: {len(rows)} of {planned} runs are done. " if len(rows) < planned else ""
        write_table(rows, study.folder, heading=unfinished + heading, spread=spread_rows(rows))
        write_spread(spread_rows(rows), study.folder)
    return rows


def _write_results(study: Run, outcomes: dict[int, Outcome], heading: str, *, planned: int) -> list[Row]:
    """Table, figures and report of the runs that are finished: all of them, or those before an error."""
    rows = _write_table(study, outcomes, heading, planned=planned)
    _write_report(study, table=for_report(rows, spread_rows(rows)))
    return rows


def _write_report(run: Run, *, table: Sequence[Row] | None = None) -> None:
    """report.html and figures/ of a run or a study, unless nothing was measured."""
    if any(single.records for single in (run, *run.runs)):
        page.write(run, table=table, images=True)
