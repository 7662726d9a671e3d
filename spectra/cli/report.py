"""`spectra report`: a run, a study, or several side by side as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError
from spectra.cli.command_line import examples, interrupts_say


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "report",
        help="write a run's report.html, one file with everything in it",
        **examples(
            "spectra report runs/a",
            'spectra report runs/study --title "Two and four bits"',
        ),
    )
    parser.set_defaults(command=run)
    parser.add_argument("runs", nargs="+", metavar="run", help="run or study folder; several are shown side by side")
    parser.add_argument("--out", help="folder to write to (default: that of the run; needed for several)")
    parser.add_argument("--title", help="heading of the report")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from spectra.views import page

    if len(options.runs) > 1 and options.out is None:
        raise InputError(f"--out is expected with {len(options.runs)} runs: name the folder to write to")
    with interrupts_say("no report was written", unless=Path(options.out or options.runs[0]) / page.REPORT):
        path = page.write(options.runs, title=options.title, out=options.out)
    print(path)
