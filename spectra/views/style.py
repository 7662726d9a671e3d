"""The style of figures: colours, lines, axes, ticks and legends. matplotlib's global settings stay as they are."""

from __future__ import annotations

import io
import math
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.runs.folder import Run
from spectra.views.marks import legend_entries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (Color Universal Design, 2008), whose colours people with any colour vision distinguish.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE_STYLE = {"color": "#000000", "linestyle": "dashdot"}
# What tells lines and bands apart without colour. Runs of one colour differ in their lines, so these follow the line.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "xxx", "+++", "|||", "---")  # of lines: dots make an SVG of a megabyte
MARKERS_ALONG = 9  # markers along a line
UNRESOLVED_HATCH = "////"
REPEATED_LINE = (0, (2, 1))  # line style of a second spectrum at the same training step
MAX_STEPS_IN_LEGEND = 9  # more training steps get a colour bar
MAX_LEGEND_ENTRIES = 22  # as many as fit beside a panel
LEGEND_WIDTH, TITLE_WIDTH = 32, 40  # characters a line
PANEL = (7.2, 4.2)  # inches
NARROW = 4.0  # inches; the legend of narrower axes is inside
LEGENDS = ("auto", "outside", "inside", "none")
TEXT_COLOUR, AXIS_COLOUR, GRID_COLOUR = "#333333", "#999999", "#dddddd"


def run_style(run: Run, position: int = 0) -> dict[str, Any]:
    """Colour and line style of a run, as keywords of matplotlib.

    What the run's presentation says comes first. Without it a reference is black and dash-dotted, and any other run
    has a solid line in the palette's colour of its position.

    Args:
        run: The run that is drawn.
        position: Its place among the runs of the figure, from 0.

    Returns:
        The keywords "color" and "linestyle".
    """
    shown = run.presentation
    style = {"color": PALETTE[position % len(PALETTE)], "linestyle": "solid"}
    if shown.reference:
        style = dict(REFERENCE_STYLE)
    return {"color": shown.color or style["color"], "linestyle": shown.line or style["linestyle"]}


def run_marks(run: Run, position: int = 0) -> tuple[str, str]:
    """Marker and hatch of a run, which follow its line where its presentation names one, else its position.

    Args:
        run: The run that is drawn.
        position: Its place among the runs of the figure, from 0.

    Returns:
        The marker and the hatch, "" for none.
    """
    shown = run.presentation
    if shown.reference:
        return "", ""
    if shown.line is None:
        return MARKERS[position % len(MARKERS)], HATCHES[position % len(HATCHES)]
    kind = 0 if shown.line in ("solid", "-") else 1
    return MARKERS[kind], HATCHES[kind]


def literal(text: str) -> str:
    """Text that matplotlib shows as it is: dollar signs start no formula, an underscore in front hides no entry.

    Characters that no font has, such as those of a file name in another encoding, become a question mark.
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return (" " if text.startswith("_") else "") + shown.replace("$", r"\$")


def wrapped(text: str, width: int) -> str:
    """Text in up to three lines of `width` characters, so that a long one leaves room for the axes."""
    return text if len(text) <= width else "\n".join(wrap(text, width, max_lines=3, placeholder=" …"))


def step_colour(step: int, last: int) -> Any:
    """The colour of a training step: light at the start, dark at the last."""
    return step_colours()(step / last if last else 1.0)


def step_colours() -> Any:
    """The colour map of training steps, without its lightest part, which is hard to see on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1.0, 256)), name="steps")


