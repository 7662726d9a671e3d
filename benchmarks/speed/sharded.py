"""Hessian-vector products of models sharded by FSDP2: their error, their time against a gradient, and memory a rank.

    torchrun --nproc-per-node 2 benchmarks/speed/sharded.py [--shapes 1.1B 3.0B] [--out FILE]

The models are Llamas with random weights, in float32 with eager attention, sharded layer by layer. Every rank has its
own batch of 2 x 512 tokens. For each shape it measures

* the Hessian-vector product against that of the whole model on one GPU with the batches of all ranks, where it fits,
* the time of a product and of a gradient under the same sharding, through FSDP2's own hooks (medians),
* a central difference of those gradients along the same vector: its error and its time,
* the memory that a rank takes, against the plan made before,
* one density of one probe vector, with the intervals that it gives,
* the same with the weights of one layer at a time (graph="gather layers"), and with engine="differences".

On a CPU memory is counted by the tensors that are alive. Without two GPUs it says so and ends.
`--shapes tiny --device cpu` runs the same on CPU ranks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

Row = dict[str, Any]
LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
LLAMA += ("vocab_size",)
SHAPES = {
    "tiny": (32, 48, 2, 2, 1, 64),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
    "3.0B": (3072, 8192, 28, 24, 8, 32000),
    "6.7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
}
COMPARED = ("tiny", "1.1B")  # shapes whose products are compared with those of one GPU
LAYERED = ("6.7B", "13B")  # shapes whose whole weights and vectors do not fit beside a graph
WAYS = {"whole weights": {}, "layers in turn": {"graph": "gather layers"}, "differences": {"engine": "differences"}}
STEP = 1e-2  # of the central difference, relative to the norm of the weights


def build(shape: str, device: torch.device) -> nn.Module:
    """The Llama of this shape, with the random weights of seed 0."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(zip(LLAMA, SHAPES[shape], strict=True))
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=512, attn_implementation="eager")
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def shard(model: nn.Module) -> nn.Module:
    """The model with its layers, and the rest, sharded by FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module)
    return fully_shard(model)


def batch_of(rank: int, shape: str, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of random tokens, another one for each rank."""
    rows, length = (2, 512) if shape != "tiny" else (2, 16)
    ids = torch.randint(SHAPES[shape][-1], (rows, length), generator=torch.Generator().manual_seed(rank)).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median seconds of a call."""
    found = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - started)
    return median(found[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(size: float) -> float:
    return round(size / 2**30, 3)


class Memory:
    """The bytes that this rank has allocated since a moment; on a CPU those of tensors that are alive."""

    def __init__(self, device: torch.device):
        from spectra.backend.memory import AllocationMeter

        self.device, self.before = device, 0
        self.meter = AllocationMeter() if device.type != "cuda" else None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated(device)
        self.reset()

    def __enter__(self) -> Memory:
        if self.meter is not None:
            self.meter.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.meter is not None:
            self.meter.__exit__(*reason)

    def reset(self) -> None:
        if self.meter is not None:
            self.meter.peak = self.meter.live
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        return self.meter.peak if self.meter is not None else torch.cuda.max_memory_allocated(self.device) - self.before


def gradient_of_training(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """A gradient as a training computes it, through FSDP2's hooks, into `.grad`."""
    for parameter in model.parameters():
        parameter.grad = None
    model(**batch).loss.backward()


def difference(model: nn.Module, batch: dict[str, torch.Tensor], direction: list[torch.Tensor]) -> list[torch.Tensor]:
    """A central difference of the gradients along a direction, in the shards of the parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights, along = (sum(float(norm_of(t)) ** 2 for t in tensors) ** 0.5 for tensors in (parameters, direction))
    h = STEP * weights / along
    found: list[torch.Tensor] = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * h)
        gradient_of_training(model, batch)
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=-sign * h)
        gradients = [p.grad.detach().clone() for p in parameters]
        found = gradients if sign == 1 else [(a - b) / (2 * h) for a, b in zip(found, gradients, strict=True)]
    return found


def norm_of(tensor: torch.Tensor) -> torch.Tensor:
    """The norm of a tensor, whole also where it is sharded."""
    found = torch.linalg.vector_norm(tensor.detach())
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sharded tensors as one whole vector."""
    return torch.cat([t.detach().full_tensor().reshape(-1) for t in tensors])


