"""Speedup of several devices: the same density and the same product, by one rank alone and by all together.

    torchrun --nproc-per-node 2 benchmarks/speed/several_devices.py [--device cpu|cuda] [--model 124M] [--out FILE]

Alone, every rank does the whole work on its own device, all at the same time. Together, the ranks share the probe
vectors of a density, or the batches of a product. The two take turns. A time is that of the slowest rank, and the gain
is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import environment, timed, use_all_cores
from models import SIZES, Case, build, random_rows, text_tokens

import spectra
from spectra import distributed

Row = dict[str, Any]


def random_case(name: str, device: torch.device) -> Case:
    """The Llama of this size with the random weights of seed 0, and a batch of text: the same on every rank."""
    size = SIZES[name]
    rows = random_rows(text_tokens(size.vocabulary), size, seed=0)
    return Case(build(name, 16).to(device), next(rows).to(device))


def in_turns(
    alone: Callable[[], torch.Tensor], together: Callable[[], torch.Tensor], *, repeats: int, device: torch.device
) -> Row:
    """The medians of the slowest rank's seconds, their ratio, and the relative difference of the results."""
    found, seconds = [alone(), together()], ([], [])
    for _ in range(repeats):
        for run, samples in zip((alone, together), seconds, strict=True):
            distributed.all_gather(None)  # all ranks start at the same time
            samples.append(max(distributed.all_gather(timed(run, device)[0])))
    one, many = map(median, seconds)
    difference = torch.linalg.norm(found[0] - found[1]) / torch.linalg.norm(found[0])
    return {"alone": one, "together": many, "gain": one / many, "difference": float(difference), "samples": seconds}


def over_probes(case: Case, *, probes: int, steps: int, repeats: int) -> Row:
    """A density whose probe vectors are divided among the ranks. The difference is that of the nodes."""
    with spectra.HessianOperator(case.model, case.batches(), engine="reverse") as op:

        def density(spread: str) -> Callable[[], torch.Tensor]:
            return lambda: torch.as_tensor(spectra.slq(op, probes=probes, steps=steps, spread=spread).nodes)

        row = in_turns(density("none"), density("probes"), repeats=repeats, device=case.device)
    return {"what": f"density, {probes} probe vectors x {steps} steps", "shared": "probe vectors", **row}


def over_batches(case: Case, *, batches: int, repeats: int) -> Row:
    """A product over `batches` batches that are divided among the ranks."""
    vector = case.vector()
    whole = spectra.HessianOperator(case.model, case.batches(batches), engine="reverse")
    part = spectra.HessianOperator(case.model, case.batches(batches), engine="reverse", spread="batches")
    with whole, part:
        row = in_turns(lambda: whole @ vector, lambda: part @ vector, repeats=repeats, device=case.device)
    return {"what": f"product over {batches} batches", "shared": "batches", **row}


def table(rows: list[Row], ranks: int) -> str:
    lines = [
        f"| | shared | one alone, s | {ranks} together, s | gain | relative difference |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['what']} | {row['shared']} | {row['alone']:.4g} | {row['together']:.4g} | {row['gain']:.2f} "
        f"| {row['difference']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How much faster several devices are.")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="124M", choices=sorted(SIZES))
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="every sample, as JSON")
    options = parser.parse_args()
    device = distributed.start(device=options.device)
    use_all_cores()
    case = random_case(options.model, device)
    rows = [
        over_probes(case, probes=options.probes, steps=options.steps, repeats=options.repeats),
        over_batches(case, batches=options.batches, repeats=3 * options.repeats),
    ]
    if distributed.rank() == 0:
        about = environment(device) | {"ranks": distributed.rank_count(), "dimension": case.dimension}
        print(f"{options.model}, {about}\n{table(rows, distributed.rank_count())}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # torch with gloo sometimes aborts while the interpreter shuts down, after all work is done


if __name__ == "__main__":
    main()
