"""How figures look: colours that all kinds of colour vision tell apart, axes, ticks and legends. No global settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: a colour for each bit-width, the same in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BITS_COLOURS = {1: "#D55E00", 1.58: "#E69F00", 2: "#0072B2", 3: "#56B4E9", 4: "#009E73", 8: "#CC79A7", 16: "#000000"}
METHOD_LINES = {"baseline": (0, (4, 2)), "winq": "-"}
AFTER_RESET_LINE = (0, (2, 1))
METHOD_NAMES = {"winq": "WinQ"}
MOST_IN_LEGEND = 9
PANEL = (7.2, 4.2)  # inches
INK, FAINT, REFERENCE = "#333333", "#dddddd", "#000000"


def run_name(run: Run) -> str:
    """Bit-width and method as far as the run's config has them, else the folder's name."""
    bits, method = run.config.get("bits"), run.config.get("method")
    if not isinstance(method, str):
        return run.folder.resolve().name
    width = f"{bits:g}-bit " if isinstance(bits, int | float) else ""
    return width + METHOD_NAMES.get(method, method)


def is_reference(run: Run) -> bool:
    """Whether the run is what others are compared with: one with a method but no bit-width, such as full precision."""
    return isinstance(run.config.get("method"), str) and not isinstance(run.config.get("bits"), int | float)


def run_style(run: Run, position: int = 0) -> dict[str, Any]:
    """Colour by bit-width and line style by method where the run's config has them, else colour by position.

    What the others are compared with is black.
    """
    bits, method = run.config.get("bits"), run.config.get("method")
    colour = PALETTE[position % len(PALETTE)]
    if is_reference(run):
        return {"color": REFERENCE, "linestyle": "-."}
    if not isinstance(bits, int | float) or not isinstance(method, str):
        return {"color": colour, "linestyle": "-"}
    return {"color": BITS_COLOURS.get(bits, colour), "linestyle": METHOD_LINES.get(method, "-.")}


def step_colour(step: int, last: int) -> Any:
    """A colour for a training step: light at the start, dark at the last."""
    return step_colours()(step / last if last else 1.0)


def step_colours() -> Any:
    """The colour map of training steps, less its lightest end, which white paper swallows."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1.0, 256)), name="steps")


def new_axes() -> Axes:
    """Axes on a new figure of pyplot, so that a notebook shows it."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=PANEL, layout="constrained")[1]


def new_figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure for saving, which pyplot does not know and so need not be closed; panels in a row share their axes."""
    from matplotlib.figure import Figure

    width = PANEL[0] if panels == 1 else 6.0 * panels
    figure = Figure(figsize=(width, PANEL[1]), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0])


def tidy(ax: Axes) -> None:
    """A light grid behind the data and no box around it."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.grid(True, which="major", color=FAINT, linewidth=0.6, alpha=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, which="both")
    ax.tick_params(which="minor", length=2, color="#bbbbbb")


def symlog_axis(ax: Axes, low: float, high: float, threshold: float) -> None:
    """Make the x axis linear within +-threshold and logarithmic beyond, with a tick at some decades of each side."""
    from matplotlib.ticker import FixedLocator, LogFormatterMathtext, NullLocator

    ax.set_xscale("symlog", linthresh=threshold, linscale=0.8)
    first, last = round(math.log10(threshold)), math.floor(math.log10(max(-low, high, threshold)))
    stride = math.ceil((last - first + 1) / 5)
    decades = [10.0**exponent for exponent in range(last, first - 1, -stride)]
    ticks = [-decade for decade in decades if -decade >= low] + [0.0] + [decade for decade in decades if decade <= high]
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_major_formatter(LogFormatterMathtext())
    ax.xaxis.set_minor_locator(NullLocator())


def legend_outside(ax: Axes, handles: list[Any], labels: list[str]) -> None:
    """A small legend to the right of the axes, where it hides nothing."""
    ax.legend(handles, labels, frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def step_bar(ax: Axes, last: int) -> None:
    """A colour bar of training steps, for more curves than a legend can name."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = ax.figure.colorbar(ScalarMappable(Normalize(0, last), step_colours()), ax=ax, label="training step")
    bar.outline.set_visible(False)
