"""The records of a run as flat rows: what `Run.to_pandas` returns, and what a notebook shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectra.backend import markup
from spectra.backend.extras import need
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.record import SpectrumRecord

if TYPE_CHECKING:
    from pandas import DataFrame

    from spectra.runs.folder import Run

FIRST = ("step", "mode", "block", "label", "status", "reason")
NUMBERS = (
    *("loss", "gradient_norm", "dimension", "near_zero_tol", "probes", "lanczos_steps"),
    *("seed", "products", "seconds"),
)
LAST = ("wall_time", "reorthogonalize", "dtype", "device", "engine")
MOST_SHOWN = 20  # records of a run in a notebook
SHOWN = ("negative_share", "lambda_max", "rms")


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each estimate as four: q is its value, q_low and q_high its interval, q_resolved whether it is.

    Args:
        values: Plain values and estimates by name.

    Returns:
        Plain values by name.

    Example:
        >>> flattened({"bits": 2, "rms": Estimate(2.0, 1.5, 2.5)})
        {'bits': 2, 'rms': 2.0, 'rms_low': 1.5, 'rms_high': 2.5, 'rms_resolved': True}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Estimate):
            ends = {f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_resolved": value.resolved}
            flat |= {name: value.value, **ends}
        else:
            flat[name] = value
    return flat


def row_of(record: SpectrumRecord) -> dict[str, Any]:
    """A record as one flat row, see `Run.to_pandas`.

    Args:
        record: The record.

    Returns:
        Plain values by column.
    """
    taken = {name: getattr(record, name) for name in FIRST}
    estimates = {name: record.estimates[name] for name in ESTIMATES if name in record.estimates}
    taken |= flattened(estimates | record.estimates)
    taken |= {name: getattr(record, name) for name in (*NUMBERS, *LAST)}
    numbers = {"checks": record.checks, "extras": record.extras}
    return taken | {f"{kind}.{name}": value for kind, found in numbers.items() for name, value in found.items()}


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All records of a run as flat rows; of a study those of all its runs, with the name of the folder as "run".

    Args:
        run: The run or the study.

    Returns:
        The rows in the order of measuring, run by run.
    """
    if not run.runs:
        return [row_of(record) for record in run.records]
    return [{"run": single.folder.name} | row_of(record) for single in run.runs for record in single.records]


def frame(run: Run) -> DataFrame:
    """The rows as a pandas frame.

    Args:
        run: The run or the study.

    Returns:
        The frame.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    need("pandas")
    from pandas import DataFrame

    rows = rows_of(run)
    columns = dict.fromkeys(name for row in rows for name in row) or dict.fromkeys(FIRST)
    first = [name for name in ("run", *FIRST) if name in columns]
    made = DataFrame(rows, columns=[*first, *(name for name in columns if name not in first)])
    answers = [name for name in columns if name.endswith("_resolved")]
    return made.assign(**{name: made[name].eq(True) for name in answers})  # nothing is resolved where nothing is there


def shown(run: Run) -> str:
    """The HTML of a run in a notebook.

    Args:
        run: The run or the study.

    Returns:
        A table of the last records, or of the runs of a study.
    """
    if run.runs:
        rows = [(single.folder.name, *_counted(single.records)) for single in run.runs]
        return markup.table(("run", "records", "failed", "last step"), rows, heading=f"Study {run.folder}")
    records = run.records
    columns = ("step", "mode", "block", "label", "loss", *(name.replace("_", " ") for name in SHOWN), "")
    notes = [f"the last {MOST_SHOWN} of {len(records):,} records"] if len(records) > MOST_SHOWN else []
    rows = [_cells(record) for record in records[-MOST_SHOWN:]]
    return markup.table(columns, rows, heading=f"Run {run.folder}", notes=notes)


def _counted(records: Sequence[SpectrumRecord]) -> tuple[str, str, str]:
    """How many records, how many failed ones, and the last training step."""
    failed = sum(not record.is_measured for record in records)
    return f"{len(records):,}", f"{failed:,}", str(records[-1].step) if records else ""


def _cells(record: SpectrumRecord) -> list[str]:
    """A record as texts."""
    estimates = [record.estimates.get(name) for name in SHOWN]
    note = "" if record.is_measured else f"failed: {record.reason}"
    cells = [str(record.step), record.mode, record.block, record.label, f"{record.loss:.4g}"]
    return [*cells, *("" if estimate is None else str(estimate) for estimate in estimates), note]
