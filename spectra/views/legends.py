"""The legend of a figure of spectra: a line for each, or a colour bar of training steps, and what hatching means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectra.views.curves import Curve
from spectra.views.style import (
    MAX_LEGEND_ENTRIES,
    MAX_STEPS_IN_LEGEND,
    REPEATED_LINE,
    TEXT_COLOUR,
    UNRESOLVED_HATCH,
    add_legend,
    step_bar,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve_legend(ax: Axes, curves: Sequence[Curve], *, place: str = "auto", further: Sequence[Any] = ()) -> None:
    """Add a legend of spectra.

    Repeated spectra of one kind share an entry. More training steps than a legend can name get a colour bar.

    Args:
        ax: The axes.
        curves: The spectra that are drawn.
        place: See `spectra.views.style.add_legend`.
        further: Handles of matplotlib, with labels, for further entries.
    """
    from matplotlib.lines import Line2D

    first = {curve.step for curve in curves if not curve.repeated}
    shared = [curve.repeated if curve.step in first else "" for curve in curves]
    own = [curve for curve, words in zip(curves, shared, strict=True) if not words]
    handles: list[Any] = [_line(curve) for curve in own]
    if len(handles) > MAX_STEPS_IN_LEGEND and all(curve.step is not None for curve in curves):
        if place != "none":
            step_bar(ax, max(curve.step or 0 for curve in curves))
        handles = []
    for words in dict.fromkeys(filter(None, shared)):
        handles.append(Line2D([], [], color=TEXT_COLOUR, linewidth=1.5, linestyle=REPEATED_LINE, label=words))
    if len(handles) > MAX_LEGEND_ENTRIES:
        handles = []
    handles += further
    add_legend(ax, handles, [str(handle.get_label()) for handle in handles], place)


def hatched_entry(label: str) -> Any:
    """An entry that says what hatching means."""
    from matplotlib.patches import Patch

    return Patch(facecolor="none", edgecolor=TEXT_COLOUR, hatch=UNRESOLVED_HATCH, linewidth=0.4, alpha=0.6, label=label)


def _line(curve: Curve) -> Any:
    """The entry of a spectrum."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linewidth=1.5, markersize=4, marker=curve.marker, label=curve.label, **curve.style)
