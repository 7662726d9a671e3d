"""Do the intervals cover? Every quantity, on every family of spectra, over many seeds.

    python benchmarks/trust/coverage.py [--seeds 20] [--dimension 10000] [--out benchmarks/trust/coverage.json]

For each case: the truth, our estimate, its interval, the products it took; and what a hard count on quadrature nodes
gives with the same products and with the recipe of the WinQ paper (20 Gaussian probes of 60 steps, no
reorthogonalisation, float32).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from families import BULKS, ORDINARY, eigenvalues

import spectra

NEAR_ZERO = 1.5e-3
BUDGET = 1500


def truths(values: np.ndarray) -> dict[str, float]:
    """Every quantity, from the eigenvalues themselves."""
    squares, sizes, negative = values**2, np.abs(values), values < 0
    return {
        "negative_share": float(negative.mean()),
        "near_zero_share": float((sizes < NEAR_ZERO).mean()),
        "trace": float(values.sum()),
        "frobenius": float(np.sqrt(squares.sum())),
        "rms": float(np.sqrt(squares.mean())),
        "negative_energy_share": float(squares[negative].sum() / squares.sum()),
        "negative_magnitude_share": float(sizes[negative].sum() / sizes.sum()),
        "lambda_max": float(values.max()),
        "lambda_min": float(values.min()),
    }


def estimates(values: np.ndarray, seed: int, ways: set[str]) -> dict[str, dict[str, spectra.Estimate]]:
    """By way of measuring: the default call, a deflated one, the adaptive share, and the three traces."""
    op = spectra.DiagonalOperator(values)
    found: dict[str, dict[str, spectra.Estimate]] = {}
    if "slq" in ways:
        found["slq 10 x 100"] = spectra.probe.summarize(spectra.slq(op, seed=seed), NEAR_ZERO)
        deflated = spectra.slq(op, probes=4, steps=100, seed=seed, deflate=20)
        found["slq 4 x 100, 20 deflated"] = spectra.probe.summarize(deflated, NEAR_ZERO)
    if "resolve" in ways:
        found["resolve 1500"] = {
            "negative_share": spectra.resolve(op, budget=BUDGET, seed=seed),
            "near_zero_share": spectra.resolve(op, share="near_zero", tol=NEAR_ZERO, budget=BUDGET, seed=seed),
        }
    if "trace" in ways:
        for method in ("hutchinson", "hutch++", "xtrace"):
            found[f"{method} 60"] = {"trace": spectra.trace(op, method=method, probes=60, seed=seed)}
    return found


def hard_count(values: np.ndarray, *, probes: int, steps: int, seed: int, single: bool) -> float:
    """The negative share as the nodes' weights below zero, from a recurrence without reorthogonalisation."""
    op = spectra.DiagonalOperator(values.astype(np.float32) if single else values)
    density = spectra.slq(op, probes=probes, steps=steps, seed=seed, reorthogonalize="none")
    return float(np.where(density.nodes < 0, density.weights, 0).sum(axis=1).mean())


def run(
    seeds: int, dimension: int, bulks: list[str], radii: list[float], zero_shares: list[float], ways: set[str]
) -> dict[str, Any]:
    rows = []
    for bulk, radius, zeros in itertools.product(bulks, radii, zero_shares):
        for seed in range(seeds):
            values = eigenvalues(bulk, n=dimension, radius=radius, zeros=zeros, seed=seed)
            truth = truths(values)
            probe_seed = zlib.crc32(f"{bulk} {radius} {zeros} {seed}".encode())  # the families' probes are independent
            case = {"bulk": bulk, "radius": radius, "zeros": zeros, "seed": seed}
            for way, found in estimates(values, probe_seed, ways).items():
                for quantity, estimate in found.items():
                    rows.append(
                        {**case, "way": way, "quantity": quantity, "truth": truth[quantity], **estimate.to_dict()}
                    )
            if "counts" not in ways:
                continue
            counts = {
                "hard count 10 x 150": hard_count(values, probes=10, steps=150, seed=probe_seed, single=False),
                "paper 20 x 60": hard_count(values, probes=20, steps=60, seed=probe_seed, single=True),
            }
            for way, value in counts.items():
                rows.append(
                    {**case, "way": way, "quantity": "negative_share", "truth": truth["negative_share"], "value": value}
                )
        print(f"{bulk}, radius {radius:g}, {zeros:.0%} zeros: done", flush=True)
    return {"dimension": dimension, "seeds": seeds, "rows": rows}