def measure(shape: str, device: torch.device, steps: int) -> Row:
    """One row of results."""
    import spectra
    from spectra import distributed
    from spectra.backend.random_vectors import probe_vector

    rank, count = distributed.rank(), distributed.rank_count()
    model = build(shape, device)
    n = sum(p.numel() for p in model.parameters())
    batches = [batch_of(number, shape, device) for number in range(count)]
    expected = None
    if shape in COMPARED:
        with spectra.HessianOperator(model, batches, engine="reverse", strict=False) as whole:
            whole.trust({})
            expected = whole @ probe_vector(whole, seed=0, index=0)
    model = shard(model)
    batch = batches[rank]
    row: Row = {"shape": shape, "parameters": n, "ranks": count, "tokens a rank": batch["input_ids"].numel()}
    gradient = seconds(lambda: gradient_of_training(model, batch), device)
    for parameter in model.parameters():
        parameter.grad = None
    row["gradient, ms"] = round(1e3 * gradient, 1)
    for name, options in WAYS.items():
        if shape in LAYERED and name == "whole weights":
            continue
        row[name] = measure_way(model, batch, device, steps, options, expected, gradient)
    layers = WAYS["layers in turn"] if shape in LAYERED else {}
    op = spectra.HessianOperator(model, [batch], **{"engine": "reverse", **layers})
    row |= against_difference(op, model, batch, device)
    return row


def measure_way(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    steps: int,
    options: dict[str, str],
    expected: torch.Tensor | None,
    gradient: float,
) -> Row:
    """Error, seconds and memory of products in one way, and a density."""
    import spectra
    from spectra.backend.random_vectors import probe_vector
    from spectra.backend.vectors import norm

    row: Row = {}
    op = spectra.HessianOperator(model, [batch], **{"engine": "reverse", "graph": "keep", **options})
    planned = spectra.plan(op, probes=1, steps=steps, reorthogonalize="none")
    op.refresh()
    with Memory(device) as memory:
        started = time.perf_counter()
        vector = probe_vector(op, seed=0, index=0)
        product = op @ vector
        wait(device)
        row["first product with checks, s"] = round(time.perf_counter() - started, 2)
        row["peak in checks, GiB"] = gib(memory.peak)
        memory.reset()
        density = spectra.slq(op, probes=1, steps=steps, reorthogonalize="none")
        row |= {"peak, GiB": gib(memory.peak), "planned, GiB": gib(planned.peak)}
        row |= {"peak / plan": round(memory.peak / planned.peak, 3), "plan": str(planned)}
    if expected is not None:
        assert op.shards is not None
        apart = product - op.shards.take(expected)
        row["error against one device"] = norm(apart, over=op.shards) / norm(product, over=op.shards)
    took = seconds(lambda: op @ vector, device)
    row |= {"product, ms": round(1e3 * took, 1), "product / gradient": round(took / gradient, 2)}
    for name, estimate in (
        ("rms", density.rms()),
        ("negative share", density.negative_share()),
        ("lambda max", density.lambda_max()),
        ("lambda min", density.lambda_min()),
    ):
        row[name] = [estimate.value, estimate.low, estimate.high, estimate.resolved]
    row |= {"stated error": op.precision_error(), "checks": op.checks, "notes": op.notes}
    op.close()
    return row


def against_difference(op: Any, model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> Row:
    """The error of a central difference of gradients against the exact product, and its seconds."""
    from spectra.backend.vectors import norm

    torch.manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p.detach()) for p in parameters]
    vector = op.shards.take(flat(direction))
    exact = op @ vector
    op.close()
    wait(device)
    started = time.perf_counter()
    found = difference(model, batch, direction)
    wait(device)
    took = time.perf_counter() - started
    apart = op.shards.take(flat(found)) - exact
    error = norm(apart, over=op.shards) / norm(exact, over=op.shards)
    return {"difference, error": error, "difference, ms": round(1e3 * took, 1)}


def main() -> None:
    """Measure each shape, print the rows last, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["1.1B", "3.0B"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps of the density")
    parser.add_argument("--out", type=Path, default=Path("sharded.json"))
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        print("skipped: two GPUs are needed")
        return
    from spectra import distributed

    device = distributed.start(device=options.device, minutes=3)
    rows, first = [], distributed.rank() == 0
    for shape in options.shapes:
        try:
            rows.append(measure(shape, device, options.steps))
        except torch.OutOfMemoryError as error:
            rows.append({"shape": shape, "error": str(error)})
            break  # the ranks may have stopped at different places
        if first:
            print(json.dumps(rows[-1], indent=1), flush=True)
            options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if first:
        options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
        for row in rows:
            print({key: value for key, value in row.items() if key not in ("plan", "checks", "notes")})
    distributed.stop()


if __name__ == "__main__":
    main()
