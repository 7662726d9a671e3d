"""`spectra compare`: what changed between two spectra of a run, or of two runs."""

from __future__ import annotations

import argparse
from typing import Any

from spectra.backend.errors import InputError
from spectra.cli.tables import aligned, quantity_name
from spectra.estimates.changes import compare
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import modes, select


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser("compare", help="what changed between two spectra of a run, or of two runs")
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("run", help="run folder")
    add("other", nargs="?", help="a second run folder: compare its last spectrum with the first's last")
    add("--from", dest="start", type=int, metavar="STEP", help="training step before (default: the first)")
    add("--to", dest="end", type=int, metavar="STEP", help="training step after (default: the last)")
    add("--mode", help="which Hessian, where a run has several (default: the first)")


def run(options: argparse.Namespace) -> None:
    """Print each quantity before and after, and how far it changed."""
    (first, before), (second, after) = _two_records(options)
    changes = compare(first.density(before), second.density(after), near_zero_tol=after.near_zero_tol)
    paired = all(change.paired for change in changes.values())
    print(f"{_place(first, before)} -> {_place(second, after)}, {'the same' if paired else 'different'} probes")
    rows = [("quantity", "before", "after", "change")]
    for key, change in changes.items():
        numbers = f"{change.before.value:.4g}", f"{change.after.value:.4g}"
        rows.append((quantity_name(key, after), *numbers, change.verdict))
    for line in aligned(rows, "<>><"):
        print(line)
    if first.config.get("batches") != second.config.get("batches"):
        print("note: the two runs measured different batches, so part of a change is a difference of the batches")


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
