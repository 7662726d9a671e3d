"""The summary of a report, in sentences: what changed, what differs between runs, and what could not be resolved.

Every number in it comes from the stored spectra: changes are paired where the probe vectors were the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spectra.backend.errors import InputError
from spectra.estimates.changes import Change, compare
from spectra.estimates.digits import rounded
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import available, select, series
from spectra.views.wording import describe, listed, number, record_words, sentence_case, typeset

# Quantities that repeat another one (the Frobenius norm) or are about a tolerance are left to the table.
TOLD = tuple(key for key in ESTIMATES if key not in ("frobenius", "negative_magnitude_share", "near_zero_share"))
MOST_PAIRS = 12  # of runs that are compared in sentences
AS_DIFFERENCE = {
    "rose by": "is higher by",
    "fell by": "is lower by",
    "became more negative by": "is more negative by",
    "became less negative by": "is less negative by",
}
CHECKPOINT = "checkpoint"  # in config.json of a run that measured a checkpoint and trained nothing
SETTINGS = {"learning_rate": "learning rate", "schedule": "schedule", "seed": "seed"}


@dataclass(frozen=True)
class Part:
    """A part of the summary.

    Attributes:
        heading: What it is about.
        sentences: Its sentences, each for itself.
    """

    heading: str
    sentences: list[str]


def summary(runs: Sequence[Run]) -> list[Part]:
    """Say what runs show: changes along each, differences at the end of those in a group, and what stays open.

    Args:
        runs: The runs of a report.

    Returns:
        The parts that have something to say.
    """
    measured = [run for run in runs if run.measured]
    parts = [
        Part("Along the training", [line for run in measured for line in _along(run, measured)]),
        Part("Between runs, at the end", [*_losses(measured), *_between(measured)]),
        Part("Not resolved", _open(measured)),
        Part("What the intervals do not hold", _caveat(measured)),
    ]
    return [part for part in parts if part.sentences]


def _along(run: Run, runs: Sequence[Run]) -> Iterator[str]:
    """What changed from the first to the last spectrum of a run, in its first mode."""
    records = select(run)
    first, last = records[0], records[-1]
    if first.step == last.step:
        return
    changes = _changes((run, first), (run, last))
    if changes:
        start = f"{run.presentation.label}, from {_place(run, first)} to {_place(run, last)}: "
        yield start + _in_words(changes, runs)


def _between(runs: Sequence[Run]) -> Iterator[str]:
    """How the last spectra differ between the first run of a group and each other one of the same seed."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if not run.presentation.reference:
            groups.setdefault((run.presentation.group, run.config.get("seed")), []).append(run)
    if all(len(members) == 1 for members in groups.values()) and len({group for group, _ in groups}) == len(groups):
        groups = {"": [members[0] for members in groups.values()]}
    pairs = [(members[0], other) for members in groups.values() for other in members[1:]]
    for one, other in pairs[:MOST_PAIRS]:
        ends = (one, select(one)[-1]), (other, select(other)[-1])
        changes = _changes(*ends)
        if changes:
            start = f"{other.presentation.label} against {one.presentation.label}: "
            yield start + _in_words(changes, runs, between=True)
    if len(pairs) > MOST_PAIRS:
        yield f"{len(pairs) - MOST_PAIRS} further pairs are left to the table."


