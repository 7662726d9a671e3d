"""Do the intervals cover? Every quantity, on every family of spectra and on language models, over many seeds.

    python benchmarks/trust/coverage.py [--seeds 20] [--dimension 1e4,1e5] [--processes 16] [--out FILE] [--figure FILE]

For each case: the truth, our estimate, its interval and the products it took; and the negative share from a hard count
on quadrature nodes, from PyHessian and from curvlinops, each with the same products and with the recipe of the WinQ
paper (20 probes of 60 steps, no reorthogonalisation, float32).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import figure
import peers
import tables
import torch
from cases import Case, bulks, language_model_cases
from families import BULKS
from ways import WAYS, Row, measure

from qat.workers import available_cores

Job = tuple[Case, int, frozenset[str]]
LANGUAGE_MODELS = "language-models"


def rows_of(job: Job) -> list[Row]:
    """What is found of one case with one seed."""
    case, seed, ways = job
    found = measure(case.values(seed), case.probe_seed(seed), ways)
    return [{**asdict(case), "label": case.label, "seed": seed, **row} for row in found]


def results(jobs: list[Job], processes: int) -> Iterator[list[Row]]:
    """The rows of each job as they come, from a pool where there is more than one process."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from map(rows_of, jobs)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # read when a worker loads its libraries
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(rows_of, job) for job in jobs]):
            yield done.result()


def gather(jobs: list[Job], processes: int) -> list[Row]:
    """All rows, in the order of the jobs, with a line for every tenth part of the work."""
    rows: list[Row] = []
    started, every = time.perf_counter(), max(len(jobs) // 10, 1)
    for count, found in enumerate(results(jobs, processes), start=1):
        rows += found
        if count % every == 0 or count == len(jobs):
            print(f"{count} of {len(jobs)} done, {time.perf_counter() - started:.0f} s", flush=True)
    order = {(case.label, seed): place for place, (case, seed, _) in enumerate(jobs)}
    return sorted(rows, key=lambda row: order[row["label"], row["seed"]])


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def make_jobs(options: argparse.Namespace) -> list[Job]:
    families = [name for name in options.families.split(",") if name != LANGUAGE_MODELS]
    dimensions = [int(number) for number in numbers(options.dimension)]
    cases = bulks(families, dimensions, numbers(options.radii), numbers(options.zeros))
    if LANGUAGE_MODELS in options.families.split(","):
        cases += language_model_cases()
    ways = frozenset(options.ways.split(","))
    cases.sort(key=lambda case: -case.dimension)  # the long ones first, so that no process ends with one
    return [
        (case, seed, ways if seed < options.peer_seeds else ways - {"peers"})
        for seed, case in itertools.product(range(options.seeds), cases)
    ]


def read(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Whether the intervals cover, and what hard counts and other libraries give."
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--peer-seeds", type=int, default=3, help="the other libraries see only the first so many seeds"
    )
    parser.add_argument("--dimension", default="1e4", help="sizes of the constructed spectra, comma-separated")
    parser.add_argument("--families", default=",".join([*BULKS, LANGUAGE_MODELS]))
    parser.add_argument("--radii", default="27,1000", help="their largest outliers")
    parser.add_argument("--zeros", default="0,0.1,0.43", help="their shares of exact zeros")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--processes", type=int, default=available_cores(), help="a case with a seed at a time in each")
    parser.add_argument("--read", type=Path, nargs="+", help="take the rows from earlier --out files, measure nothing")
    parser.add_argument("--out", type=Path, help="every row, as JSON")
    parser.add_argument("--figure", type=Path, help="draw the negative shares, as a PNG or PDF")
    options = parser.parse_args()
    if options.read:
        rows = read(options.read)
    else:
        for package, _ in peers.PEERS.values():
            if "peers" in options.ways and peers.missing(package):
                print(peers.missing(package))
        rows = gather(make_jobs(options), options.processes)
    if options.out:
        options.out.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")
    print(tables.coverage(rows))
    print(tables.errors(rows))
    print(tables.ordinary(rows))
    if options.figure:
        figure.draw(rows, options.figure)


if __name__ == "__main__":
    main()
