"""Progress with the time left: a bar on a terminal, and elsewhere, as in a pipe or a log file, a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from spectra.cli.command_line import on_terminal

EVERY = 30.0  # seconds between two lines, and before the first


class ProgressLines:
    """A line on stderr every 30 seconds, with the methods of a tqdm bar that the commands call.

    Args:
        total: How many units the work has, None where it is not known yet.
        description: What is being done.
        unit: The name of a unit, in the plural.

    Attributes:
        total: How many units the work has.
        n: How many are done.
    """

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.n = total, 0
        self._description, self._unit, self._detail = description, unit, ""
        self._started = self._last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count more units, and write a line if the last one was written long enough ago."""
        self.n += count
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last = now
            print(self.line(now - self._started), file=sys.stderr, flush=True)

    def set_postfix_str(self, detail: str, refresh: bool = False) -> None:
        """What the next line ends with."""
        self._detail = detail

    def line(self, elapsed: float) -> str:
        """The line after some seconds.

        Args:
            elapsed: Seconds since the start.

        Returns:
            Such as "measuring: 120 of 480 products, 00:30, 01:30 left".
        """
        counted = f"{self.n:,} {self._unit}" if self.total is None else f"{self.n:,} of {self.total:,} {self._unit}"
        parts = [f"{self._description}: {counted}", tqdm.format_interval(elapsed)]
        if self.total is not None and self.n > 0:
            left = max(self.total - self.n, 0) * elapsed / self.n
            parts.append(f"{tqdm.format_interval(left)} left")
        return ", ".join([*parts, *filter(None, [self._detail])])

    def close(self) -> None:
        """End; nothing has to be removed."""


def progress(total: int | None, description: str, unit: str, *, position: int | None = None) -> tqdm | ProgressLines:
    """Progress with the time left, for a terminal or for a pipe.

    Args:
        total: How many units the work has, None where it is not known yet.
        description: What is being done.
        unit: The name of a unit, in the plural.
        position: The line of the bar on a terminal where there are several.

    Returns:
        A bar that disappears when it is closed, or lines.
    """
    if not on_terminal():
        return ProgressLines(total, description, unit)
    return tqdm(total=total, desc=description, unit=f" {unit}", leave=False, position=position)
