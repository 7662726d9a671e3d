"""`spectra report`: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectra.cli.command_line import examples, interrupts_say


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "report",
        help="write a run's report.html, one file with everything in it",
        **examples("spectra report runs/a", 'spectra report runs/study --title "Two and four bits"'),
    )
    parser.set_defaults(command=run)
    parser.add_argument("run", help="run or study folder")
    parser.add_argument("--title", help="heading of the report")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from spectra.views import page

    with interrupts_say("no report was written", unless=Path(options.run) / page.REPORT):
        path = page.write(options.run, title=options.title)
    print(path)
