"""`spectra.explore`: an interactive view of runs where there is a notebook, a picture elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from spectra.backend.errors import InputError
from spectra.backend.extras import need
from spectra.estimates.estimate import CONFIDENCE
from spectra.views.choices import Choices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.views.explorer import Explorer


def explore(runs: Any, *, level: float = CONFIDENCE) -> Explorer | Axes:
    """Look through the spectra of runs in a notebook.

    The figure is the share of eigenvalues below each value, as a band that holds the whole curve, with the negative
    share and its interval in the title. Sliders choose the training step and the group of runs, such as a bit-width;
    buttons the runs, the Hessian mode and the scales. The band is computed anew, from the Lanczos matrices of the run
    folders, at points of the range that one zooms to. What is not resolved has a band and no line, and says so.

    Args:
        runs: A run, a probe, a study (all of its runs), a folder of a run or a study, or a list of these.
        level: The probability with which each band holds its curve; see `SpectralDensity.band`.

    Returns:
        The view, which a notebook displays. Where there is no notebook, the axes of `spectra.plots.cumulative` with the
        last spectrum of each run.

    Raises:
        InputError: There is no spectrum to show, or the level is not between 0 and 1. In a notebook also where plotly
            or ipywidgets is not installed (`MissingExtraError`).
    """
    if not 0 < level < 1:
        raise InputError(f"a level between 0 and 1 is expected, got {level}")
    choices = Choices(runs)
    if not in_notebook():
        from spectra.views import plots

        return plots.cumulative(runs, level=level)
    need("plotly", "ipywidgets", "anywidget")
    from spectra.views.explorer import Explorer

    return Explorer(choices, level=level)


def in_notebook() -> bool:
    """Whether the program runs in a kernel of Jupyter, which can display widgets."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
