"""What a figure shows of each spectrum or run: which artists belong to it, and what is known at points along it.

Drawing functions note both here; the report's page reads them, for values on hover and a legend that hides and shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES, ENTRY = "series", "entry"  # the parts of a figure: what is drawn, and what the legend says of it
POINTS = 100  # along an axis, at which a curve is read


@dataclass(frozen=True)
class Readings:
    """What is known of one spectrum or run at points along the x axis.

    Attributes:
        series: The number of the spectrum or run in its figure.
        name: What it is called.
        colour: Its colour, as matplotlib takes it.
        at: (p,) the points, in data coordinates, ascending for cells.
        axis: What stands before the number of a point, such as "step ".
        says: What is known there, such as "0.41 [0.39, 0.43]".
        cells: Whether each holds from its point up to the next one, where an empty text ends a cell.
    """

    series: int
    name: str
    colour: Any
    at: Sequence[float] | np.ndarray
    axis: str
    says: Sequence[str]
    cells: bool


@dataclass
class _Marks:
    """What was noted of a figure."""

    names: list[str] = field(default_factory=list)
    readings: list[tuple[Axes, Readings]] = field(default_factory=list)
    artists: int = 0


_NOTED: WeakKeyDictionary[Any, _Marks] = WeakKeyDictionary()


@contextlib.contextmanager
def series(ax: Axes, name: str) -> Iterator[None]:
    """What is drawn on the axes inside belongs to the spectrum or run of this name.

    Args:
        ax: The axes.
        name: What the legend calls it; the same name in several axes of a figure is the same spectrum or run.

    Yields:
        Nothing.
    """
    before = set(ax.get_children())
    yield
    for artist in ax.get_children():
        if artist not in before:
            _mark(ax, artist, SERIES, name)


def read(
    ax: Axes,
    name: str,
    colour: Any,
    at: Sequence[float] | np.ndarray,
    says: Sequence[str],
    *,
    axis: str,
    cells: bool = False,
) -> None:
    """Note what is known of a spectrum or run along the x axis.

    Args:
        ax: The axes it is drawn on.
        name: What the legend calls it.
        colour: Its colour.
        at: (p,) points in data coordinates.
        says: What is known there.
        axis: What stands before the number of a point.
        cells: Whether each holds from its point up to the next one.
    """
    marks = _marks(ax)
    marks.readings.append((ax, Readings(_number(marks, name), name, colour, at, axis, says, cells)))


def legend_entries(ax: Axes, artists: Sequence[Any], names: Sequence[str]) -> None:
    """Note which entries of a legend stand for what is drawn; other entries, such as what hatching means, stay plain.

    Args:
        ax: The axes.
        artists: The texts of the legend.
        names: The label of each before it was broken into lines.
    """
    known = _marks(ax).names
    for artist, name in zip(artists, names, strict=True):
        if name in known:
            _mark(ax, artist, ENTRY, name)


def readings_of(figure: Figure) -> list[tuple[Axes, Readings]]:
    """What is known along the curves of a figure, each with its axes.

    Args:
        figure: The figure.

    Returns:
        The readings, in the order of drawing.
    """
    return list(_NOTED[figure].readings) if figure in _NOTED else []


def _marks(ax: Axes) -> _Marks:
    return _NOTED.setdefault(ax.figure, _Marks())


def _number(marks: _Marks, name: str) -> int:
    """The number of a spectrum or run in its figure."""
    if name not in marks.names:
        marks.names.append(name)
    return marks.names.index(name)


def _mark(ax: Axes, artist: Any, part: str, name: str) -> None:
    """Give an artist an id in SVG that says what it belongs to, and is its own."""
    marks = _marks(ax)
    marks.artists += 1
    artist.set_gid(f"{part}-{_number(marks, name)}-{marks.artists}")
