"""How a run is shown: its name, its group, its colour, and what its modes, quantities and labels mean in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spectra.estimates import quantities
from spectra.estimates.quantities import Quantity

LINE_NAMES = ("solid", "dashed", "dashdot", "dotted", "-", "--", "-.", ":")
HEX_COLOR = re.compile(r"#([0-9a-fA-F]{3,4}|[0-9a-fA-F]{6}|[0-9a-fA-F]{8})")

Line = str | tuple[float, tuple[float, ...]]


class HasConfig(Protocol):
    """A run as far as it matters here: a folder, and the contents of its config.json."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """The settings the run was made with."""
        ...


@dataclass(frozen=True)
class Presentation:
    """What whoever made a run says of how it is shown, read from the key "presentation" of its config.json.

    Nothing in it is required. An entry that is missing or malformed takes its default.

    Attributes:
        label: How the run is called in legends and tables. Default: the name of its folder.
        group: Runs of one group are drawn side by side. Default: the name of its folder.
        color: A matplotlib color such as "#0072B2". Default: None, the view chooses.
        line: A matplotlib line style: a name such as "dashed", or (offset, (on, off, ...)) in points; in the file
            [offset, [on, off, ...]] or [on, off, ...]. Default: None, the view chooses.
        reference: Whether the run is a level that the others are compared with.
        modes: What each Hessian mode means, {mode: meaning}.
        quantities: The run's own quantities; in the file {key: {"name": ..., "unit": ..., "meaning": ...}}.
        labels: Words for the labels of records, {label: words}.
    """

    label: str
    group: str
    color: str | None = None
    line: Line | None = None
    reference: bool = False
    modes: Mapping[str, str] = field(default_factory=dict)
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: HasConfig) -> Presentation:
        """Read the presentation of a run.

        Args:
            run: A `spectra.Run`, or anything with its `folder` and `config`.

        Returns:
            The presentation, with defaults for what config.json does not say.
        """
        entries = run.config.get("presentation")
        entries = entries if isinstance(entries, dict) else {}
        name = run.folder.resolve().name
        return cls(
            label=_text(entries.get("label")) or name,
            group=_text(entries.get("group")) or name,
            color=_color(entries.get("color")),
            line=_line(entries.get("line")),
            reference=entries.get("reference") is True,
            modes=_texts(entries.get("modes")),
            quantities=_quantities(entries.get("quantities")),
            labels=_texts(entries.get("labels")),
        )

    def describe(self, key: str) -> Quantity:
        """Name, unit and meaning of a quantity.

        Args:
            key: The quantity's key in records or telemetry, such as "rms".

        Returns:
            What this run says of it, else what `spectra` knows, else the key in words.
        """
        return self.quantities.get(key) or quantities.describe(key)


def _text(value: Any) -> str:
    """A string without the white space around it; "" for anything else."""
    return value.strip() if isinstance(value, str) else ""


def _texts(value: Any) -> dict[str, str]:
    """The entries of an object whose values are strings that say something."""
    entries = value.items() if isinstance(value, dict) else ()
    return {key: _text(words) for key, words in entries if _text(words)}


def _quantities(value: Any) -> dict[str, Quantity]:
    """The entries of an object that name a quantity."""
    entries = value.items() if isinstance(value, dict) else ()
    texts = {key: _texts(fields) for key, fields in entries}
    return {
        key: Quantity(name=fields["name"], unit=fields.get("unit", ""), meaning=fields.get("meaning", ""))
        for key, fields in texts.items()
        if "name" in fields
    }


def _color(value: Any) -> str | None:
    """The value if matplotlib knows it as a color, else None."""
    if not isinstance(value, str):
        return None
    if HEX_COLOR.fullmatch(value):
        return value
    try:
        from matplotlib.colors import (
            is_color_like,  # only for colors given by name; without matplotlib nothing is drawn
        )
    except ImportError:
        return None
    return value if is_color_like(value) else None


def _line(value: Any) -> Line | None:
    """The value as a matplotlib line style, else None."""
    if isinstance(value, str):
        return value if value in LINE_NAMES else None
    if not isinstance(value, list | tuple) or not value:
        return None
    offset, dashes = (value[0], value[1]) if len(value) == 2 and isinstance(value[1], list | tuple) else (0, value)
    if not dashes or not all(_is_length(length) for length in (offset, *dashes)) or not any(dashes):
        return None
    return offset, tuple(dashes)


def _is_length(value: Any) -> bool:
    """Whether the value is a finite number, 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
