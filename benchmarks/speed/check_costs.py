"""What the checks before an operator's first number cost, in Hessian-vector products.

    python benchmarks/speed/check_costs.py [--models "llama-64|llama-256"] [--repeats 5] [--device cuda] [--out FILE]

Each repeat makes a new operator, and times its first product with the checks, its graphs built again, and plain
products, in this order. The cost of the checks is the first less the second, over the median product. The memory of a
row is measured before and not counted: it is needed with or without checks. On a CPU the time is that of the processor,
which other programs on the machine change little.
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
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spectra

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trust"))

from tables import markdown

PRODUCTS = 5  # timed for the median
HEADER = ["model", "parameters", "batches", "a product, ms", "checks, products", "fewest", "most"]

Case = tuple[nn.Module, list[Any], dict[str, Any]]


def llama(width: int, layers: int, *, batches: int = 1) -> Case:
    """A Llama at its initial weights, on random tokens: 8 rows of 128."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=128,
    )
    tokens = [torch.randint(0, 512, (8 // batches, 128)) for _ in range(batches)]
    return LlamaForCausalLM(config), [{"input_ids": ids, "labels": ids} for ids in tokens], {}


def network(between: type[nn.Module]) -> Case:
    """A network of three wide layers, on 2,048 rows."""
    model = nn.Sequential(nn.Linear(256, 1024), between(), nn.Linear(1024, 1024), between(), nn.Linear(1024, 10))
    return model, [(torch.randn(2048, 256), torch.randint(0, 10, (2048,)))], {"loss": nn.functional.cross_entropy}


CASES: dict[str, Callable[[], Case]] = {
    "llama-64": lambda: llama(64, 2),
    "llama-256": lambda: llama(256, 4),
    "llama-256, 4 batches": lambda: llama(256, 4, batches=4),
    "tanh network": lambda: network(nn.Tanh),
    "ReLU network": lambda: network(nn.ReLU),
}


def cost(case: Case, device: torch.device) -> tuple[float, float, int]:
    """The cost of the checks in products, the seconds of a product, and the number of parameters."""

    now = time.perf_counter if device.type == "cuda" else time.process_time

    def seconds(run: Callable[[], Any]) -> float:
        started = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now() - started

    model, batches, options = case
    with spectra.HessianOperator(model.to(device), batches, engine="reverse", **options) as op:
        op.footprint()
        vector = torch.randn(op.shape[0], device=device)
        first = seconds(lambda: op.multiply_rows(vector[None]))
        op.refresh()
        second = seconds(lambda: op.multiply_rows(vector[None]))
        product = statistics.median(seconds(lambda: op.multiply_rows(vector[None])) for _ in range(PRODUCTS))
        return (first - second) / product, product, op.shape[0]


def row(name: str, repeats: int, device: torch.device) -> list[str]:
    """A line of the table. The first repeat warms up and is not counted."""
    torch.manual_seed(0)
    found = [cost(CASES[name](), device) for _ in range(repeats + 1)][1:]
    costs, products = [c for c, _, _ in found], [p for _, p, _ in found]
    batches = len(CASES[name]()[1])
    middle = [f"{statistics.median(costs):.1f}", f"{min(costs):.1f}", f"{max(costs):.1f}"]
    return [name, f"{found[0][2]:,}", str(batches), f"{1e3 * statistics.median(products):.1f}", *middle]


def main() -> None:
    """Run the cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="|".join(CASES), help="names joined by |")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    table = markdown(HEADER, [row(name, options.repeats, device) for name in options.models.split("|")])
    print(table)
    if options.out:
        options.out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
