"""The table of a study: a row for each bit-width and method, as JSON, Markdown, and aligned for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.jsonlines import plain
from spectra.runs.record import SpectrumRecord

OUTCOMES = ("validation_loss", "perplexity", "steps", "steps_to_baseline_loss")
MOMENTS = ("start", "end")
NOT_REACHED = "not reached"
PER_BLOCK = 2  # quantities side by side on a terminal

Row = dict[str, Any]
Curve = Sequence[tuple[int, float]]


def steps_to(loss: float, curve: Curve) -> float | None:
    """The first step at which a curve of (step, loss) is down to `loss`, on straight lines between its points.

    None when it never is.
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

    The first Hessian mode has these names; a further one its own in front, as in `latent_lambda_max_start`.
    """
    columns: Row = {}
    for index, mode in enumerate(dict.fromkeys(record.mode for record in records)):
        of_mode = [record for record in records if record.mode == mode]
        prefix = f"{mode}_" if index else ""
        for name in of_mode[0].estimates:
            for moment, record in zip(MOMENTS, (of_mode[0], of_mode[-1]), strict=True):
                columns[f"{prefix}{name}_{moment}"] = record.estimates[name]
    return columns


def with_steps_to_baseline(rows: Sequence[Row], curves: Sequence[Curve]) -> list[Row]:
    """The rows with `steps_to_baseline_loss`: when each curve is first down to the last loss of its baseline.

    The baseline is measured by the same rule, so that a curve that ends above its lowest point is not favoured.
    None when the loss is never reached, or no baseline was trained at that bit-width.
    """
    finals = {row["bits"]: row["validation_loss"] for row in rows if row["method"] == "baseline"}
    return [
        row | {"steps_to_baseline_loss": steps_to(finals[row["bits"]], curve) if row["bits"] in finals else None}
        for row, curve in zip(rows, curves, strict=True)
    ]


def for_report(rows: Sequence[Row]) -> list[Row]:
    """The rows in the words of a reader: `not reached` where a loss was not."""
    return [_in_order(row) | {"steps_to_baseline_loss": _cell(row, "steps_to_baseline_loss")} for row in rows]


def write_table(rows: Sequence[Row], folder: Path, *, heading: str = "") -> None:
    """table.json and table.md in the folder. A number that is not finite is null in the first."""
    text = json.dumps([plain(_in_order(row)) for row in rows], indent=2, allow_nan=False)
    (folder / "table.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(rows, heading=heading), encoding="utf-8")


def markdown(rows: Sequence[Row], *, heading: str = "") -> str:
    """One Markdown table with every column; estimates with their 95 % interval, `?` marks the unresolved."""
    keys = _keys(rows)
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(_cell(row, key) for key in keys) + " |" for row in rows]
    notes = [heading, *lines, "", "Intervals are 95 %; ? marks an estimate that the measurement cannot resolve."]
    return "\n".join(notes if heading else notes[1:]).replace("\n|", "\n\n|", 1 if heading else 0) + "\n"


def terminal(rows: Sequence[Row]) -> str:
    """The same in blocks narrow enough for a terminal: the outcomes, then the quantities, a row each time."""
    keys = _keys(rows)
    spectral = [key for key in keys if any(isinstance(row.get(key), Estimate) for row in rows)]
    names = list(dict.fromkeys(key.rpartition("_")[0] for key in spectral))
    blocks = [_aligned(rows, [key for key in OUTCOMES if key in keys])]
    for first in range(0, len(names), PER_BLOCK):
        chosen = [f"{name}_{moment}" for name in names[first : first + PER_BLOCK] for moment in MOMENTS]
        blocks.append(_aligned(rows, [key for key in chosen if key in spectral]))
    return "\n\n".join(blocks)


def _aligned(rows: Sequence[Row], keys: Sequence[str]) -> str:
    keys = ["bits", "method", *keys]
    cells = [[key.replace("_", " ") for key in keys], *([_cell(row, key) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _in_order(row: Row) -> Row:
    outcomes = ("bits", "method", *OUTCOMES)
    return {key: row[key] for key in (*outcomes, *(key for key in row if key not in outcomes)) if key in row}


def _keys(rows: Sequence[Row]) -> list[str]:
    """All columns, the spectral quantities in the order they are always named in."""
    keys = list(dict.fromkeys(key for row in rows for key in _in_order(row)))
    rank = {f"{name}_{moment}": index for index, name in enumerate(ESTIMATES) for moment in MOMENTS}
    return sorted(keys, key=lambda key: rank.get(key, len(rank)) if key in rank or key.endswith(MOMENTS) else -1)


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return NOT_REACHED if key == "steps_to_baseline_loss" else "-"
    if isinstance(value, Estimate):
        mark = "" if value.resolved else "?"
        return f"{_number(value.value)}{mark} [{_number(value.low)}, {_number(value.high)}]"
    if key == "steps_to_baseline_loss":
        return f"{value:.0f}"
    if key == "perplexity":
        return f"{value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) and key != "bits" else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)
