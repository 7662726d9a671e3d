"""The tables of a report, as text in cells: outcomes as they come, estimates with quantities down and runs across."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES, describe
from spectra.runs.folder import Run
from spectra.views.style import METHOD_NAMES

MOMENTS = ("start", "end")
MOST_RECORDS = 12
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """A value as text, its interval, and why it is unresolved if it is. words: not a number."""

    text: str
    interval: str = ""
    unresolved: bool = False
    reason: str = ""
    words: bool = False


@dataclass(frozen=True)
class Row:
    """A heading, which of its moments this is ("start", "end" or ""), and a cell a column."""

    heading: str
    detail: str
    moment: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Column headings and rows."""

    columns: list[str]
    rows: list[Row]

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """Why cells are unresolved: for each kind of reason, whatever its figures, how many cells and one example."""
        kinds: dict[str, list[str]] = {}
        for cell in (cell for row in self.rows for cell in row.cells if cell.unresolved):
            kinds.setdefault(re.sub(r"[\d.]+", "#", cell.reason), []).append(cell.reason)
        return [(len(reasons), reasons[0]) for reasons in kinds.values()]


def outcomes(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The plain columns of a study's table, a row each; estimates are left to `estimates_of_rows`."""
    keys = [key for key in _keys(rows) if not any(_is_estimate(row.get(key)) for row in rows)]
    columns = [_sentence(describe(key).name) for key in keys]
    return Table(columns, [Row("", "", "", [_cell(row.get(key), key) for key in keys]) for row in rows])


def estimates_of_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The estimates of a study's table, at the start and the end of each run: quantities down, rows across."""
    keys = [key for key in _keys(rows) if any(_is_estimate(row.get(key)) for row in rows)]
    modes = {row.get("mode") for row in rows}
    table = []
    for key in sorted(keys, key=_rank):
        mode, quantity, moment = _split(key)
        table.append(_row(quantity, moment, [_cell(row.get(key)) for row in rows], mode=mode))
    names = [_row_name(row, position, with_mode=len(modes) > 1) for position, row in enumerate(rows)]
    return Table(names, table)


def estimates_of_run(run: Run) -> Table:
    """The estimates of a run's records: quantities down, records across, evenly thinned where they are many."""
    records = run.records
    if len(records) > MOST_RECORDS:
        last = len(records) - 1
        records = [records[round(index * last / (MOST_RECORDS - 1))] for index in range(MOST_RECORDS)]
    several_modes = len({record.mode for record in run.records}) > 1
    columns = []
    for record in records:
        notes = [record.label.replace("-", " "), record.mode if several_modes else ""]
        columns.append(f"step {record.step}" + "".join(f", {note}" for note in notes if note))
    keys = sorted(dict.fromkeys(key for record in records for key in record.estimates), key=_rank)
    rows = [_row("loss", "", [_cell(record.loss) for record in records])]
    rows.append(_row("gradient_norm", "", [_cell(record.gradient_norm) for record in records]))
    rows += [_row(key, "", [_cell(record.estimates.get(key)) for record in records]) for key in keys]
    return Table(columns, rows)


def number(value: float) -> str:
    """Four digits, so that columns line up, with an exponent only where it saves zeros; whole numbers whole."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "−∞" if value == -math.inf else "not finite"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    mantissa, _, exponent = f"{value:#.4g}".partition("e")
    mantissa = mantissa.removesuffix(".")
    if exponent:
        mantissa += "·10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return mantissa.replace("-", "−")


def _row(quantity: str, moment: str, cells: list[Cell], *, mode: str = "") -> Row:
    about = describe(quantity)
    heading = _sentence(about.name) + (f", mode {mode}" if mode else "")
    return Row(heading, about.unit or about.meaning, moment, cells)


def _cell(value: Any, key: str = "") -> Cell:
    if value is None:
        return Cell("–")
    if isinstance(value, Estimate) or _is_estimate(value):
        estimate = value if isinstance(value, Estimate) else Estimate.from_dict(value)
        interval = "" if estimate.low == estimate.high else f"[{number(estimate.low)}, {number(estimate.high)}]"
        return Cell(number(estimate.value), interval, not estimate.resolved, estimate.reason)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", words=True)
    if isinstance(value, int | float):
        return Cell(number(value))
    words = str(value)
    return Cell(METHOD_NAMES.get(words, words) if key == "method" else words, words=True)


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Estimate) or (isinstance(value, Mapping) and {"value", "low", "high"} <= set(value))


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _split(key: str) -> tuple[str, str, str]:
    """Mode, quantity and moment: ("", "rms", "start") of "rms_start", ("latent", "rms", "end") of "latent_rms_end"."""
    name, _, moment = key.rpartition("_")
    if moment not in MOMENTS:
        name, moment = key, ""
    for quantity in sorted(ESTIMATES, key=len, reverse=True):
        if name.endswith(f"_{quantity}"):
            return name.removesuffix(f"_{quantity}"), quantity, moment
        if name == quantity:
            break
    return "", name, moment


def _rank(key: str) -> tuple[str, int]:
    mode, quantity, _ = _split(key)
    return mode, ESTIMATES.index(quantity) if quantity in ESTIMATES else len(ESTIMATES)


def _row_name(row: Mapping[str, Any], position: int, *, with_mode: bool) -> str:
    bits, method = row.get("bits"), row.get("method")
    name = f"{bits:g}-bit {METHOD_NAMES.get(method, method)}" if isinstance(bits, int | float) and method else ""
    parts = [name, str(row.get("mode", "")) if with_mode else ""]
    return ", ".join(part for part in parts if part) or f"row {position + 1}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
