"""What several seeds say together: mean, range and standard deviation of the runs of a bit-width and method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from spectra.estimates.estimate import Estimate
from spectra.runs.files import write_whole
from spectra.runs.jsonlines import encoded

Row = dict[str, Any]

SPREAD_FILE = "seeds.json"
OUTCOMES = ("validation_loss", "perplexity", "steps_to_baseline_loss")


def spread_rows(rows: Sequence[Row]) -> list[Row]:
    """The runs of each bit-width and method taken together.

    Args:
        rows: The rows of a study with several seeds, a run each.

    Returns:
        A row for each bit-width and method with two seeds or more: `seeds`, and for each quantity `mean`, `low` and
        `high`, the range over the runs, `sd`, the standard deviation with n - 1 in the denominator, and `runs`, how
        many have the quantity. Of a spectral estimate the values are taken, and resolved ones alone. Empty where the
        rows have no seeds.
    """
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if "seed" in row:
            groups.setdefault((row["bits"], row["method"]), []).append(row)
    return [_together(group) for group in groups.values() if len(group) > 1]


def _together(group: Sequence[Row]) -> Row:
    seeds = [row["seed"] for row in group]
    names = [name for row in group for name, value in row.items() if name in OUTCOMES or isinstance(value, Estimate)]
    found = {name: _spread([_number(row.get(name)) for row in group]) for name in dict.fromkeys(names)}
    label = str(group[0]["label"]).rpartition(", seed")[0]
    head = {"label": f"{label}, {len(seeds)} seeds", "bits": group[0]["bits"], "method": group[0]["method"]}
    return head | {"seeds": seeds} | {name: spread for name, spread in found.items() if spread is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, Estimate):
        return value.value if value.resolved and math.isfinite(value.value) else None
    return value


def _spread(values: Sequence[float | None]) -> Row | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    deviation = stdev(there) if len(there) > 1 else None
    return {"mean": fmean(there), "low": min(there), "high": max(there), "sd": deviation, "runs": len(there)}


def in_words(spread: Sequence[Row]) -> list[str]:
    """The spread of the validation loss in sentences, one for each bit-width and method.

    Args:
        spread: Rows of `spread_rows`.

    Returns:
        Lines such as "2-bit WinQ, 3 seeds: validation loss 2.1034 on average, from 2.0990 to 2.1101, standard
        deviation 0.0058".
    """
    lines = []
    for row in spread:
        loss = row["validation_loss"]
        lines.append(
            f"{row['label']}: validation loss {loss['mean']:.4f} on average, from {loss['low']:.4f} to "
            f"{loss['high']:.4f}, standard deviation {loss['sd']:.4f}"
        )
    return lines


def as_text(spread: Sequence[Row]) -> list[Row]:
    """The spread as rows of a table of runs, with the mean and the range in words.

    Args:
        spread: Rows of `spread_rows`.

    Returns:
        Rows whose `seed` says how many seeds there are, and whose outcomes are texts such as "2.1034 (2.0990 to
        2.1101)".
    """
    digits = {"validation_loss": ".4f", "perplexity": ".2f", "steps_to_baseline_loss": ".0f"}
    rows = []
    for row in spread:
        count = len(row["seeds"])
        texts = {name: row[name] for name in ("label", "bits", "method")} | {"seed": f"mean of {count} (range)"}
        for name, form in digits.items():
            if name in row:
                mean, low, high = (format(row[name][key], form) for key in ("mean", "low", "high"))
                some = "" if row[name]["runs"] == count else f", {row[name]['runs']} of {count} runs"
                texts[name] = f"{mean} ({low} to {high}{some})"
        rows.append(texts)
    return rows


def write_spread(spread: Sequence[Row], folder: Path) -> None:
    """Write seeds.json, where there is a spread.

    Args:
        spread: Rows of `spread_rows`.
        folder: The study's folder.
    """
    if spread:
        write_whole(folder / SPREAD_FILE, encoded(list(spread), indent=2) + b"\n")
