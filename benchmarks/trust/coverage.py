"""Coverage of the intervals of every quantity, on every family of spectra and on language models, over many seeds.

    python benchmarks/trust/coverage.py [--seeds 20] [--dimension 1e4,1e5] [--processes 16] [--out FILE]
    python benchmarks/trust/coverage.py --read FILE [FILE ...] [--figure FILE]

For each case: the truth, our estimate, its interval and the Hessian-vector products (HVPs) spent. Beside it, the
negative share as the weight of quadrature nodes below zero, from PyHessian and from curvlinops, each with the same
number of HVPs and with the recipe of the WinQ paper (20 probe vectors of 60 steps, no reorthogonalisation, float32).

--out gets a line for each case and seed as results come. A run that was interrupted can be read with --read.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import figure
import peers
import tables
import torch
from cases import Case, bulks, language_model_cases
from families import BULKS
from ways import WAYS, Row, measure

from qat.study.workers import available_cores

Job = tuple[Case, int, frozenset[str]]
LANGUAGE_MODELS = "language-models"


def result_of(job: Job) -> dict[str, Any]:
    """The rows of one case with one seed, and the seconds of processor time they took."""
    started = time.process_time()
    case, seed, ways = job
    found = measure(case.values(seed), case.probe_seed(seed), ways)
    rows = [{**asdict(case), "label": case.label, "seed": seed, **row} for row in found]
    return {"seconds": round(time.process_time() - started, 2), "rows": rows}


def results(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Yield the result of each job when it is done, from a pool where there is more than one process."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from map(result_of, jobs)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # read when a worker loads its libraries
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(result_of, job) for job in jobs]):
            yield done.result()


def gather(jobs: list[Job], processes: int, out: Path | None) -> list[Row]:
    """All rows. Prints a line after every tenth of the work, and writes a line to `out` for every job."""
    rows: list[Row] = []
    started, every, spent = time.perf_counter(), max(len(jobs) // 10, 1), 0.0
    with open(out or os.devnull, "w", encoding="utf-8") as file:
        for count, found in enumerate(results(jobs, processes), start=1):
            rows += found["rows"]
            spent += found["seconds"]
            file.write(json.dumps(found) + "\n")
            file.flush()
            if count % every == 0 or count == len(jobs):
                seconds = time.perf_counter() - started
                print(f"{count} of {len(jobs)} done, {seconds:.0f} s, {spent:.0f} s of processor time", flush=True)
    return in_order(rows)


def in_order(rows: list[Row]) -> list[Row]:
    """The rows sorted: bulks first, then language models."""
    bulks = list(BULKS)

    def place(row: Row) -> tuple[Any, ...]:
        if row["radius"] is None:
            return (1, 0, 0, 0, 0, row["label"])
        return (0, row["dimension"], bulks.index(row["family"]), row["radius"], row["zeros"], row["label"])

    return sorted(rows, key=place)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def make_jobs(options: argparse.Namespace) -> list[Job]:
    families = [name for name in options.families.split(",") if name != LANGUAGE_MODELS]
    dimensions = [int(number) for number in numbers(options.dimension)]
    cases = bulks(families, dimensions, numbers(options.radii), numbers(options.zeros))
    if LANGUAGE_MODELS in options.families.split(","):
        cases += language_model_cases()
    ways = frozenset(options.ways.split(","))
    cases.sort(key=lambda case: -case.dimension)  # the long ones first, so that processes end at about the same time
    return [
        (case, seed, ways if seed < options.peer_seeds else ways - {"peers"})
        for seed, case in itertools.product(range(options.seeds), cases)
    ]


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of earlier --out files, also of compressed ones that end in .gz."""
    rows = []
    for path in paths:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            rows += [row for line in file for row in json.loads(line)["rows"]]
    return in_order(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the intervals, beside node counts and other libraries.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--peer-seeds", type=int, default=1, help="measure other libraries with the first so many seeds only"
    )
    parser.add_argument("--dimension", default="1e4", help="sizes of the constructed spectra, comma-separated")
    parser.add_argument("--families", default=",".join([*BULKS, LANGUAGE_MODELS]))
    parser.add_argument("--radii", default="27,1000", help="their largest outliers")
    parser.add_argument("--zeros", default="0,0.43", help="their shares of exact zeros")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument(
        "--processes",
        type=int,
        default=available_cores(),
        help="processes; each measures one case with one seed at a time",
    )
    parser.add_argument(
        "--read", type=Path, nargs="+", help="read the rows from earlier --out files instead of measuring"
    )
    parser.add_argument("--out", type=Path, help="file for every row, as lines of JSON")
    parser.add_argument("--figure", type=Path, help="draw the negative shares, as a PNG or PDF")
    options = parser.parse_args()
    if options.read:
        rows = read(options.read)
    else:
        for package, _ in peers.PEERS.values():
            if "peers" in options.ways and peers.missing(package):
                print(peers.missing(package))
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy"))
        print(f"Python {platform.python_version()}, {libraries}, {options.processes} processes", flush=True)
        rows = gather(make_jobs(options), options.processes, options.out)
    print(tables.coverage(rows))
    print(tables.by_family(rows))
    print(tables.outside(rows))
    print(tables.errors(rows))
    print(tables.ordinary(rows))
    if options.figure:
        figure.draw(rows, options.figure)


if __name__ == "__main__":
    main()
