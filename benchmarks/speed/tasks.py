"""The tasks that are timed. Each returns rows, one for each function of a tool that does the task (its `way`).

A row holds `way`, `seconds`, `products` (Hessian-vector products), `memory` (peak bytes above model and batch) and what
the task adds. Where the tool failed it holds `way` and `error`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory, release, synchronize, timed
from models import Case
from tools import ACCURACY, EIGENVALUES, Eigenvalues, Spectra, Tool, Trace, engines

import spectra
from spectra.backend import memory
from spectra.backend.errors import first_line

Row = dict[str, Any]
WARM_UP_STEPS = 3
BLOCKS = (1, 4, 10)  # vectors multiplied at once
TRACE_PROBES = 30
TRACE_TARGET = 0.02  # half-width of the 95 % interval over the trace
TRACE_LADDER = (30, 42, 60, 84, 120, 168, 240, 336, 480)
LARGEST_FOR_ACCURACY = {"cpu": 2_000_000, "cuda": 20_000_000}  # parameters; the traces below hold hundreds of vectors
BASIS = 3 * EIGENVALUES + 11  # vectors that topk holds


@dataclass(frozen=True)
class Effort:
    """How much is measured, the same for every tool."""

    probes: int = 10
    steps: int = 100
    samples: int = 7
    half_width: float = 0.05
    budget: int = 1500
    slope_points: int = 4  # sizes, each twice the one before
    slope_steps: int = 20  # the fewest
    accuracy: bool = True  # find the number of products for a trace to 2 %
    trace_limit: int = 480  # the largest number of products tried for it
    engines: bool = True  # time every engine by name as well


@dataclass
class Bench:
    """A case, a tool with its options, and the reference eigenvalues."""

    case: Case
    kind: type[Tool]
    options: dict[str, Any]
    effort: Effort
    truth: list[float] | None = None  # the five largest and five smallest eigenvalues

    @property
    def ours(self) -> bool:
        return issubclass(self.kind, Spectra)

    @contextmanager
    def tool(self, **more: Any) -> Iterator[tuple[Tool, PeakMemory]]:
        """A new tool that has multiplied twice, and a memory gauge started before it was made."""
        gauge = PeakMemory(self.case.device)
        tool = self.kind(self.case, **{**self.options, **more})
        try:
            for _ in range(2):
                tool.product(self.case.vector())
            yield tool, gauge
        finally:
            tool.close()
            del tool
            release(self.case.device)
            if self.case.device.type == "cuda":
                torch.cuda.empty_cache()


def attempt(way: str, run: Callable[[], Row]) -> Row:
    """The row of one way. A failure gives a row with its reason, and the other ways go on."""
    try:
        return {"way": way, **run()}
    except Exception as error:  # in another library, or out of memory
        return {"way": way, "error": reason(error)}


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def measured(bench: Bench, tool: Tool, gauge: PeakMemory, run: Callable[[], Any]) -> tuple[Row, Any]:
    """Seconds, products and peak memory of one call, and its result."""
    release(bench.case.device)
    gauge.restart()
    before = tool.products
    seconds, result = timed(run, bench.case.device)
    return {"seconds": seconds, "products": tool.products - before, "memory": gauge.bytes}, result


def product(bench: Bench) -> list[Row]:
    """One product, and for `spectra` also blocks of products and every engine; `seconds` are per vector."""
    rows = [attempt("one vector", lambda: _products(bench, 0))]
    if not bench.ours:
        return rows
    rows += [attempt(f"block of {k}", lambda k=k: _products(bench, k)) for k in BLOCKS]
    named = engines(bench.case.device.type) if bench.effort.engines and "engine" not in bench.options else ()
    for engine in named:
        rows += [
            attempt(f"block of {k}, {engine}", lambda k=k, e=engine: _products(bench, k, engine=e)) for k in BLOCKS
        ]
    return rows


def _products(bench: Bench, k: int, **options: Any) -> Row:
    """A block of k vectors (0: a plain vector) and an eager gradient, in turns, so that a slower machine slows both.

    `first` is the first call, which compiles code or chooses an engine where that is necessary.
    """
    case, device = bench.case, bench.case.device
    vectors = torch.stack([case.vector(i) for i in range(k)], dim=1) if k else case.vector()
    gradients: list[float] = []
    samples: list[float] = []
    with bench.tool(**options) as (tool, gauge):
        multiply = tool.op.__matmul__ if isinstance(tool, Spectra) else tool.product
        first = timed(lambda: multiply(vectors), device)[0]
        multiply(vectors)
        case.gradient()
        for _ in range(bench.effort.samples):
            gradients.append(timed(case.gradient, device)[0])
            samples.append(timed(lambda: multiply(vectors), device)[0] / max(k, 1))
        memory = measured(bench, tool, gauge, lambda: multiply(vectors))[0]["memory"]
    return {
        "seconds": median(samples),
        "products": max(k, 1),
        "memory": memory,
        "gradient": median(gradients),
        "gradients": median(samples) / median(gradients),
        "first": first,
        "samples": samples,
    }


def density(bench: Bench) -> list[Row]:
    """A spectral density from `probes` x `steps` products."""
    effort, rows = bench.effort, []
    with bench.tool() as (tool, gauge):
        for way, how in tool.densities().items():

            def run(how=how) -> Row:
                how.run(effort.probes, WARM_UP_STEPS)
                before = _gradient_seconds(bench)
                row, _ = measured(bench, tool, gauge, lambda: how.run(effort.probes, effort.steps))
                row["gradient"] = median(before + _gradient_seconds(bench))
                if isinstance(tool, Spectra):
                    row["outside"] = outside_products(tool, lambda: how.run(min(effort.probes, 2), effort.steps))
                return row

            row = attempt(way, run)
            first = next((r for r in rows if r["way"] == how.on_top_of), None)
            if first is not None and "seconds" in first and "seconds" in row:
                row = {**row, **{key: row[key] + first[key] for key in ("seconds", "products")}}
            rows.append(row)
    for row in rows:
        if "seconds" in row:
            row |= {"probes": effort.probes, "steps": effort.steps, "a product": row["seconds"] / row["products"]}
            row["gradients"] = row["a product"] / row["gradient"]
    return rows


def _gradient_seconds(bench: Bench) -> list[float]:
    """A few gradients beside a long measurement, since the speed of a machine drifts."""
    return [timed(bench.case.gradient, bench.case.device)[0] for _ in range(3)]


def outside_products(tool: Spectra, run: Callable[[], Any]) -> float:
    """The share of the time of `run` that is not spent in the operator's products.

    The device is waited for before and after each product, so on a GPU this is an upper bound.
    """
    op, device = tool.op, tool.case.device
    inside, depth = 0.0, 0
    names = [name for name in ("_matvec", "_matmat", "_multiply_rows") if hasattr(op, name)]

    def watched(multiply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(vectors: torch.Tensor) -> torch.Tensor:
            nonlocal inside, depth
            if depth:  # called by another of these methods, which counts the time
                return multiply(vectors)
            depth += 1
            synchronize(device)
            started = time.perf_counter()
            try:
                return multiply(vectors)
            finally:
                synchronize(device)
                inside += time.perf_counter() - started
                depth -= 1

        return call

    for name in names:
        setattr(op, name, watched(getattr(op, name)))
    try:
        total, _ = timed(run, device)
    finally:
        for name in names:
            delattr(op, name)
    return 1 - inside / total


def trace(bench: Bench) -> list[Row]:
    """The trace from 30 products, and how many are needed for a 95 % interval of 2 %."""
    rows = []
    with bench.tool() as (tool, gauge):
        for way, run in tool.traces().items():

            def once(run: Callable[[int], Trace] = run) -> Row:
                run(TRACE_PROBES)
                row, found = measured(bench, tool, gauge, lambda: run(TRACE_PROBES))
                row["value"] = found.value
                if bench.effort.accuracy and bench.case.dimension <= LARGEST_FOR_ACCURACY[bench.case.device.type]:
                    row["needed"] = _products_needed(found, run, bench.effort.trace_limit)
                return row

            rows.append(attempt(way, once))
    return rows


def _products_needed(found: Trace, run: Callable[[int], Trace], limit: int) -> float | str | None:
    """Products for an interval of 2 %.

    Computed from the variance where the error falls with the root of the products, else found by trying.
    """
    if found.samples is not None:
        deviation = np.std(found.samples, ddof=1)
        return float((1.96 * deviation / (TRACE_TARGET * abs(found.value))) ** 2) if found.value else None
    if found.half_width is None:
        return None
    if found.as_root:
        return TRACE_PROBES * (found.half_width / (TRACE_TARGET * abs(found.value))) ** 2
    ladder = [probes for probes in TRACE_LADDER if probes <= limit]
    for probes in ladder:
        found = run(probes) if probes > TRACE_PROBES else found
        assert found.half_width is not None
        if found.half_width <= TRACE_TARGET * abs(found.value):
            return probes
    return f"over {ladder[-1]}"


def topk(bench: Bench) -> list[Row]:
    """Five eigenvalues at each end. A way is tried with growing effort until it has converged and is right to 1e-3."""
    needed = BASIS * bench.case.dimension * bench.case.dtype.itemsize
    if bench.truth is None or needed > memory.available(bench.case.device):
        return [{"way": "topk", "error": f"no reference: {BASIS} vectors of this size do not fit in memory"}]
    rows = []
    with bench.tool() as (tool, gauge):
        for way, tries in tool.eigenvalues().items():
            found = []
            for run in tries:
                row = attempt(way, lambda run=run: _search(bench, tool, gauge, run))
                found.append(row)
                if "error" not in row and row["converged"] and row["true error"] <= ACCURACY:
                    break
            # the attempt that was right, and the true error of the first one that was reported as converged
            said = next((row for row in found if row.get("converged")), None)
            answered = [row for row in found if "error" not in row] or found
            rows.append(answered[-1] | {"first said converged at": said and said["true error"], "tries": len(found)})
    return rows


def _search(bench: Bench, tool: Tool, gauge: PeakMemory, run: Callable[[], Eigenvalues]) -> Row:
    row, found = measured(bench, tool, gauge, run)
    error = true_error(found, bench.truth or [])
    return row | {"converged": found.converged, "true error": error, "ends": found.ends, "values": found.values}


def true_error(found: Eigenvalues, truth: list[float]) -> float:
    """The largest relative error of the eigenvalues found. Raises ValueError where there are too few."""
    want = np.sort(truth)
    got = np.sort(found.values)
    if found.ends == "magnitude":
        want = np.sort(want[np.argsort(-np.abs(want))[: EIGENVALUES // 2]])
    if len(got) != len(want):
        raise ValueError(f"{len(got)} eigenvalues of {len(want)} were found")
    return float(np.max(np.abs(got - want) / np.abs(want)))


def share(bench: Bench) -> list[Row]:
    """The share of negative eigenvalues to a half-width, for which no other tool has an interval."""
    if not bench.ours:
        return []
    effort = bench.effort
    with bench.tool() as (tool, gauge):
        assert isinstance(tool, Spectra)

        def run() -> Row:
            row, found = measured(
                bench,
                tool,
                gauge,
                lambda: spectra.resolve(tool.op, half_width=effort.half_width, budget=effort.budget),
            )
            return row | {"value": found.value, "low": found.low, "high": found.high, "resolved": found.resolved}

        return [attempt(f"resolve to {effort.half_width:g}", run)]
