"""A figure as an SVG element in a page, with what the page's script needs to show values, hide curves and zoom.

The element is rebuilt from the tags and attributes that figures have. Anything else that an SVG file may hold, such as
scripts, styles and addresses, is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from spectra.views import marks
from spectra.views.style import rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
TAGS = {"svg", "g", "path", "use", "defs", "clipPath", "rect", "text", "tspan", "pattern", "image"}
ATTRIBUTES = {"x", "y", "width", "height", "fill", "viewBox", "transform", "style", "clip-path", "patternUnits"}
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?![\d.]*e)")
PANEL, TICK = re.compile(r"panel-(\d+)"), re.compile(r"[xy]tick_\d+")
PART = re.compile(rf"({marks.SERIES}|{marks.ENTRY})-(\d+)-\d+")
INLINE_IMAGE = "data:image/png;base64,"


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure for a page.

    Attributes:
        svg: The SVG element, as text.
        panels: What the script needs of each panel, in plain values for JSON.
    """

    svg: str
    panels: list[dict[str, Any]]


def embedded(figure: Figure, name: str, *, described: str) -> EmbeddedFigure:
    """Turn a figure into an SVG element.

    Args:
        figure: The figure.
        name: A name that no other figure of the page has: ids in the element begin with it.
        described: What the figure shows, for readers who cannot see it.

    Returns:
        The element and its panels.
    """
    import matplotlib

    for index, ax in enumerate(figure.axes):
        ax.set_gid(f"panel-{index}")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        tree = ElementTree.fromstring(rendered(figure, "svg"))
    root = _rebuilt(tree, re.sub(r"\W", "_", name))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.attrib |= {"role": "img", "aria-label": described, "xmlns": SVG.strip("{}")}
    return EmbeddedFigure(ElementTree.tostring(root, encoding="unicode"), _panels(figure))


def _rebuilt(element: ElementTree.Element, prefix: str) -> ElementTree.Element:
    """A copy with the known tags and attributes alone; ids that say what a part is become classes."""
    copy = ElementTree.Element(element.tag.removeprefix(SVG))
    copy.text, copy.tail = element.text, element.tail  # what is read keeps its digits
    if copy.tag not in ("text", "tspan"):
        copy.text = copy.text and copy.text.strip() and copy.text
    for key, value in element.attrib.items():
        if key == "id":
            copy.attrib |= _identity(value, prefix)
        elif key == f"{XLINK}href" and value.startswith("#"):
            copy.attrib["href"] = f"#{prefix}-{value[1:]}"
        elif key == f"{XLINK}href" and value.startswith(INLINE_IMAGE):
            copy.attrib["href"] = value
        elif key == "d":
            copy.attrib[key] = _path(value)
        elif key in ATTRIBUTES:
            copy.attrib[key] = _short(value.replace("url(#", f"url(#{prefix}-"))
    for child in element:
        if child.tag.removeprefix(SVG) in TAGS:
            rebuilt = _rebuilt(child, prefix)
            rebuilt.tail = None
            copy.append(rebuilt)
    return copy


def _identity(name: str, prefix: str) -> dict[str, str]:
    """The attributes of a part of a figure, from the id that it has in matplotlib's SVG."""
    if part := PART.fullmatch(name):
        return {"class": part[1], "data-series": part[2]}
    if panel := PANEL.fullmatch(name):
        return {"class": "panel", "data-panel": panel[1]}
    if TICK.fullmatch(name):  # the first letter is that of the axis
        return {"class": f"tick {name[0]}-tick"}
    return {"id": f"{prefix}-{name}"}


def _short(text: str) -> str:
    """Text with its numbers rounded to hundredths of a point, which no screen shows."""
    return LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)


def _path(text: str) -> str:
    """The commands of a path, with rounded numbers, without the points that then repeat the one before."""
    kept: list[str] = []
    for command in re.findall(r"[A-Za-z][^A-Za-z]*", _short(text)):
        words = " ".join(command.split())
        if words[0] != "L" or not kept or words[2:] != kept[-1][2:]:
            kept.append(words)
    return "".join(words.replace("L ", "L").replace("M ", "M") for words in kept)


def _panels(figure: Figure) -> list[dict[str, Any]]:
    """Where each panel with readings is, its scales, and what is known along its curves."""
    noted = marks.readings_of(figure)
    width, height = (72 * side for side in figure.get_size_inches())
    panels = []
    for index, ax in enumerate(figure.axes):
        readings = [reading for owner, reading in noted if owner is ax]
        if not readings:
            continue
        box = ax.get_position()
        place = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
        panels.append(
            {
                "panel": index,
                "box": [round(number, 2) for number in place],
                "x": _scale(ax.xaxis, ax.get_xlim()),
                "y": _scale(ax.yaxis, ax.get_ylim()) if _has_numbers(ax) else None,
                "series": [_series(ax, reading) for reading in readings],
            }
        )
    return panels


def _series(ax: Axes, reading: marks.Readings) -> dict[str, Any]:
    """Readings, with their places as parts of the panel's width."""
    from matplotlib.colors import to_hex

    places = ax.transAxes.inverted().transform(
        ax.transData.transform(np.stack([np.asarray(reading.at, dtype=float), np.ones(len(reading.at))], axis=1))
    )[:, 0]
    return {
        "series": reading.series,
        "name": reading.name,
        "colour": to_hex(reading.colour),
        "at": [round(place, 4) for place in places.tolist()],
        "axis": reading.axis,
        "says": list(reading.says),
        "cells": reading.cells,
    }


def _scale(axis: Axis, limits: tuple[float, float]) -> dict[str, Any]:
    """The scale of an axis and its ends, in units that are evenly spaced on it."""
    transform = axis.get_transform()
    ends = [float(end) for end in transform.transform(np.asarray(limits, dtype=float))]
    scale: dict[str, Any] = {"kind": axis.get_scale(), "ends": ends}
    if scale["kind"] == "symlog":
        given: Any = transform
        scale |= {"threshold": float(given.linthresh), "stretch": float(given.linscale / (1 - 1 / given.base))}
    return scale


def _has_numbers(ax: Axes) -> bool:
    """Whether the ticks of the y axis are numbers that follow from its scale, and not names of rows."""
    from matplotlib.ticker import FixedLocator

    return not isinstance(ax.yaxis.get_major_locator(), FixedLocator)