def covered(row: dict[str, Any]) -> bool:
    return row["low"] <= row["truth"] <= row["high"]


def print_tables(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "low" in row:
            groups[row["way"], row["quantity"]].append(row)
    print(f"\n{'way':26} {'quantity':26} {'cover':>6} {'of resolved':>12} {'worst family':>28} {'resolved':>9}")
    for (way, quantity), group in sorted(groups.items()):
        families: dict[tuple[str, float, float], list[bool]] = defaultdict(list)
        for row in group:
            families[row["bulk"], row["radius"], row["zeros"]].append(covered(row))
        worst = min(families, key=lambda family: np.mean(families[family]))
        resolved = [row for row in group if row["resolved"]]
        of_resolved = f"{np.mean([covered(row) for row in resolved]):.3f}" if resolved else "-"
        print(
            f"{way:26} {quantity:26} {np.mean([covered(row) for row in group]):6.3f} {of_resolved:>12} "
            f"{worst[0] + f' R{worst[1]:g} {worst[2]:.0%}':>20} {np.mean(families[worst]):7.2f} "
            f"{len(resolved) / len(group):9.2f}"
        )
    print(
        f"\nnegative share, mean absolute error\n{'bulk':12} {'radius':>6} {'zeros':>5}  "
        + "way: error (resolved, products)"
    )
    cases = sorted({(row["bulk"], row["radius"], row["zeros"]) for row in rows})
    for bulk, radius, zeros in cases:
        cells = []
        for way in ("resolve 1500", "hard count 10 x 150", "paper 20 x 60"):
            group = [
                r
                for r in rows
                if (r["bulk"], r["radius"], r["zeros"], r["way"], r["quantity"])
                == (bulk, radius, zeros, way, "negative_share")
            ]
            if not group:
                continue
            error = np.mean([abs(r["value"] - r["truth"]) for r in group])
            extra = (
                f" ({np.mean([r['resolved'] for r in group]):.2f}, {np.mean([r['products'] for r in group]):.0f})"
                if "low" in group[0]
                else ""
            )
            cells.append(f"{way}: {error:.3f}{extra}")
        print(f"{bulk:12} {radius:6g} {zeros:5.0%}  " + "   ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--dimension", type=int, default=10_000)
    parser.add_argument("--bulks", default=",".join(BULKS))
    parser.add_argument("--radii", default="27,1000")
    parser.add_argument("--zeros", default="0,0.1,0.43")
    parser.add_argument("--ways", default="slq,resolve,trace,counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    radii, zeros = ([float(x) for x in text.split(",")] for text in (options.radii, options.zeros))
    result = run(options.seeds, options.dimension, options.bulks.split(","), radii, zeros, set(options.ways.split(",")))
    print_tables(result["rows"])
    ordinary = [
        r
        for r in result["rows"]
        if r["way"] == "resolve 1500"
        and r["quantity"] == "negative_share"
        and r["bulk"] in ORDINARY
        and r["radius"] == 27
    ]
    if ordinary:
        print(
            f"\nordinary bulks at R = 27: resolved {np.mean([r['resolved'] for r in ordinary]):.3f}, "
            f"mean error {np.mean([abs(r['value'] - r['truth']) for r in ordinary]):.4f}"
        )
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=None) + "\n")


if __name__ == "__main__":
    main()
