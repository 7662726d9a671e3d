"""The benchmark's rows as Markdown tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from families import ORDINARY
from peers import PEERS
from ways import RECIPE, RESOLVE, SAME, Row

Key = TypeVar("Key", bound=Hashable)
OTHERS = [f"{name}, {how}" for name in ("hard count", *PEERS) for how in (SAME, RECIPE)]


def covered(row: Row) -> bool:
    """Whether the interval holds the truth; an end that is not finite is stored as None."""
    low = -math.inf if row["low"] is None else row["low"]
    high = math.inf if row["high"] is None else row["high"]
    return low <= row["truth"] <= high


def coverage(rows: Sequence[Row]) -> str:
    """How often each way's intervals hold the truth, a table a quantity."""
    with_interval = [row for row in rows if "low" in row]
    header = [
        "way",
        "covered",
        "covered, of resolved",
        "worst case",
        "covered there",
        "resolved",
        "median half-width / truth",
        "mean products",
    ]
    parts = []
    for quantity, of_quantity in grouped(with_interval, lambda row: row["quantity"]).items():
        lines = [[way, *coverage_line(group)] for way, group in grouped(of_quantity, lambda row: row["way"]).items()]
        parts.append(f"\n{quantity.replace('_', ' ')}\n\n" + markdown(header, lines))
    return "\n".join(parts)


def coverage_line(group: Sequence[Row]) -> list[str]:
    cases = {label: mean(map(covered, of_case)) for label, of_case in grouped(group, lambda row: row["label"]).items()}
    worst = min(cases, key=lambda label: cases[label])
    resolved = [row for row in group if row["resolved"]]
    widths = [
        (row["high"] - row["low"]) / 2 / abs(row["truth"])
        for row in group
        if row["truth"] and row["low"] is not None and row["high"] is not None
    ]
    return [
        f"{mean(map(covered, group)):.3f}",
        f"{mean(map(covered, resolved)):.3f}" if resolved else "",
        worst if cases[worst] < 1 else "none",
        f"{cases[worst]:.2f}",
        f"{len(resolved) / len(group):.2f}",
        f"{np.median(widths):.2g}" if widths else "",
        f"{mean(row['products'] for row in group):.0f}",
    ]


def errors(rows: Sequence[Row]) -> str:
    """The mean absolute error of the negative share by family and size, averaged over the rest."""
    shares = [row for row in rows if row["quantity"] == "negative_share"]
    found = {row["way"] for row in shares}
    others = [way for way in OTHERS if way in found]
    header = ["family", "n", "truth", "resolve: error", "resolved", "products", *others]
    lines = []
    for (family, dimension), group in grouped(shares, lambda row: (row["family"], row["dimension"])).items():
        ours = [row for row in group if row["way"] == RESOLVE]
        line = [family.replace("-", " "), f"{dimension:,}", f"{mean(row['truth'] for row in group):.3f}"]
        line += (
            [
                error(ours),
                f"{mean(row['resolved'] for row in ours):.2f}",
                f"{mean(row['products'] for row in ours):.0f}",
            ]
            if ours
            else ["", "", ""]
        )
        lines.append(line + [error([row for row in group if row["way"] == way]) for way in others])
    return "\nnegative share, mean absolute error\n\n" + markdown(header, lines)


def error(group: Sequence[Row]) -> str:
    return f"{mean(abs(row['value'] - row['truth']) for row in group):.3f}" if group else ""


def ordinary(rows: Sequence[Row]) -> str:
    """What `resolve` reaches on the bulks that have to be resolved."""
    group = [
        row
        for row in rows
        if row["way"] == RESOLVE
        and row["quantity"] == "negative_share"
        and row["family"] in ORDINARY
        and row["radius"] == 27
    ]
    if not group:
        return ""
    resolved = mean(row["resolved"] for row in group)
    return f"\nordinary bulks ({', '.join(ORDINARY)}) at R 27: {resolved:.3f} resolved, mean error {error(group)}"


def grouped(rows: Sequence[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """By key, in the order in which the keys first occur."""
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def mean(numbers: Any) -> float:
    return float(np.mean([float(number) for number in numbers]))


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

    return "\n".join([text(header), text(["-" * width for width in widths]), *map(text, lines)])
