"""The benchmark's rows as Markdown tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from families import ORDINARY
from peers import PEERS
from scipy.special import betaincinv
from ways import RECIPE, RESOLVE, SAME, Row

Key = TypeVar("Key", bound=Hashable)
COVERED, COVERED_RESOLVED = 0.90, 0.95  # wanted of all intervals, and of those marked resolved
SAMPLED = ("trace", "rms", "frobenius", "negative_energy_share", "negative_magnitude_share")
NOMINAL = (0.93, 0.99)  # coverage wanted of 95 % intervals whose width is sampling error
BAND = 0.95  # of the binomial bands
OTHERS = [f"{name}, {how}" for name in ("hard count", *PEERS) for how in (SAME, RECIPE)]


def covered(row: Row) -> bool:
    """Whether the interval contains the truth; an end that is not finite is stored as None."""
    low = -math.inf if row["low"] is None else row["low"]
    high = math.inf if row["high"] is None else row["high"]
    return low <= row["truth"] <= high


def coverage(rows: Sequence[Row]) -> str:
    """How often the intervals of each way contain the truth: a table for each quantity."""
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


def by_family(rows: Sequence[Row]) -> str:
    """How often the intervals contain the truth, by family: a table for each way to measure.

    ? marks a coverage below what is wanted, ! one whose binomial 95 % band lies wholly outside what is wanted.
    """
    with_interval = [row for row in rows if "low" in row]
    parts = []
    for way, of_way in grouped(with_interval, lambda row: row["way"]).items():
        quantities = grouped(of_way, lambda row: row["quantity"])
        lines = []
        for name, of_family in pools(of_way).items():
            cells = [[row for row in of_family if row["quantity"] == quantity] for quantity in quantities]
            lines.append([name, str(max(map(len, cells))), *map(cell, cells)])
        header = ["family", "intervals", *(quantity.replace("_", " ") for quantity in quantities)]
        parts.append(f"\n{way}, covered by family\n\n" + markdown(header, lines))
    return "\n".join(parts)


def pools(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each bulk and of each kind of Hessian, then of all bulks, of all models, and all."""
    models = [row for row in rows if row["radius"] is None]
    bulks = [row for row in rows if row["radius"] is not None]
    found = {**grouped(rows, kind), "all bulks": bulks, "all models": models, "all": list(rows)}
    return {name: group for name, group in found.items() if group}


def kind(row: Row) -> str:
    """A bulk, or a kind of Hessian of the language models."""
    if row["radius"] is not None:
        return row["family"].replace("-", " ")
    return "models, " + next((mode for mode in ("ste", "latent") if mode in row["family"]), "full precision")


def cell(group: Sequence[Row]) -> str:
    if not group:
        return ""
    marks = {mark for *_, mark in against_bars(group)}
    return f"{mean(map(covered, group)):.3f}" + ("!" if "!" in marks else "?" if "?" in marks else "")


def against_bars(group: Sequence[Row]) -> list[tuple[str, int, int, str]]:
    """Compare the coverage of one quantity with the ranges that are wanted.

    For each range: its name, the number of intervals, the number of them that cover, and a mark: ? for a coverage below
    the range, ! for one whose binomial band lies wholly outside it.
    """
    resolved = [row for row in group if row["resolved"]]
    bars = [
        (f"all {COVERED}", group, COVERED, 1.0),
        (f"resolved {COVERED_RESOLVED}", resolved, COVERED_RESOLVED, 1.0),
    ]
    if group[0]["quantity"] in SAMPLED:
        bars.append((f"{NOMINAL[0]} to {NOMINAL[1]}", group, *NOMINAL))
    found = []
    for name, of_bar, lower, upper in bars:
        if not of_bar:
            continue
        hits = sum(map(covered, of_bar))
        low, high = band(hits, len(of_bar))
        share = hits / len(of_bar)
        mark = "!" if high < lower or low > upper else "?" if share < lower else ""
        found.append((name, len(of_bar), hits, mark))
    return found


def band(hits: int, tries: int) -> tuple[float, float]:
    """The binomial band of a share (Clopper and Pearson, Biometrika 26, 1934)."""
    tail = (1 - BAND) / 2
    low = betaincinv(hits, tries - hits + 1, tail) if hits else 0.0
    high = betaincinv(hits + 1, tries - hits, 1 - tail) if hits < tries else 1.0
    return float(low), float(high)


def outside(rows: Sequence[Row]) -> str:
    """Every family whose coverage is outside the wanted range, and every case that chance does not explain."""
    with_interval = [row for row in rows if "low" in row]
    lines = []
    for (way, quantity), group in grouped(with_interval, lambda row: (row["way"], row["quantity"])).items():
        cases = grouped(group, lambda row: row["label"])
        for name, part, marks in [
            *((name, part, "!?") for name, part in pools(group).items()),
            *((label, part, "!") for label, part in cases.items()),
        ]:
            for bar, tries, hits, mark in against_bars(part):
                if mark and mark in marks:
                    low, high = band(hits, tries)
                    line = [way, quantity.replace("_", " "), name, bar, f"{hits} of {tries}", f"{hits / tries:.3f}"]
                    lines.append([*line, f"{low:.3f} to {high:.3f}", "yes" if mark == "!" else "no"])
    header = ["way", "quantity", "family or case", "wanted", "covered", "share", "95 % band", "beyond chance"]
    return "\noutside what is wanted\n\n" + (markdown(header, lines) if lines else "none")


def errors(rows: Sequence[Row]) -> str:
    """The mean absolute error of the negative share, by family and size."""
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
    """The resolved share and the error of `resolve` on the bulks that have to be resolved."""
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
    """The rows by key, in the order in which the keys first occur."""
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
