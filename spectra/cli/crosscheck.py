"""`spectra crosscheck`: PyHessian itself beside this engine, on a checkpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from spectra.backend.errors import InputError
from spectra.backend.extras import need
from spectra.cli import inputs
from spectra.cli.command_line import add_formats, examples, interrupts_say, print_csv, print_json
from spectra.cli.tables import aligned
from spectra.operators.hessian.precision import LOWER
from spectra.runs.flat import flattened

if TYPE_CHECKING:
    from spectra.integrations.crosscheck import CrossCheck

USAGE = "spectra crosscheck MODEL (--text FILE... | --labelled FILE... | --images DIR) [options]"


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "crosscheck",
        help="run PyHessian beside this engine on a checkpoint, and compare numbers, times and products",
        usage=USAGE,  # argparse's own would name the model last
        **examples(
            "spectra crosscheck checkpoint --text notes.txt",
            "spectra crosscheck checkpoint --text notes.txt --sequences 4 --top 2 --probes 2 --steps 20 --json",
        ),
    )
    parser.set_defaults(command=run)
    inputs.add_options(parser)
    add = parser.add_argument
    add("--top", type=int, default=1, help="eigenvalues of largest magnitude, %(default)s by default")
    add("--probes", type=int, default=4, help="random vectors of the density, %(default)s by default")
    add("--steps", type=int, default=40, help="Lanczos steps for each, %(default)s by default")
    add(
        "--max-iterations",
        type=int,
        default=100,
        help="PyHessian's maxIter: of an eigenvalue, and samples of a trace, %(default)s by default",
    )
    add("--tol", type=float, default=1e-3, help="PyHessian's tol, %(default)s by default")
    add("--seed", type=int, default=0, help="of the random vectors, %(default)s by default")
    add_formats(parser, json="print JSON instead of tables", csv="print CSV instead of tables")


def run(options: argparse.Namespace) -> None:
    """Print both libraries' numbers and costs. Nothing is written."""
    with interrupts_say("nothing was compared"):
        found, notes = _crosscheck(options)
    if options.json:
        print_json({"model": options.model, **found.to_dict(), "notes": [*notes, *found.notes]})
        return
    if options.csv:
        print_csv(_flat(found))
        return
    print(f"{found.dimension:,} parameters, loss {found.loss:.4g}, on {found.device}")
    for line in _lines(found):
        print(line)
    for note in (*notes, *found.notes):
        print(f"note: {note}")


def _crosscheck(options: argparse.Namespace) -> tuple[CrossCheck, tuple[str, ...]]:
    """The comparison, and notes on the data."""
    need("pyhessian")
    from spectra.integrations.crosscheck import crosscheck
    from spectra.integrations.loading import quiet_transformers

    inputs.check(options)
    if options.dtype in LOWER:
        raise InputError(f"PyHessian computes in the precision of the weights, got --dtype {options.dtype}: float32")
    found = inputs.load(options)
    with quiet_transformers():
        compared = crosscheck(
            found.model,
            found.batches,
            found.loss,
            params=options.params,
            top=options.top,
            probes=options.probes,
            steps=options.steps,
            max_iterations=options.max_iterations,
            tol=options.tol,
            seed=options.seed,
        )
    return compared, found.notes


def _flat(found: CrossCheck) -> list[dict[str, Any]]:
    """Both tables as rows: the quantities, then seconds and products of each part of the work."""
    rows: list[dict[str, Any]] = []
    for each in found.quantities:
        numbers = {"pyhessian": each.pyhessian, **flattened({"spectra": each.spectra})}
        rows.append({"quantity": each.quantity, **numbers, "inside": each.inside, "verdict": each.verdict})
    for task, (theirs, ours) in found.costs.items():
        for unit in ("seconds", "products"):
            rows.append(
                {"quantity": f"{task}, {unit}", "pyhessian": getattr(theirs, unit), "spectra": getattr(ours, unit)}
            )
    return rows


def _lines(found: CrossCheck) -> list[str]:
    """A table of the quantities, and one of the costs."""
    rows = [("quantity", "PyHessian", "spectra", "95 % interval", "PyHessian's number is")]
    for each in found.quantities:
        value, low, high = each.spectra.rounded()
        mark = "" if each.spectra.resolved else " (unresolved)"
        rows.append((each.quantity, f"{each.pyhessian:.5g}", value, f"[{low}, {high}]{mark}", each.verdict))
    costs = [("", "PyHessian", "products", "spectra", "products")]
    for task, (theirs, ours) in found.costs.items():
        times = [f"{cost.seconds:.3g} s" for cost in (theirs, ours)]
        costs.append((task, times[0], str(theirs.products), times[1], str(ours.products)))
    return [*aligned(rows, "<>><<"), "", *aligned(costs, "<>>>>")]
