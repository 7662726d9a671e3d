"""Completion of commands in a shell: the script that `--print-completion` prints, which shtab makes of a parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from spectra.backend.extras import need

SHELLS = ("bash", "zsh", "tcsh")
# Arguments that are files or folders, by the name of what they give.
PATHS = ("run", "runs", "other", "out", "model", "tokenizer", "text", "images", "folder")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add --print-completion to a program.

    Args:
        parser: The parser of the program, with its commands or before they are added.
    """
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script that completes commands and options in a shell ({', '.join(SHELLS)}), and exit",
    )


class _PrintCompletion(argparse.Action):
    """Print the script and end, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        need("shtab")
        import shtab

        for action in _actions(parser):
            if action.dest in PATHS and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a program and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
