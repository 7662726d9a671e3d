"""The table of a study: a row for each bit-width and method, as JSON, Markdown, and aligned for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.study.config import REFERENCE
from qat.study.seeds import Row, as_text, in_words
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.files import write_whole
from spectra.runs.jsonlines import encoded
from spectra.runs.record import SpectrumRecord

RUN_KEYS = ("bits", "method", "seed")  # the columns that identify a run of a study
OUTCOMES = ("validation_loss", "perplexity", "steps", "steps_to_baseline_loss")
STAGES = ("start", "end")  # of the training
NOT_REACHED = "not reached"
QUANTITIES_PER_BLOCK = 2  # side by side on a terminal

Curve = Sequence[tuple[int, float]]


def steps_to(loss: float, curve: Curve) -> float | None:
    """The training step at which a validation curve first reaches a loss, by linear interpolation.

    Args:
        loss: The loss to reach.
        curve: Pairs (training step, validation loss), in the order of the steps.

    Returns:
        The step, or None where the curve never is that low.

    Example:
        >>> steps_to(4.5, [(0, 5.0), (10, 4.0)])
        5.0
    """
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def spectrum_columns(records: Sequence[SpectrumRecord]) -> Row:
    """The estimates of a run at its start and end, as `lambda_max_start`, `lambda_max_end`, and so on.

    Args:
        records: The records of the run, in the order of measuring.

    Returns:
        Estimates by column. Columns of the first Hessian mode have these names; those of a further mode have its name
        in front, as in `latent_lambda_max_start`.
    """
    columns: Row = {}
    for index, mode in enumerate(dict.fromkeys(record.mode for record in records)):
        of_mode = [record for record in records if record.mode == mode]
        prefix = f"{mode}_" if index else ""
        for name in of_mode[0].estimates:
            for stage, record in zip(STAGES, (of_mode[0], of_mode[-1]), strict=True):
                columns[f"{prefix}{name}_{stage}"] = record.estimates[name]
    return columns


def with_steps_to_baseline(rows: Sequence[Row], curves: Sequence[Curve]) -> list[Row]:
    """The rows with `steps_to_baseline_loss`: the step at which each curve reaches the last loss of its baseline.

    The baseline's own curve is read by the same rule: it may have reached that loss before its last step.

    Args:
        rows: The rows of a study.
        curves: The validation curve of each row's run.

    Returns:
        New rows. The value is None where the loss is never reached, or no baseline was trained at that bit-width and
        with that seed. The reference has none.
    """
    finals = {_key(row): row["validation_loss"] for row in rows if row["method"] == "baseline"}
    return [
        row if row["method"] == REFERENCE else row | {"steps_to_baseline_loss": _steps_to(finals.get(_key(row)), curve)}
        for row, curve in zip(rows, curves, strict=True)
    ]


def _key(row: Row) -> tuple[float, Any]:
    """What a run has in common with its baseline."""
    return row["bits"], row.get("seed")


def _steps_to(loss: float | None, curve: Curve) -> float | None:
    return None if loss is None else steps_to(loss, curve)


def for_report(rows: Sequence[Row], spread: Sequence[Row] = ()) -> list[Row]:
    """The rows as the report shows them: steps as text, `not reached` where a loss was not.

    Args:
        rows: The rows of a study.
        spread: What several seeds say together, from `spread_rows`; these rows stand first.

    Returns:
        The rows.
    """
    single = [_in_order(row | {"steps_to_baseline_loss": _cell(row, "steps_to_baseline_loss")}) for row in rows]
    return [*as_text(spread), *single]


def write_table(rows: Sequence[Row], folder: Path, *, heading: str = "", spread: Sequence[Row] = ()) -> None:
    """Write table.json and table.md. JSON has no NaN and no infinity: such a number is null there.

    Args:
        rows: The rows of a study.
        folder: The folder to write to.
        heading: What table.md says above the table.
        spread: What several seeds say together, for table.md.
    """
    write_whole(folder / "table.json", encoded([_in_order(row) for row in rows], indent=2) + b"\n")
    write_whole(folder / "table.md", markdown(rows, heading=heading, spread=spread).encode(errors="replace"))


def markdown(rows: Sequence[Row], *, heading: str = "", spread: Sequence[Row] = ()) -> str:
    """One Markdown table with every column. Estimates have their 95 % interval, and `?` where they are unresolved."""
    keys = _keys(rows)
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(_cell(row, key) for key in keys) + " |" for row in rows]
    notes = [heading, *lines, "", "Intervals are 95 %; ? marks an estimate that the measurement cannot resolve."]
    if spread:
        notes += ["", "Over seeds:", "", *(f"* {line}" for line in in_words(spread))]
    return "\n".join(notes if heading else notes[1:]).replace("\n|", "\n\n|", 1 if heading else 0) + "\n"


def terminal(rows: Sequence[Row]) -> str:
    """The table in blocks narrow enough for a terminal: first the outcomes, then two quantities at a time."""
    keys = _keys(rows)
    spectral = [key for key in keys if any(isinstance(row.get(key), Estimate) for row in rows)]
    names = list(dict.fromkeys(key.rpartition("_")[0] for key in spectral))
    blocks = [_aligned(rows, [key for key in OUTCOMES if key in keys])]
    for first in range(0, len(names), QUANTITIES_PER_BLOCK):
        chosen = [f"{name}_{stage}" for name in names[first : first + QUANTITIES_PER_BLOCK] for stage in STAGES]
        blocks.append(_aligned(rows, [key for key in chosen if key in spectral]))
    return "\n\n".join(blocks)


def _aligned(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Columns of the table as lines of text, with the columns aligned."""
    keys = [key for key in (*RUN_KEYS, *keys) if key != "seed" or any("seed" in row for row in rows)]
    cells = [[key.replace("_", " ") for key in keys], *([_cell(row, key) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _in_order(row: Row) -> Row:
    """The row with the columns that name the run first, then the outcomes."""
    first = ("label", *RUN_KEYS, *OUTCOMES)
    return {key: row[key] for key in (*first, *(key for key in row if key not in first)) if key in row}


def _keys(rows: Sequence[Row]) -> list[str]:
    """All columns but the label, which repeats bits and method; the estimates in the order of `ESTIMATES`."""
    keys = list(dict.fromkeys(key for row in rows for key in _in_order(row) if key != "label"))
    rank = {f"{name}_{stage}": index for index, name in enumerate(ESTIMATES) for stage in STAGES}
    plain = [key for key in keys if key not in rank and not key.endswith(STAGES)]
    first = [key for key in (*RUN_KEYS, *OUTCOMES) if key in plain]  # the row of the reference has not all of them
    spectral = sorted((key for key in keys if key not in plain), key=lambda key: rank.get(key, len(rank)))
    return [*first, *(key for key in plain if key not in first), *spectral]


def _cell(row: Row, key: str) -> str:
    """A cell as text; an estimate with its interval, and `?` where it is unresolved."""
    value = row.get(key)
    if value is None:
        return NOT_REACHED if key == "steps_to_baseline_loss" and row.get("method") != REFERENCE else "-"
    if isinstance(value, Estimate):
        number, low, high = value.rounded()
        return f"{number}{'' if value.resolved else '?'} [{low}, {high}]"
    if key == "steps_to_baseline_loss":
        return f"{value:.0f}"
    if key == "perplexity":
        return f"{value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) and key != "bits" else str(value)
