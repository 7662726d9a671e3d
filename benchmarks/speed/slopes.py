"""How the cost of `spectra` grows: time against probe vectors, Lanczos steps and batches, memory against steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from measuring import timed
from tasks import Bench, Row, attempt, measured
from tools import Spectra, Tool

import spectra

PROBES = 2  # probe vectors, where the number of Lanczos steps grows


def slopes(bench: Bench) -> list[Row]:
    """A row for each size that grows: the `sizes`, what was measured at each, and the log-log slope."""
    if not bench.ours:
        return []
    doublings = [2**i for i in range(bench.effort.slope_points)]
    fewest = bench.effort.slope_steps
    steps = [fewest * d for d in doublings]
    rows = [
        _grown(
            bench, "seconds against probe vectors", "seconds", doublings, lambda size: {"probes": size, "steps": fewest}
        ),
        _grown(bench, "seconds against steps", "seconds", steps, lambda size: {"steps": size}),
        attempt("seconds against batches", lambda: _batches(bench, doublings)),
    ]
    for policy in ("none", "full"):
        rows.append(
            _grown(
                bench,
                f"memory against steps, reorthogonalize={policy}",
                "memory",
                steps,
                lambda size, policy=policy: {"probes": 1, "steps": size, "reorthogonalize": policy},
            )
        )
    return rows


def _grown(bench: Bench, way: str, what: str, sizes: Sequence[int], options: Callable[[int], dict[str, Any]]) -> Row:
    """Measure `slq` at each size, on one operator."""

    def run() -> Row:
        with bench.tool() as (tool, gauge):
            assert isinstance(tool, Spectra)

            def at(size: int) -> float:
                chosen = {"probes": PROBES, "reorthogonalize": "none", **options(size)}
                if what == "seconds":
                    return timed(lambda: spectra.slq(tool.op, **chosen), bench.case.device)[0]
                return measured(bench, tool, gauge, lambda: spectra.slq(tool.op, **chosen))[0][what]

            at(sizes[0])
            values = [at(size) for size in sizes]
        return {"sizes": list(sizes), what: values, "slope": fitted(sizes, values)}

    return attempt(way, run)


def _batches(bench: Bench, counts: Sequence[int]) -> Row:
    """Time one product over more and more batches of the same size."""
    values = []
    for count in counts:
        with bench.tool(count=count) as (tool, _):
            values.append(min(_product_seconds(tool, bench) for _ in range(bench.effort.samples)))
    return {"sizes": list(counts), "seconds": values, "slope": fitted(counts, values)}


def _product_seconds(tool: Tool, bench: Bench) -> float:
    vector = bench.case.vector(1)
    return timed(lambda: tool.product(vector), bench.case.device)[0]


def fitted(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) against log(size): 1 for proportional, 0 for constant."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-12)), 1)[0])
