"""The worker process: it prepares a case, or runs the tasks of one tool. A result is a dict, one for each task."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libraries
import tasks
import tools
import torch
from measuring import MARK, environment, use_all_cores
from models import Case, load, prepare
from slopes import slopes

import spectra

KINDS = {
    "spectra": tools.Spectra,
    "paper": tools.Paper,
    "pyhessian": libraries.PyHessian,
    "hessian-eigenthings": libraries.HessianEigenthings,
    "curvlinops": libraries.Curvlinops,
}
TASKS = {
    "product": tasks.product,
    "density": tasks.density,
    "trace": tasks.trace,
    "topk": tasks.topk,
    "share": tasks.share,
    "slopes": slopes,
}
AGREEMENT = 1e-3  # relative, of H v, for a tool in the precision of the model
LOOSE_AGREEMENT = 5e-2  # for one that was asked for a lower precision
DOUBLE_LIMIT = 200_000_000  # parameters up to which references are computed in float64
SEARCH_TOLERANCE = 1e-5  # residuals this small leave eigenvalues right to 1e-8


def work(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of one process. spec: model, bits, folder, device, dtype, tool and, for a tool, tasks and effort."""
    use_all_cores()
    device = torch.device(spec["device"])
    if spec["tool"] == "prepare":
        yield {"task": "prepare", "environment": environment(device), **_prepared(spec, device)}
        return
    folder = Path(spec["folder"])
    kept = torch.load(folder / reference_name(spec), weights_only=True)
    case = load(spec["model"], spec["bits"], folder, device, spec["dtype"])
    with existing_objects_uncollected():
        yield from measured_tasks(spec, case, kept)


@contextlib.contextmanager
def existing_objects_uncollected() -> Iterator[None]:
    """The garbage collector skips the objects that exist now: they take a third of a second at every collection."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measured_tasks(spec: dict[str, Any], case: Case, kept: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tool's agreement with the reference and, if it agrees, its tasks."""
    kind, options = parse_tool(spec["tool"])
    bench = tasks.Bench(case, KINDS[kind], options, tasks.Effort(**spec["effort"]), kept["eigenvalues"])
    try:
        error = disagreement(bench, kept["product"])
    except Exception as failure:
        yield {"task": "agreement", "error": tasks.reason(failure)}
        return
    limit = LOOSE_AGREEMENT if "precision" in options else AGREEMENT
    yield {"task": "agreement", "disagreement": error}
    if not error <= limit:
        yield {"task": "agreement", "error": f"its H v is off by {error:.1e}, more than {limit:g}: not timed"}
        return
    for name in spec["tasks"]:
        started = time.perf_counter()
        try:
            rows = TASKS[name](bench)
        except Exception as failure:  # the other tasks go on
            rows = [{"way": name, "error": tasks.reason(failure)}]
        yield {"task": name, "rows": rows, "took": time.perf_counter() - started}


def parse_tool(text: str) -> tuple[str, dict[str, Any]]:
    """Kind and options of a tool named like "spectra:engine=batched+microbatch=4"; digits alone are a number."""
    kind, _, rest = text.partition(":")
    pairs = [part.split("=", 1) for part in rest.split("+") if part]
    return kind, {name: int(value) if value.isdigit() else value for name, value in pairs}


def reference_name(spec: dict[str, Any]) -> str:
    return f"{spec['model']}-{spec['bits']}bit-reference.pt"


def disagreement(bench: tasks.Bench, product: torch.Tensor) -> float:
    """Relative difference of the tool's H v from the reference."""
    with bench.tool() as (tool, _):
        got = tool.product(bench.case.vector()).double().cpu()
    return float(torch.linalg.norm(got - product) / torch.linalg.norm(product))


def _prepared(spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train the model, and compute H v of a vector and the extreme eigenvalues in float64 where it fits."""
    folder = Path(spec["folder"])
    loss = prepare(spec["model"], spec["bits"], folder, device)
    case = load(spec["model"], spec["bits"], folder, device, spec["dtype"])
    if case.dimension <= DOUBLE_LIMIT:
        case = Case(case.model.double(), case.ids)
    product = case.product(case.vector()).double().cpu()
    found: dict[str, Any] = {"eigenvalues": None}
    if "topk" in spec["tasks"]:
        found = _reference_eigenvalues(case)
    torch.save({"product": product, "eigenvalues": found["eigenvalues"]}, folder / reference_name(spec))
    return {"dimension": case.dimension, "training loss": loss, "precision": str(case.dtype), **found}


def _reference_eigenvalues(case: Case) -> dict[str, Any]:
    """Eigenvalues from a search with a far smaller tolerance than the tools'; None where its basis does not fit."""
    try:
        with spectra.HessianOperator(case.model, case.batches()) as op:
            pairs = spectra.topk(op, tools.EIGENVALUES, which="BE", tol=SEARCH_TOLERANCE, max_products=1000)
    except (torch.OutOfMemoryError, RuntimeError) as failure:  # the CPU's allocator raises RuntimeError
        return {"eigenvalues": None, "no eigenvalues": tasks.reason(failure)}
    worst = float((pairs.residuals / abs(pairs.values)).max())
    return {"eigenvalues": pairs.values.tolist(), "worst residual": worst, "reference products": pairs.products}


def main(spec: str) -> None:
    """Print each result as a line."""
    for result in work(json.loads(spec)):
        print(MARK + json.dumps(result), flush=True)
