"""Progress bars with the time left: on a terminal only, and a line for each worker of a study."""

from __future__ import annotations

import os

from tqdm import tqdm

from spectra.cli.command_line import on_terminal

POSITION = "QAT_BAR_POSITION"  # in a worker's environment: the how-many-eth it is


def progress_bar(total: int, description: str, unit: str, *, inner: bool = False) -> tqdm:
    """A bar that goes away when closed; an inner one has the line below."""
    position = 2 * int(os.environ.get(POSITION, 0)) + int(inner)
    return tqdm(total=total, desc=description, unit=unit, disable=not on_terminal(), leave=False, position=position)


class MeasuringBar:
    """A bar for each measurement of a spectrum, to be called as bar(products done, products in all)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = progress_bar(total, f"{self.name}, spectrum", "product", inner=True)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away, also when a measurement broke off."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
