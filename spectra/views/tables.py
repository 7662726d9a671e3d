"""The tables of a report, as cells of text: results with a row for each run, estimates with a row for each quantity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectra.estimates import quantities
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES, Quantity
from spectra.runs.folder import Run
from spectra.views.wording import record_words, sentence_case

STAGES = ("start", "end")  # of the training; a key of a study's table ends with one of them
MAX_RECORDS = 12  # most columns of a run's table
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Describe = Callable[[str], Quantity]


@dataclass(frozen=True)
class Cell:
    """A value as text.

    Attributes:
        text: The value.
        interval: Its 95 % interval, "" where there is none.
        unresolved: Whether it is an unresolved estimate.
        reason: Why it is unresolved.
        words: Whether the value is text, not a number.
    """

    text: str
    interval: str = ""
    unresolved: bool = False
    reason: str = ""
    words: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        heading: What the row is about.
        detail: Its unit or meaning.
        stage: "start" or "end" of the training, or "".
        cells: A cell for each column.
    """

    heading: str
    detail: str
    stage: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Column headings and rows."""

    columns: list[str]
    rows: list[Row]

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """Why cells are unresolved: how many cells, and an example, for all reasons that differ in numbers only."""
        kinds: dict[str, list[str]] = {}
        for cell in (cell for row in self.rows for cell in row.cells if cell.unresolved):
            kinds.setdefault(re.sub(r"[\d.]+", "#", cell.reason), []).append(cell.reason)
        return [(len(reasons), reasons[0]) for reasons in kinds.values()]


def results(rows: Sequence[Mapping[str, Any]], *, describe: Describe = quantities.describe) -> Table:
    """The plain columns of a study's table, a row each; estimates are left to `estimates_of_rows`.

    Args:
        rows: The rows of the study. The value under "label" is the name of a row, and the first column.
        describe: Gives the name of a column from its key.

    Returns:
        The table; its rows have no heading.
    """
    keys = [key for key in _keys(rows) if key != "label" and not any(_is_estimate(row.get(key)) for row in rows)]
    columns = [sentence_case(describe(key).name) for key in keys]
    table = [[_cell(row.get(key)) for key in keys] for row in rows]
    if any(_label(row) for row in rows):
        columns.insert(0, "Run")
        for position, (row, cells) in enumerate(zip(rows, table, strict=True)):
            cells.insert(0, Cell(_row_name(row, position), words=True))
    return Table(columns, [Row("", "", "", cells) for cells in table])


def estimates_of_rows(rows: Sequence[Mapping[str, Any]], *, describe: Describe = quantities.describe) -> Table:
    """The estimates of a study's table, at the start and the end of each run: quantities down, rows across.

    Args:
        rows: The rows of the study. The value under "label" is the name of a row.
        describe: Gives name and unit of a quantity from its key.

    Returns:
        The table, with a column for each of the rows.
    """
    keys = [key for key in _keys(rows) if any(_is_estimate(row.get(key)) for row in rows)]
    several_modes = len({row.get("mode") for row in rows}) > 1
    table = []
    for key in sorted(keys, key=_rank):
        mode, quantity, stage = _split(key)
        table.append(_row(describe(quantity), [_cell(row.get(key)) for row in rows], stage=stage, mode=mode))
    names = [_row_name(row, position, with_mode=several_modes) for position, row in enumerate(rows)]
    return Table(names, table)


def estimates_of_run(run: Run) -> Table:
    """The estimates of a run's records: quantities down, records across, evenly thinned where they are many.

    Args:
        run: A run with a record.

    Returns:
        The table, with a column for each record.
    """
    records, describe = run.measured, run.presentation.describe
    several_modes = len({record.mode for record in records}) > 1
    if len(records) > MAX_RECORDS:
        last = len(records) - 1
        records = [records[round(index * last / (MAX_RECORDS - 1))] for index in range(MAX_RECORDS)]
    columns = []
    for record in records:
        notes = [record_words(run, record), record.mode if several_modes else ""]
        columns.append(f"step {record.step}" + "".join(f", {note}" for note in notes if note))
    keys = sorted(dict.fromkeys(key for record in records for key in record.estimates), key=_rank)
    rows = [_row(describe("loss"), [_cell(record.loss) for record in records])]
    rows.append(_row(describe("gradient_norm"), [_cell(record.gradient_norm) for record in records]))
    rows += [_row(describe(key), [_cell(record.estimates.get(key)) for record in records]) for key in keys]
    return Table(columns, rows)


def number(value: float) -> str:
    """A number as text: four digits, an exponent for very large and small numbers, and whole numbers in full."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return _typeset(str(int(value)))
    return _typeset(f"{value:#.4g}")


def _typeset(text: str) -> str:
    """A number as Python writes it, with the signs of print: 1,234, −2.5·10⁻⁷, ∞."""
    if text == "nan":
        return "not finite"
    mantissa, _, exponent = text.replace("inf", "∞").partition("e")
    mantissa = mantissa.removesuffix(".")
    if exponent:
        mantissa += "·10" + str(int(exponent)).translate(SUPERSCRIPTS)
    elif mantissa.lstrip("-").isdigit():
        mantissa = f"{int(mantissa):,}"
    return mantissa.replace("-", "−")


def _row(about: Quantity, cells: list[Cell], *, stage: str = "", mode: str = "") -> Row:
    """A row about a quantity."""
    heading = sentence_case(about.name) + (f", mode {mode}" if mode else "")
    return Row(heading, about.unit or about.meaning, stage, cells)


def _cell(value: Any) -> Cell:
    """A plain value or an estimate, as an object or as its dict, in text."""
    if value is None:
        return Cell("–")
    if isinstance(value, Estimate) or _is_estimate(value):
        estimate = value if isinstance(value, Estimate) else Estimate.from_dict(value)
        if not estimate.high > estimate.low:
            return Cell(number(estimate.value), "", not estimate.resolved, estimate.reason)
        value, low, high = map(_typeset, estimate.rounded())
        return Cell(value, f"[{low}, {high}]", not estimate.resolved, estimate.reason)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", words=True)
    if isinstance(value, int | float):
        return Cell(number(value))
    return Cell(str(value), words=True)


def _is_estimate(value: Any) -> bool:
    """Whether the value is an estimate, as an object or as its dict."""
    return isinstance(value, Estimate) or (isinstance(value, Mapping) and {"value", "low", "high"} <= set(value))


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in the order of their first row."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _split(key: str) -> tuple[str, str, str]:
    """Mode, quantity and stage: ("", "rms", "start") of "rms_start", ("latent", "rms", "end") of "latent_rms_end"."""
    name, _, stage = key.rpartition("_")
    if stage not in STAGES:
        name, stage = key, ""
    for quantity in sorted(ESTIMATES, key=len, reverse=True):
        if name.endswith(f"_{quantity}"):
            return name.removesuffix(f"_{quantity}"), quantity, stage
        if name == quantity:
            break
    return "", name, stage


def _rank(key: str) -> tuple[str, int]:
    """The sort key of a column: its mode, then the position of its quantity in `ESTIMATES`."""
    mode, quantity, _ = _split(key)
    return mode, ESTIMATES.index(quantity) if quantity in ESTIMATES else len(ESTIMATES)


def _label(row: Mapping[str, Any]) -> str:
    """The label of a row, "" where it has none."""
    value = row.get("label")
    return "" if value is None else str(value)


def _row_name(row: Mapping[str, Any], position: int, *, with_mode: bool = False) -> str:
    """The name of a row: its label, else its number."""
    name = _label(row) or f"row {position + 1}"
    return f"{name}, {row['mode']}" if with_mode and row.get("mode") else name
