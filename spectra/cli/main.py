"""The `spectra` command: measure spectra, draw, compare and report them, and see what this machine can do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spectra.backend.version import __version__
from spectra.cli import compare, crosscheck, doctor, measure, plot, report
from spectra.cli.command_line import OneLineParser, run_command
from spectra.cli.completion import add_completion


@run_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The arguments. None: those of the process.

    Returns:
        The exit code.
    """
    options = build_parser().parse_args(arguments)
    options.command(options)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of `spectra`. What it parses has a function `command` that takes the parsed options."""
    parser = OneLineParser(prog="spectra", description="Hessian spectra of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"spectra {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (measure, plot, compare, report, crosscheck, doctor):
        command.add_parser(commands)
    return parser
