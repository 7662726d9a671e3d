"""The results as Markdown: medians over the repeats, and ratios to the first row of `spectra` for the same task.

python benchmarks/speed/speed_tables.py RESULTS.json [MORE.json ...]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from spectra.estimates.digits import rounded

Row = dict[str, Any]
Group = list[Row]  # one row a repeat
MIB = 1 << 20


def flattened(results: Iterable[dict[str, Any]]) -> list[Row]:
    """Every row of every result, with the model, bits, tool, task and repeat it belongs to."""
    named = ("model", "bits", "tool", "repeat", "task")
    return [{name: result[name] for name in named} | row for result in results for row in result.get("rows", []) if row]


def middle(group: Group, key: str) -> Any:
    """The median over the repeats, the first value where they are not numbers, None where there is none."""
    values = [row[key] for row in group if row.get(key) is not None]
    if not values:
        return None
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return median(numbers) if len(numbers) == len(values) else values[0]


def number(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return str(value)


def seconds(group: Group, scale: float = 1.0) -> str:
    """The median, and the range where there are several repeats."""
    values = [row["seconds"] * scale for row in group if "seconds" in row]
    value_range = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(median(values)) + value_range if values else ""


def mebibytes(group: Group) -> str:
    held = middle(group, "memory")
    return "" if held is None else number(held / MIB)


Column = tuple[str, Callable[[Group, Group | None], str]]


def _of(key: str, digits: int = 3) -> Callable[[Group, Group | None], str]:
    return lambda group, ours: number(middle(group, key), digits)


def ratio(group: Group, ours: Group | None) -> float | None:
    """Seconds over those of the first row of `spectra` for the task, medians over the same repeats."""
    reference, seconds_of_group = middle(ours or [], "seconds"), middle(group, "seconds")
    return seconds_of_group / reference if reference and seconds_of_group else None


def _interval(group: Group, ours: Group | None) -> str:
    ends = [middle(group, key) for key in ("value", "low", "high")]
    return "" if None in ends else "{} [{}, {}]".format(*rounded(*ends))


RATIO: Column = ("times ours", lambda group, ours: number(ratio(group, ours)))
SECONDS: Column = ("s", lambda group, ours: seconds(group))
MEMORY: Column = ("MiB", lambda group, ours: mebibytes(group))
PRODUCTS: Column = ("products", _of("products", 6))
COLUMNS: dict[str, tuple[str, list[Column]]] = {
    "product": (
        "An eager gradient and a Hessian-vector product, per vector",
        [
            ("ms", lambda group, ours: seconds(group, 1e3)),
            ("gradient, ms", lambda group, ours: number((middle(group, "gradient") or 0) * 1e3 or None)),
            ("gradients", _of("gradients")),
            RATIO,
            ("first call, s", _of("first")),
            MEMORY,
        ],
    ),
    "density": (
        "A spectral density",
        [
            SECONDS,
            PRODUCTS,
            ("ms a product", lambda group, ours: number((middle(group, "a product") or 0) * 1e3 or None)),
            ("gradients a product", _of("gradients")),
            RATIO,
            ("outside products", lambda group, ours: _percent(middle(group, "outside"))),
            MEMORY,
        ],
    ),
    "trace": (
        "The trace from 30 products, and the products needed for a 95 % interval of 2 %",
        [SECONDS, PRODUCTS, RATIO, ("trace", _of("value", 4)), ("products for 2 %", _of("needed", 4)), MEMORY],
    ),
    "topk": (
        "Five eigenvalues at each end, reported as converged and with a true relative error below 1e-3",
        [
            SECONDS,
            PRODUCTS,
            RATIO,
            ("true error", _of("true error", 2)),
            ("says converged", _of("converged")),
            ("true error when first converged", _of("first said converged at", 2)),
            ("ends", _of("ends")),
            MEMORY,
        ],
    ),
    "share": (
        "The share of negative eigenvalues to a half-width; no other tool has an interval for it",
        [SECONDS, PRODUCTS, ("share", _interval), ("resolved", _of("resolved")), MEMORY],
    ),
    "slopes": (
        "How the cost grows: log-log slope, 1 for proportional and 0 for constant",
        [("sizes", _of("sizes")), ("slope", _of("slope", 2))],
    ),
}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def table(results: Sequence[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]) -> str:
    """The whole report. results: those of the workers, each with model, bits, tool and repeat."""
    lines = [*_head(settings, environment), ""]
    rows = flattened(results)
    cases = list(dict.fromkeys((result["model"], result["bits"]) for result in results))
    for model, bits in cases:
        lines += [f"## {model}, {'full precision' if bits >= 16 else f'{bits} bit'}", ""]
        lines += _notes([r for r in results if (r["model"], r["bits"]) == (model, bits)])
        for task, (title, columns) in COLUMNS.items():
            chosen = [row for row in rows if (row["model"], row["bits"], row["task"]) == (model, bits, task)]
            if chosen:
                lines += [f"**{task}.** {title}.", "", *_markdown(chosen, columns), ""]
    return "\n".join(lines).rstrip() + "\n"


def _head(settings: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    return [
        f"# Speed on {environment.get('device', 'an unknown device')}",
        "",
        f"{environment.get('date', '')}, {environment.get('threads', '?')} CPU threads, {settings['dtype']}, medians "
        f"of {settings['repeats']} interleaved repeats (their range in brackets), each tool in a process of its own.",
        "A product is a Hessian-vector product. "
        f"{settings['probes']} probe vectors x {settings['steps']} steps for the density"
        + (f", {settings['scale']:g} of the usual products for every tool" if settings["scale"] != 1 else "")
        + ". MiB: the peak above model and batch. Times ours: seconds over those of our first row.",
        f"Python {environment.get('python', '?')}, {versions}.",
    ]


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What was measured, how far each tool's H v is off the reference, and which tools failed."""
    notes, agreed = [], {}
    for result in results:
        if result["task"] == "prepare" and "dimension" in result:
            notes.append(
                f"{result['dimension']:,} parameters, training loss {number(result['training loss'])}, references in "
                f"{result['precision'].removeprefix('torch.')}."
            )
        elif "disagreement" in result:
            agreed[result["tool"]] = max(agreed.get(result["tool"], 0.0), result["disagreement"])
    if agreed:
        notes.append("H v is off by " + ", ".join(f"{error:.0e} ({tool})" for tool, error in agreed.items()) + ".")
    failed = {(r["tool"], r["error"]) for r in results if "error" in r}
    notes += [f"Left out: {tool}, {error}" for tool, error in sorted(failed)]
    return [*notes, ""]


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    groups: dict[tuple[str, str], Group] = defaultdict(list)
    for row in rows:
        groups[row["tool"], row["way"]].append(row)
    ours = next((group for (tool, _), group in groups.items() if tool.startswith("spectra")), None)
    used = [
        (title, cells)
        for title, cell in columns
        if any(cells := [cell(group, ours) for group in groups.values()])  # empty columns are left out
    ]
    lines = [
        "| " + " | ".join(["tool", "way", *(title for title, _ in used)]) + " |",
        "|" + "---|" * 2 + "---:|" * len(used),
    ]
    for index, ((tool, way), group) in enumerate(groups.items()):
        failure = next((row["error"] for row in group if "error" in row), None)
        cells = [values[index] for _, values in used]
        if failure is not None and cells:
            cells[0] = (cells[0] + " " if cells[0] else "") + f"failed: {failure}"
        lines.append("| " + " | ".join([tool, way, *cells]) + " |")
    return lines


def main(paths: Sequence[str]) -> None:
    """Print the tables of saved runs."""
    for path in paths:
        kept = json.loads(Path(path).read_text())
        print(table(kept["results"], kept["settings"], kept["environment"]))


if __name__ == "__main__":
    main(sys.argv[1:])