def new_axes() -> Axes:
    """Axes on a new figure of pyplot, so that a notebook shows it."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=PANEL, layout="constrained")[1]


def forget(ax: Axes) -> None:
    """Close the figure of axes that `new_axes` made."""
    import matplotlib.pyplot as plt

    plt.close(ax.figure)  # type: ignore[arg-type]


def new_figure(panels: int = 1, *, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure for saving. It is not registered with pyplot, so it need not be closed.

    Args:
        panels: How many axes it has, in a row; they share their ranges of x.
        share_y: Whether they share their ranges of y too.

    Returns:
        The figure and its axes, from left to right.
    """
    from matplotlib.figure import Figure

    width = PANEL[0] if panels == 1 else max(12.0, 4.2 * panels)
    figure = Figure(figsize=(width, PANEL[1]), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=True, sharey=share_y)[0])


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """A figure as the contents of an image file; the same figure gives the same SVG.

    Args:
        figure: The figure.
        kind: "png", "svg", "pdf": what matplotlib writes.
        **options: Further options of `savefig`.

    Returns:
        The bytes of the file.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "spectra"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return buffer.getvalue()


def tidy(ax: Axes) -> None:
    """A light grid behind the data, no box around it, and names of axes in lines that fit."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(AXIS_COLOUR)
    ax.grid(True, which="major", color=GRID_COLOUR, linewidth=0.6, alpha=0.7)
    ax.set_axisbelow(True)
    width, height = inches(ax)
    size = 9 if width >= NARROW else 7.5
    ax.tick_params(colors=TEXT_COLOUR, labelsize=size, which="both")
    ax.tick_params(which="minor", length=2, color="#bbbbbb")
    for label, length in ((ax.xaxis.label, width), (ax.yaxis.label, height)):
        label.set_fontsize(size + 1)
        letters = int(length * 72 / (0.55 * (size + 1)))
        label.set_text("\n".join(wrap(label.get_text(), max(letters, 10), break_long_words=False)))


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of axes as far as the figure has laid them out."""
    figure = ax.figure
    box = ax.get_position()
    width, height = figure.get_figwidth(), figure.get_figheight()  # type: ignore[union-attr]
    return box.width * width, box.height * height


def note(ax: Axes, words: str) -> None:
    """Small words above the axes on the right; none for ""."""
    if words:
        ax.set_title(words, fontsize=9, loc="right", color=TEXT_COLOUR)


def symlog_axis(ax: Axes, low: float, high: float, threshold: float) -> None:
    """Make the x axis linear within +-threshold and logarithmic beyond, with a tick at some decades of each side.

    Args:
        ax: The axes.
        low: The smallest eigenvalue shown.
        high: The largest eigenvalue shown.
        threshold: Where the axis turns from linear to logarithmic, a power of ten.
    """
    from matplotlib.ticker import FixedLocator, LogFormatterMathtext, NullLocator

    ax.set_xscale("symlog", linthresh=threshold, linscale=0.8)
    first, last = round(math.log10(threshold)), math.floor(math.log10(max(-low, high, threshold)))
    stride = math.ceil((last - first + 1) / 5)
    decades = [10.0**exponent for exponent in range(last, first - 1, -stride)]
    ticks = [-decade for decade in decades if -decade >= low] + [0.0] + [decade for decade in decades if decade <= high]
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_major_formatter(LogFormatterMathtext())
    ax.xaxis.set_minor_locator(NullLocator())


def add_legend(ax: Axes, handles: list[Any], labels: list[str], place: str = "auto") -> None:
    """A small legend where it covers no data: to the right of the axes, or inside narrow ones.

    Args:
        ax: The axes.
        handles: What matplotlib draws beside the labels.
        labels: The labels.
        place: "outside", "inside", "none", or "auto" for what the width of the axes asks for.

    Raises:
        InputError: The place is not known.
    """
    if place not in LEGENDS:
        raise InputError(f"expected a legend of {', '.join(LEGENDS)}, got {place!r}")
    if place == "none" or not handles:
        return
    if place == "auto":
        place = "outside" if inches(ax)[0] >= NARROW and len(handles) > 1 else "inside"
    names, labels = labels, [wrapped(label, LEGEND_WIDTH) for label in labels]
    if place == "outside":
        beside = ax.legend(handles, labels, frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))
        legend_entries(ax, beside.get_texts(), names)
        return
    inside = {"frameon": True, "framealpha": 0.8, "edgecolor": "none", "borderpad": 0.2, "labelspacing": 0.25}
    size = 8 if inches(ax)[0] >= NARROW else 6.5
    over = ax.legend(handles, labels, fontsize=size, loc="best", handlelength=1.8, **inside)
    over.set_zorder(10)
    legend_entries(ax, over.get_texts(), names)


def step_bar(ax: Axes, last: int) -> None:
    """A colour bar of training steps from 0 to `last`, for more curves than a legend can name."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = ax.figure.colorbar(ScalarMappable(Normalize(0, last), step_colours()), ax=ax, label="training step")
    bar.outline.set_visible(False)
