"""The tables of a report, as cells of text: a row for each run, or for each record of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectra.estimates import quantities
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord
from spectra.views.wording import number, record_words, sentence_case, typeset

STAGES = ("start", "end")  # of the training; a key of a study's table ends with one of them
MAX_RECORDS = 40  # most rows of a run's table
LEFT_OUT = ("frobenius",)  # the Frobenius norm is rms times a constant

Describe = Callable[[str], quantities.Quantity]


@dataclass(frozen=True)
class Cell:
    """A value as text.

    Attributes:
        text: The value.
        interval: Its 95 % interval, "" where there is none.
        unresolved: Whether it is an unresolved estimate.
        reason: Why it is unresolved.
        words: Whether the value is text, not a number.
        order: The number by which a column is sorted; None for text, and where there is no value.
    """

    text: str
    interval: str = ""
    unresolved: bool = False
    reason: str = ""
    words: bool = False
    order: float | None = None


@dataclass(frozen=True)
class Column:
    """The heading of a column: a name, and its unit or meaning."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is about, and a cell for each further column."""

    heading: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Headings, of which the first is that of the rows' own headings, and rows."""

    columns: list[Column]
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
        rows: The rows of the study. The value under "label" is the name of a row.
        describe: Gives the name of a column from its key.

    Returns:
        The table.
    """
    keys = [key for key in _keys(rows) if key != "label" and not any(_is_estimate(row.get(key)) for row in rows)]
    columns = [Column("Run"), *(Column(sentence_case(describe(key).name)) for key in keys)]
    cells = [[_cell(_counted(key, row.get(key))) for key in keys] for row in rows]
    return Table(columns, [Row(_row_name(row, at), cells[at]) for at, row in enumerate(rows)])


def estimates_of_rows(rows: Sequence[Mapping[str, Any]], *, describe: Describe = quantities.describe) -> Table:
    """The estimates of a study's table: a row for each run, Hessian mode and stage of the training.

    Args:
        rows: The rows of the study. The value under "label" is the name of a row, that under "mode" its first mode.
        describe: Gives name and unit of a quantity from its key.

    Returns:
        The table, with a column for each quantity.
    """
    keys = [_split(key) for key in _keys(rows) if any(_is_estimate(row.get(key)) for row in rows)]
    found = sorted({quantity for _, quantity, _ in keys if quantity not in LEFT_OUT}, key=_rank)
    modes = sorted({mode for mode, _, _ in keys})
    stages = [stage for stage in (*STAGES, "") if any(key[2] == stage for key in keys)]
    several_modes = len(modes) > 1 or len({row.get("mode") for row in rows}) > 1
    table = []
    for position, row in enumerate(rows):
        for mode in modes:
            for stage in stages:
                values = [row.get(_joined(mode, quantity, stage)) for quantity in found]
                if all(value is None for value in values):
                    continue
                notes = [mode or row.get("mode") if several_modes else "", stage]
                heading = ", ".join([_row_name(row, position), *(str(note) for note in notes if note)])
                table.append(Row(heading, [_cell(value) for value in values]))
    return Table([Column("Run"), *(_column(describe, quantity) for quantity in found)], table)


def estimates_of_runs(runs: Sequence[Run], *, describe: Describe = quantities.describe) -> Table:
    """The estimates of the records of runs, a row each; the records of a run are evenly thinned where they are many.

    Diagonal blocks are left to the heat maps where the whole was measured too.

    Args:
        runs: Runs with a record.
        describe: Gives name and unit of a quantity from its key.

    Returns:
        The table, with a column for each quantity.
    """
    chosen = [(run, record) for run in runs for record in _thinned(_whole(run))]
    several_modes = len({record.mode for _, record in chosen}) > 1
    found = sorted({key for _, record in chosen for key in record.estimates if key not in LEFT_OUT}, key=_rank)
    table = []
    for run, record in chosen:
        name = run.presentation.label if len(runs) > 1 else ""
        notes = [name, f"step {record.step}", record_words(run, record), record.mode if several_modes else ""]
        numbers = [_cell(record.loss), _cell(record.gradient_norm)]
        cells = numbers + [_cell(record.estimates.get(key)) for key in found]
        table.append(Row(", ".join(filter(None, notes)), cells))
    columns = [_column(describe, key) for key in ("loss", "gradient_norm", *found)]
    return Table([Column("Run" if len(runs) > 1 else "Training step"), *columns], table)


def _whole(run: Run) -> list[SpectrumRecord]:
    """The records of the whole Hessian; those of its blocks where there are no others."""
    return [record for record in run.measured if not record.block] or run.measured


def _thinned(records: Sequence[SpectrumRecord]) -> list[SpectrumRecord]:
    """At most `MAX_RECORDS` of the records, evenly spaced, with the first and the last."""
    last = len(records) - 1
    if last < MAX_RECORDS:
        return list(records)
    return [records[round(index * last / (MAX_RECORDS - 1))] for index in range(MAX_RECORDS)]


def _column(describe: Describe, key: str) -> Column:
    """The heading of a quantity: its name, and its unit or else its meaning."""
    about = describe(key)
    return Column(sentence_case(about.name), about.unit or about.meaning)


def _counted(key: str, value: Any) -> Any:
    """The value of a column; training steps are whole, also where they were interpolated between evaluations."""
    steps = key.partition("_")[0] == "steps" and isinstance(value, float) and math.isfinite(value)
    return round(value) if steps else value


def _cell(value: Any) -> Cell:
    """A plain value or an estimate, as an object or as its dict, in text."""
    if value is None:
        return Cell("–")
    if isinstance(value, Estimate) or _is_estimate(value):
        estimate = value if isinstance(value, Estimate) else Estimate.from_dict(value)
        given = {"unresolved": not estimate.resolved, "reason": estimate.reason, "order": _order(estimate.value)}
        if not estimate.high > estimate.low:
            return Cell(number(estimate.value), **given)
        value, low, high = map(typeset, estimate.rounded())
        return Cell(value, f"[{low}, {high}]", **given)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", words=True)
    if isinstance(value, int | float):
        return Cell(number(value), order=_order(value))
    return Cell(str(value), words=True)


def _order(value: float) -> float | None:
    """The number by which a cell is sorted."""
    return float(value) if math.isfinite(value) else None


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


def _joined(mode: str, quantity: str, stage: str) -> str:
    """The key of a mode, a quantity and a stage."""
    return "_".join(filter(None, (mode, quantity, stage)))


def _rank(quantity: str) -> tuple[int, str]:
    """The sort key of a column: the position of its quantity in `ESTIMATES`."""
    return (ESTIMATES.index(quantity) if quantity in ESTIMATES else len(ESTIMATES)), quantity


def _row_name(row: Mapping[str, Any], position: int) -> str:
    """The name of a row: its label, else its number."""
    value = row.get("label")
    return f"row {position + 1}" if value is None or value == "" else str(value)
