"""What every command of the two packages does the same way: errors in one line, exit codes, progress bars."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import csv
import difflib
import functools
import io
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spectra.backend.errors import InputError
from spectra.backend.extras import EXTRA_OF, missing
from spectra.runs.jsonlines import plain

INTERRUPTED = 130  # as shells count it: 128 and the number of the signal

Main = Callable[[Sequence[str] | None], int | None]


class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in one line as all others are; the parsers of its commands are of this class too."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and let the parser of the command answer for what it does not know, with the option that was meant."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return found, unknown

    def _meant(self, unknown: Sequence[str]) -> str:
        """A question about the option whose name is nearest to the first one that is unknown."""
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        near = difflib.get_close_matches(wrong, options, n=1, cutoff=0.7)
        return f"; did you mean {near[0]}?" if near else ""


def run_command(main: Main, *, name: str | None = None) -> Callable[..., int]:
    """Decorate a command's main function, so that a user's error ends in one line on stderr instead of a traceback.

    Args:
        main: The function. It takes the arguments (None: those of the process) and returns an exit code or None.
        name: The program's name, with which the line starts. None: the package that `main` is in.

    Returns:
        A function that returns the exit code: that of `main` (None counts as 0), or 2 for an InputError, an OSError,
        an optional package that is not installed, or arguments that argparse refuses; 130 for an interrupt. Other
        exceptions are errors of the program and keep their traceback.
    """
    program = name or main.__module__.partition(".")[0]

    @functools.wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        code = 2
        for stream in (sys.stdout, sys.stderr):  # may be in an encoding without the letters of a name or a formula
            # in the locale C errors are "surrogateescape", which letters of Greek fail with as well
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _no_interrupt_is_lost(), _warnings_in_one_line(program):
                return main(arguments) or 0
        except SystemExit as stop:  # argparse has printed its usage and its line already
            return _exit_code(stop)
        except BrokenPipeError:  # the reader of our output has ended, as in `spectra measure ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except InputError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRA_OF:
                raise
            message = str(missing(error.name))
        except OSError as error:
            message = _message(error)
        except KeyboardInterrupt as interrupt:
            message, code = str(interrupt) or "interrupted", INTERRUPTED
        words = re.sub(r"\bout=", "--out", " ".join(message.split()))  # functions take what commands have as an option
        print(f"{program}: error: {words}", file=sys.stderr)
        return code

    return command


@contextlib.contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Raise an interrupt again that came while Python ran a finalizer, where it ignores exceptions."""
    before = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.02, _thread.interrupt_main)  # by then the finalizer has ended
            again.daemon = True
            again.start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _warnings_in_one_line(program: str) -> Iterator[None]:
    """Print warnings as errors are printed, without the file and the line of code that Python shows."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"{program}: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def interrupts_say(words: str, *, unless: Path | None = None) -> Iterator[None]:
    """Let an interrupt inside end the command with true words on what it leaves.

    Args:
        words: What is so if it was interrupted before the file was written, such as "nothing was compared".
        unless: The file that is written inside. Where it has changed, the interrupt came after that, and says so.

    Yields:
        Nothing.
    """
    before = unless and _identity(unless)
    try:
        yield
    except KeyboardInterrupt:
        written = unless and _identity(unless) != before
        raise KeyboardInterrupt(f"interrupted: {f'{unless} is written' if written else words}") from None


def print_json(value: Any) -> None:
    """Print a value as strict JSON; a number that is not finite is null."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as CSV, with the names of the columns first; a number that is not finite is an empty cell.

    Args:
        rows: Plain values by column. Columns that a row lacks are empty there.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(dict(row)) for row in rows)


def add_formats(parser: argparse.ArgumentParser, *, json: str, csv: str = "") -> None:
    """Add --json, and --csv where a table is printed, of which one can be given.

    Args:
        parser: The parser of the command.
        json: The help of --json.
        csv: The help of --csv; "" where the command prints no table.
    """
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help=json)
    if csv:
        formats.add_argument("--csv", action="store_true", help=csv)


def examples(*commands: str) -> dict[str, Any]:
    """The end of a command's help.

    Args:
        *commands: Commands that can be run as they are, in a folder with the files that they name.

    Returns:
        Arguments of the command's parser.
    """
    lines = "\n".join(f"  {command}" for command in commands)
    return {"epilog": f"examples:\n{lines}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def on_terminal() -> bool:
    """Whether stderr is a terminal; progress bars are drawn on a terminal only, see `spectra.cli.progress`."""
    return sys.stderr.isatty()


def _identity(path: Path) -> tuple[int, int] | None:
    """What differs after a file was replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _message(error: OSError) -> str:
    """What happened to which file, without the error number."""
    if error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _exit_code(stop: SystemExit) -> int:
    """The exit code that Python itself would give; a text is printed and counts as 1."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
