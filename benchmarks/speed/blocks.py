"""What the spectra of all layers cost from one operator, against an operator for each layer, one after another.

    python benchmarks/speed/blocks.py [--models "llama-64|llama-256"] [--probes 2] [--steps 20] [--device cuda]

Both ways take the same probe vectors and Lanczos steps, and give the same numbers. A repeat times one after the other,
from a model without graphs to the last density; the median over repeats is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spectra
from spectra.operators.blocks import layer_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trust"))

from check_costs import llama
from tables import markdown

HEADER = ["model", "parameters", "layers", "whole, s", "blocks, s", "one after another, s", "gain", "difference"]
CASES = {
    "llama-16": lambda: llama(16, 2),
    "llama-64": lambda: llama(64, 4),
    "llama-256": lambda: llama(256, 4),
    "llama-256, 12 layers": lambda: llama(256, 12),
    "llama-768, 12 layers": lambda: llama(768, 12),
}

Densities = dict[str, spectra.SpectralDensity]


def from_one_operator(model: Any, batches: Any, options: dict[str, int]) -> Densities:
    """The density of each layer from the graphs of one operator."""
    with spectra.HessianOperator(model, batches) as op:
        return spectra.slq(op, blocks="layers", **options)


def one_after_another(model: Any, batches: Any, options: dict[str, int]) -> Densities:
    """The density of each layer from an operator of its own."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layers.setdefault(layer_of(name), []).append(parameter)
    found = {}
    for layer, parameters in layers.items():
        with spectra.HessianOperator(model, batches, params=parameters) as op:
            found[layer] = spectra.slq(op, **options)
    return found


def whole(model: Any, batches: Any, options: dict[str, int]) -> Densities:
    """The density of the whole Hessian, to compare with."""
    with spectra.HessianOperator(model, batches) as op:
        return {"": spectra.slq(op, **options)}


def seconds(run: Callable[[], Densities], device: torch.device) -> tuple[float, Densities]:
    """How long it takes, and what it returns. On a CPU it is processor time, which other programs do not change."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started, found


def row(name: str, options: dict[str, int], repeats: int, device: torch.device) -> list[str]:
    """A line of the table. The first repeat warms up and is not counted if there are others."""
    torch.manual_seed(0)
    model, batches, _ = CASES[name]()
    model.to(device)
    times: dict[str, list[float]] = {"whole": [], "blocks": [], "one": []}
    ways = {"whole": whole, "blocks": from_one_operator, "one": one_after_another}
    found: dict[str, Densities] = {}
    for _ in range(repeats + (repeats > 1)):
        for way, run in ways.items():
            took, found[way] = seconds(lambda run=run: run(model, batches, options), device)
            times[way].append(took)
    medians = {way: statistics.median(each[1:] or each) for way, each in times.items()}
    differences = [
        abs(float(density.rms()) / float(found["one"][layer].rms()) - 1) for layer, density in found["blocks"].items()
    ]
    gain = medians["one"] / medians["blocks"]
    cells = [f"{medians[way]:.2f}" for way in ways]
    count = sum(p.numel() for p in model.parameters())
    return [name, f"{count:,}", str(len(found["blocks"])), *cells, f"{gain:.2f}", f"{max(differences):.0e}"]


def main() -> None:
    """Run the cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="llama-64|llama-256", help="names joined by |")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measurement = {"probes": options.probes, "steps": options.steps}
    names, device = options.models.split("|"), torch.device(options.device)
    table = markdown(HEADER, [row(name, measurement, options.repeats, device) for name in names])
    print(table)
    if options.out:
        options.out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