def _losses(runs: Sequence[Run]) -> Iterator[str]:
    """The last validation loss of each run; of runs that differ in their seed alone the mean and the range."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if "validation_loss" in available(run):
            value = series(run, "validation_loss").points[-1].estimate.value
            if math.isfinite(value):
                name = run.presentation.label.removesuffix(f", seed {run.config.get('seed')}")
                found.setdefault(name, []).append(value)
    if not found:
        return
    values = listed(f"{name} {_spread(losses)}" for name, losses in found.items())
    alone = all(len(losses) == 1 for losses in found.values())
    yield f"Validation loss: {values}." + (" These are single trainings, so they have no interval." if alone else "")


def _spread(values: Sequence[float]) -> str:
    """A number, or the mean of several with their range."""
    if len(values) == 1:
        return number(values[0])
    mean, low, high = (number(value) for value in (fmean(values), min(values), max(values)))
    return f"{mean} on average over {len(values)} seeds, from {low} to {high}"


def _open(runs: Sequence[Run]) -> list[str]:
    """Which quantities of the last spectra are unresolved, and in which runs."""
    last = [(run, select(run)[-1]) for run in runs]
    sentences = []
    for key in ESTIMATES:
        if key == "frobenius":
            continue
        having = [(run, record.estimates[key]) for run, record in last if key in record.estimates]
        unresolved = [(run, estimate) for run, estimate in having if not estimate.resolved]
        if not unresolved:
            continue
        who = (
            "every run"
            if len(unresolved) == len(having) > 1
            else listed(run.presentation.label for run, _ in unresolved)
        )
        low, high = min(e.low for _, e in unresolved), max(e.high for _, e in unresolved)
        low, high = (typeset(end) for end in rounded((low + high) / 2, low, high)[1:])
        within = f"between {low} and {high}"
        name = sentence_case(describe(runs, key).name)
        sentences.append(f"{name} of {who}: all that is known is that it lies {within}.")
    return sentences


def _caveat(runs: Sequence[Run]) -> list[str]:
    """What neither the intervals nor the comparisons cover."""
    trained = [run for run in runs if not run.presentation.reference and CHECKPOINT not in run.config]
    shared = {name: {_setting(run, key) for run in trained} for key, name in SETTINGS.items()}
    known = [f"{name} {values.pop()}" for name, values in shared.items() if len(values) == 1 and values != {"None"}]
    several = listed(SETTINGS.values())
    sentences = ["The intervals hold for these weights and these batches, not for other data or another training."]
    if len(trained) > 1:
        with_these = f" These runs have {listed(known)}." if known else ""
        sentences.append(f"Which method wins can depend on {several}.{with_these}")
    elif known:
        sentences.append(f"Another {several} can give another spectrum. This run has {listed(known)}.")
    return sentences


def _setting(run: Run, key: str) -> str:
    """A setting of a training in words; a probe's own `schedule`, which says when it measures, is none."""
    value = run.config.get(key)
    return str(None if isinstance(value, Mapping) else value)


def _changes(before: tuple[Run, SpectrumRecord], after: tuple[Run, SpectrumRecord]) -> dict[str, Change]:
    """The changes of the quantities that are told; {} where the spectra were not kept or cannot be compared."""
    (one, first), (other, last) = before, after
    if not (one.keeps_density(first) and other.keeps_density(last)) or first.mode != last.mode:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other batches or Hessians, which the page's settings show
        try:
            changes = compare(one.density(first), other.density(last), near_zero_tol=last.near_zero_tol)
        except InputError:
            return {}
    return {key: changes[key] for key in TOLD if key in changes}


def _in_words(changes: Mapping[str, Change], runs: Sequence[Run], *, between: bool = False) -> str:
    """What happened to each quantity; those without a measurable change, and the unresolved ones, by name alone."""
    names: dict[str, Any] = {key: f"the {describe(runs, key).name}" for key in changes}
    told = [key for key, change in changes.items() if change.measurable and change.difference.resolved]
    still = [key for key, change in changes.items() if not change.measurable and change.difference.resolved]
    rest = [key for key, change in changes.items() if not change.difference.resolved]
    sentences = []
    if told:
        sentences.append(listed(f"{names[key]} {_verdict(changes[key], between=between)}" for key in told))
    if still:
        verb = "No measurable difference in" if between else "No measurable change of"
        sentences.append(f"{verb} {listed(names[key] for key in still)}")
    if rest:
        what = "difference" if between else "change"
        sentences.append(f"Not resolved: the {what} of {listed(names[key] for key in rest)}")
    if not all(change.paired for change in changes.values()):
        sentences.append("The probe vectors were not the same, so these intervals are not paired")
    return ". ".join(sentences) + "."


def _verdict(change: Change, *, between: bool) -> str:
    """What happened, with the signs of print; as a difference between two runs if asked for."""
    verdict = change.verdict
    if between:
        for happened, differs in AS_DIFFERENCE.items():
            if verdict.startswith(happened):
                verdict = differs + verdict.removeprefix(happened)
    return verdict.replace(" -", " −").replace("[-", "[−").replace(" % [", "\u00a0%\u00a0[")


def _place(run: Run, record: SpectrumRecord) -> str:
    """The training step of a record with its label, as in "step 32 (after the reset)"."""
    words = record_words(run, record)
    return f"step {record.step}" + (f" ({words})" if words and words not in ("start", "end") else "")
