"""`spectra compare`: what changed between two spectra of a run, or of two runs."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from typing import Any

from spectra.backend.errors import InputError
from spectra.cli.command_line import add_formats, examples, interrupts_say, print_csv, print_json
from spectra.cli.tables import aligned, known_digits, quantity_name
from spectra.estimates.changes import Change, compare
from spectra.estimates.origin import OTHER_BATCHES, notes_on_differences
from spectra.runs.flat import flattened
from spectra.runs.folder import Run
from spectra.runs.planned import unfinished
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import modes, select

# entries of config.json in which two runs have to agree, and what they are called
SAME = {"model": "models", "params": "parameters", "training": "modes (training)"}


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "compare",
        help="what changed between two spectra of a run, or of two runs",
        **examples(
            "spectra compare runs/study/2bit-baseline runs/study/2bit-winq",
            "spectra compare runs/study/2bit-winq --from 0 --csv",
        ),
    )
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("run", help="run folder")
    add("other", nargs="?", help="a second run folder: compare its last spectrum with the first's last")
    add("--from", dest="start", type=int, metavar="STEP", help="training step before (default: the first)")
    add("--to", dest="end", type=int, metavar="STEP", help="training step after (default: the last)")
    add("--mode", help="which Hessian, where a run has several (default: the first)")
    add_formats(parser, json="print the changes as JSON", csv="print the changes as CSV")


def run(options: argparse.Namespace) -> None:
    """Print each quantity before and after, and how far it changed. Nothing is written."""
    with interrupts_say("nothing was compared"):
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    (first, before), (second, after) = _two_records(options)
    _check_alike(first, second)
    densities = first.density(before), second.density(after)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the notes tell of
        changes = compare(*densities, near_zero_tol=after.near_zero_tol)
    paired = all(change.paired for change in changes.values())
    notes = notes_on_differences(*(each.origin for each in densities))
    if _other_batches(first.config, second.config) and OTHER_BATCHES not in notes:
        notes.append(OTHER_BATCHES)
    for single in dict.fromkeys((first, second)):
        if lacking := unfinished(single):
            notes.append(f"{single.folder} is unfinished: {lacking}")
    if options.json:
        places = {"before": _place(first, before), "after": _place(second, after)}
        print_json({**places, "paired": paired, "notes": notes, "changes": _plain(changes)})
        return
    if options.csv:
        print_csv([_flat(key, change) for key, change in changes.items()])
        return
    print(f"{_place(first, before)} -> {_place(second, after)}, {'the same' if paired else 'different'} probe vectors")
    for note in notes:
        print(f"note: {note}")
    rows = [("quantity", "before", "after", "change")]
    for key, change in changes.items():
        numbers = known_digits(change.before), known_digits(change.after)
        rows.append((quantity_name(key, after), *numbers, change.verdict))
    for line in aligned(rows, "<>><"):
        print(line)


def _check_alike(first: Run, second: Run) -> None:
    """Raise an InputError that names what the two runs measured differently, as far as config.json says it."""
    one, other = first.config, second.config
    for key, name in SAME.items():
        if key in one and key in other and one[key] != other[key]:
            raise InputError(
                f"two runs of the same {name} are expected, got {key}: {_in_words(one[key])} in {first.folder} and "
                f"{_in_words(other[key])} in {second.folder}: measure both alike"
            )


def _other_batches(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.get("batches") != other.get("batches")


def _in_words(value: Any) -> str:
    if value is None:
        return "all"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Every change in types that JSON has."""
    return {
        key: {name: getattr(change, name).to_dict() for name in ("before", "after", "difference", "ratio")}
        | {"verdict": change.verdict}
        for key, change in changes.items()
    }


def _flat(key: str, change: Change) -> dict[str, Any]:
    """A change as one row."""
    estimates = {name: getattr(change, name) for name in ("before", "after", "difference", "ratio")}
    return {"quantity": key, **flattened(estimates), "paired": change.paired, "verdict": change.verdict}


def _two_records(options: argparse.Namespace) -> list[tuple[Run, SpectrumRecord]]:
    """The two records to compare, each with its run: of one training step of two runs, or of two steps of one run."""
    runs = [Run(folder) for folder in (options.run, options.other or options.run)]
    for run in runs:
        if run.runs and not run.records:
            raise InputError(f"{run.folder} is a study: name one or two of its runs, such as {run.runs[0].folder}")
    mode = options.mode or (modes(runs[0]) or [None])[0]
    if options.other is None:
        return _ends_of_run(runs[0], mode, options.start, options.end)
    if options.start is not None:
        raise InputError("--from is for the steps of a single run: give --to alone, the step of both runs")
    return [(run, select(run, mode=mode, steps=options.end)[-1]) for run in runs]


def _ends_of_run(run: Run, mode: str | None, start: int | None, end: int | None) -> list[tuple[Run, SpectrumRecord]]:
    """The first record of training step `start` and the last of `end`; None stands for every training step."""
    after = select(run, mode=mode, steps=end)[-1]
    before = select(run, mode=mode, steps=start)[0]
    if before == after:
        raise InputError(
            f"two spectra are expected, but both ends are the one of step {after.step} in {run.folder}: "
            "choose other steps with --from and --to, or name a second run"
        )
    return [(run, before), (run, after)]


def _place(run: Run, record: SpectrumRecord) -> str:
    """Where a record stands: run folder, training step, label and mode."""
    label = f" ({record.label})" if record.label else ""
    return f"{run.folder} step {record.step}{label}, {record.mode}"
