"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness) on a model that is loaded already.

lm-eval scores a model of its own loading by default. Here its class for models of transformers, HFLM, is given the
quantized model itself, so activations and caches are quantized in the tasks too, and packed weights are used as packed.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qat.training.evaluate import BLOCK, evaluation_mode, fitting_batch
from spectra.backend.errors import InputError, first_line
from spectra.backend.extras import need
from spectra.integrations.loading import longest_sequence

LOGGERS = ("lm_eval", "lm-eval", "datasets", "evaluate", "httpx")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: The name of the task, or of a group of tasks.
        metric: The name of the metric, such as "acc".
        value: Its value; text where the task has no number.
        standard_error: Of the mean over the examples, by lm-eval; None where it gives none.
        filter: What is done to an answer before it is scored; "none" for nothing.
        shots: Examples with their answer before each question; None for a group.
        examples: How many examples were scored; None for a group.
    """

    task: str
    metric: str
    value: float | str
    standard_error: float | None = None
    filter: str = "none"
    shots: int | None = None
    examples: int | None = None


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    trust_remote_code: bool = False,
) -> list[TaskScore]:
    """Score a model on tasks of lm-eval.

    Args:
        model: A causal language model of transformers, quantized or not, on the device to compute on.
        tokenizer: Its tokenizer.
        tasks: Names or globs of tasks, groups and tags.
        folder: A folder with further tasks as YAML files.
        shots: Examples with their answer before each question; None is what each task says.
        limit: Examples a task at most, from the first; None: all.
        batch_size: Sequences a forward pass; None is what fits into half of the free memory, 16 at most.
        chat_template: Whether questions are put into the tokenizer's chat template.
        trust_remote_code: Run the code that a task's data set brings along.

    Returns:
        The scores in the order of lm-eval's table.

    Raises:
        MissingExtraError: lm-eval is not installed.
        InputError: There is no such task, its data cannot be had, or a setting is out of range.
    """
    need("lm_eval")
    for name, value, least in (("--shots", shots, 0), ("--limit", limit, 1), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} is {least} or more, got {value}")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise InputError(f"--task-folder is a folder of YAML files, and there is no folder {folder}: check the path")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: leave out --chat-template")
    with _quiet():
        from lm_eval.evaluator import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

        manager = _manager(tasks, folder)
        names = _known(manager, tasks)
        longest = min(BLOCK, longest_sequence(model) or BLOCK)  # type: ignore[arg-type]
        batch_size = batch_size or fitting_batch(model, longest, next(model.parameters()).device)
        with evaluation_mode(model), _tied_as_it_is(model):
            try:
                found: Any = simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"),  # type: ignore[arg-type]
                    tasks=names,
                    task_manager=manager,
                    num_fewshot=shots,
                    limit=limit,
                    apply_chat_template=chat_template,
                    log_samples=False,
                    bootstrap_iters=1000,
                    metadata={"trust_remote_code": True} if trust_remote_code else None,
                )
            except InputError:
                raise
            except Exception as error:  # whatever a task, its data or a hub raises
                raise InputError(
                    f"lm-eval failed on {', '.join(names)} ({type(error).__name__}: {first_line(error)}): check the "
                    "task and its data, or lower --batch-size where memory ran out"
                ) from error
    return _scores(found)


def _manager(tasks: Sequence[str], folder: str | Path | None) -> Any:
    """What knows the tasks. lm-eval's own, ten thousand files, are read only where the folder lacks one of them."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    if folder is None:
        return TaskManager()
    path = str(Path(folder).expanduser())
    own = TaskManager(include_path=path, include_defaults=False)
    if all(set(own.match_tasks([task])) & set(own.all_subtasks) for task in tasks):
        return own
    return TaskManager(include_path=path)


def in_table(scores: Sequence[TaskScore]) -> str:
    """The scores in columns, a line each, for a terminal.

    Args:
        scores: What `evaluate_tasks` returned.

    Returns:
        The table, with a line of headings.

    Example:
        >>> print(in_table([TaskScore("piqa", "acc", 0.5, 0.25, shots=0, examples=4)]))
        task  metric  filter  shots  examples  value   standard error
        piqa  acc     none    0      4         0.5000  0.2500
    """
    rows: list[tuple[str, ...]] = [("task", "metric", "filter", "shots", "examples", "value", "standard error")]
    for score in scores:
        value = score.value if isinstance(score.value, str) else f"{score.value:.4f}"
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        counts = ["" if count is None else f"{count:,}" for count in (score.shots, score.examples)]
        rows.append((score.task, score.metric, score.filter, *counts, value, error))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _known(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names that names and globs stand for. Raises InputError for one that stands for none."""
    names: list[str] = []
    for task in tasks:
        found = sorted(manager.match_tasks([task]))
        if not found:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            like = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(
                f"lm-eval has no task {task!r}{like}: `lm_eval ls tasks` lists them, and --task-folder adds your own"
            )
        names += [name for name in found if name not in names]
    if not names:
        raise InputError("--tasks is empty: give names of tasks, separated by commas")
    return names


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, measured in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        shots = found.get("n-shot", {}).get(task)
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = measured.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, float) else None  # "N/A" where there is none
            value = value if isinstance(value, str) else float(value)
            scores.append(TaskScore(task, metric, value, error, kind, shots, counted))
    return scores


@contextlib.contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """A context in which `tie_weights`, which HFLM calls, leaves the model as it is.

    A quantized head is a layer of its own, and packed weights have no parameter to tie.
    """
    model.__dict__["tie_weights"] = lambda *arguments, **options: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which lm-eval and the libraries below it log errors alone."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
