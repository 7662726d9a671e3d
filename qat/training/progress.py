"""Progress with the time left. Each worker of a study has its own lines on a terminal."""

from __future__ import annotations

import os

from tqdm import tqdm

from spectra.cli.progress import ProgressLines, progress

POSITION = "QAT_BAR_POSITION"  # an environment variable that holds the index of a worker


def progress_bar(total: int, description: str, unit: str, *, inner: bool = False) -> tqdm | ProgressLines:
    """A bar that disappears when it is closed, or lines where there is no terminal.

    Args:
        total: How many units the work has.
        description: What is being done.
        unit: The name of a unit, in the plural.
        inner: Whether it is drawn below another bar of the same worker.

    Returns:
        The bar.
    """
    position = 2 * int(os.environ.get(POSITION, 0)) + int(inner)
    return progress(total, description, unit, position=position)


class MeasuringBar:
    """A progress bar for each measurement of a spectrum: the `progress` of a `spectra.SpectrumProbe`.

    Call it as bar(done, total), both numbers of Hessian-vector products.

    Args:
        name: The run that is measured.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | ProgressLines | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` products are done, and remove the bar after the last."""
        if self.bar is None:
            self.bar = progress_bar(total, f"{self.name}, spectrum", "products", inner=True)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar, also when a measurement was interrupted."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
