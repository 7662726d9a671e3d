"""What every command of the two packages does the same way: errors in one line, exit codes, progress bars."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

from spectra.backend.errors import InputError

Main = Callable[[Sequence[str] | None], int | None]


def run_command(main: Main, *, name: str | None = None) -> Callable[..., int]:
    """Wrap a command so that what a person can mend ends in one line on stderr and exit code 2, with no traceback.

    main: takes the argument list (None: those of the process) and returns the exit code or None. Use as a decorator.
    name: what the line starts with; by default the package that `main` comes from. The wrapped command returns its
    exit code: 0, 2 for InputError, OSError, an interrupt or arguments that argparse turns down. Other exceptions are
    faults of the program and keep their traceback.
    """
    program = name or main.__module__.partition(".")[0]

    @functools.wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except SystemExit as stop:  # argparse has printed its usage and its line already
            return _exit_code(stop)
        except BrokenPipeError:  # the reader of our output went away, as in `spectra measure ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except InputError as error:
            message = str(error)
        except OSError as error:
            message = _describe(error)
        except KeyboardInterrupt:
            message = "interrupted; what was recorded so far is kept"
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return 2

    return command


def on_terminal() -> bool:
    """Whether a person watches: progress bars are drawn on a terminal only."""
    return sys.stderr.isatty()


def _describe(error: OSError) -> str:
    if error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
