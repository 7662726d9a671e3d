"""Memory and time of a product where graphs are kept, and where parts of them are computed again.

    python benchmarks/speed/recompute.py MODEL_FOLDER TEXT [--shapes 1x2048,4x512] [--out FILE]

For each shape (rows x tokens) and each `graph=` of a HessianOperator in the linear weights: what the kept graphs hold,
the peak with a product, the median time of a product. Needs a GPU, whose allocator counts the bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import spectra

GRAPHS = ("keep", "recompute", "recompute layers")
REPEATS = 5


def is_linear(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


def measure(model: Any, ids: torch.Tensor, graph: str) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with spectra.HessianOperator(model, [{"input_ids": ids, "labels": ids}], params=is_linear, graph=graph) as op:
        op.preflight()
        vector = torch.randn(op.shape[0], device=ids.device)
        for _ in range(5):  # an engine is picked at the fourth product of a single vector
            op @ vector
        gc.collect()
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            op @ vector
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() - before
        return {
            "graph": graph,
            "engine": op.engine_used,
            "kept_gib": held / 2**30,
            "peak_gib": peak / 2**30,
            "milliseconds": 1e3 * statistics.median(times),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--shapes", default="1x2048,4x512")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed: its allocator counts the bytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).cuda()
    results = []
    for shape in options.shapes.split(","):
        rows, length = (int(part) for part in shape.split("x"))
        text = options.text.read_text()[: 12 * rows * length]
        ids = torch.tensor(tokenizer(text)["input_ids"][: rows * length]).view(rows, length).cuda()
        results += [{"shape": shape} | measure(model, ids, graph) for graph in GRAPHS]
        print(*results[-len(GRAPHS) :], sep="\n", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
