"""Exact Hessian spectra of small trained language models, as a fixture of eigenvalues.

    python benchmarks/trust/language_models.py [--bits full,1,1.58,2,3,4] [--out FILE]

A tiny Llama whose tokens are bytes is trained in full precision on the source of the standard library, quantized,
trained further, and reset (W moved by alpha = .4 toward Q(W)). Before and after the reset, the Hessian of its linear
layers is formed from n Hessian-vector products in float64 and diagonalised. Only the eigenvalues are kept: estimates
depend on nothing else, so diag(eigenvalues) stands for the Hessian.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import qat
import spectra
from qat.study.config import SmallLlamaConfig
from qat.study.models import small_llama
from qat.text.corpus import Blocks, load_text
from qat.training.config import TrainConfig

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "language_models.safetensors"
LAYERS = {"full": 3, "1": 2, "1.58": 1, "2": 2, "3": 1, "4": 1}  # by bit-width; 2,176 parameters a layer
LENGTH = 32
ALPHA = 0.4
SEED = 0
COLUMNS = 64  # of the identity, multiplied at once
FULL = TrainConfig(
    steps=1500, batch_size=16, learning_rate=1e-2, schedule="cosine", warmup=0.05, evaluate_every=1500, seed=SEED
)
QUANTIZED = TrainConfig(
    steps=600, batch_size=16, learning_rate=3e-3, schedule="constant", evaluate_every=600, seed=SEED + 1
)


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues (n,) of one Hessian, ascending, and facts about it, such as the loss."""

    eigenvalues: np.ndarray
    facts: dict[str, Any]


def byte_blocks(documents: tuple[str, ...], size: int) -> Blocks:
    """The first `size` bytes of the documents in blocks; each byte is a token."""
    data = "\n".join(documents).encode()[:size]
    return Blocks(torch.frombuffer(bytearray(data), dtype=torch.uint8).long(), LENGTH)


def exact_spectrum(op: spectra.HessianOperator) -> Spectrum:
    """Every eigenvalue of the operator, from its products with the columns of the identity.

    Rows that are exactly zero (clipped weights) are zero eigenvalues, and are left out of the eigensolver. The facts
    hold the asymmetry of the matrix, and the difference of the largest eigenvalue from the one that topk finds.
    """
    n = op.shape[0]
    matrix = np.empty((n, n))
    for first in range(0, n, COLUMNS):
        columns = torch.zeros(n, min(COLUMNS, n - first), dtype=op.dtype)
        columns.diagonal(-first).fill_(1)
        matrix[:, first : first + COLUMNS] = (op @ columns).numpy()
    gap = float(np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix))
    touched = matrix.any(axis=1)
    eigenvalues = np.zeros(n)
    reduced = matrix[np.ix_(touched, touched)]
    eigenvalues[touched] = scipy.linalg.eigvalsh((reduced + reduced.T) / 2)
    eigenvalues.sort()
    largest = float(spectra.topk(op, 1, which="LM", tol=1e-8).values[0])
    exact = float(eigenvalues[np.abs(eigenvalues).argmax()])
    assert abs(largest - exact) <= 1e-5 * abs(exact), f"topk finds {largest}, the dense eigensolver {exact}"
    facts = {"n": n, "loss": op.loss(), "symmetry_gap": gap, "topk_difference": abs(largest - exact) / abs(exact)}
    return Spectrum(eigenvalues, facts)


def spectra_of(bits: str) -> Iterator[tuple[str, Spectrum]]:
    """The Hessians of one bit-width by name, such as "2bit-ste-after-reset", or "full"."""
    from qat.training.train import train  # takes seconds to import, and is needed only here

    text = load_text()
    blocks, validation = byte_blocks(text.train, 4_000_000), byte_blocks(text.validation, 200_000)
    sequences = validation.evenly(8).blocks
    batches = [{"input_ids": sequences, "labels": sequences}]
    shape = SmallLlamaConfig(
        hidden_size=16, intermediate_size=24, layers=LAYERS[bits], heads=2, positions=LENGTH, seed=SEED
    )
    model = small_llama(256, shape)
    (_, untrained), (_, trained) = train(model, blocks, validation.evenly(128), FULL, device="cpu").curve
    losses = {"validation_loss_untrained": untrained, "validation_loss_full_precision": trained}
    if bits == "full":
        yield "full", with_facts(spectra.HessianOperator(model, batches, "*_proj.weight", precision="float64"), losses)
        return
    qat.quantize_model(model, qat.QuantConfig(bits=float(bits)))
    (_, quantized), (_, trained) = train(model, blocks, validation.evenly(128), QUANTIZED, device="cpu").curve
    losses |= {"validation_loss_quantized": quantized, "validation_loss_quantized_trained": trained}
    before = copy.deepcopy(model)
    qat.interpolate_(model, alpha=ALPHA)
    for mode in ("ste", "latent"):
        first, second = (qat.hessian_operator(at, batches, mode, precision="float64") for at in (before, model))
        name = f"{bits}bit-{mode}"
        yield f"{name}-before-reset", with_facts(first, losses)
        if same_products(first, second):
            print(f"{name}-after-reset: the same matrix as before the reset, left out", flush=True)
        else:
            yield f"{name}-after-reset", with_facts(second, losses)


def with_facts(op: Any, facts: dict[str, Any]) -> Spectrum:
    found = exact_spectrum(op)
    op.close()
    return Spectrum(found.eigenvalues, {**found.facts, **facts})


def same_products(first: Any, second: Any) -> bool:
    """Whether the products of two operators with a random vector are equal, bit for bit.

    They are for the ste Hessian if the reset moved no weight across a clipping bound.
    """
    vector = torch.randn(first.shape[0], dtype=first.dtype, generator=torch.Generator().manual_seed(SEED))
    return bool(torch.equal(first @ vector, second @ vector))


def load(path: Path = FIXTURE) -> dict[str, Spectrum]:
    """The spectra in a fixture file, by name."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        return {name: Spectrum(file.get_tensor(name), facts[name]) for name in facts}


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact Hessian spectra of small trained language models.")
    parser.add_argument("--bits", default=",".join(LAYERS), help="full and bit-widths, comma-separated")
    parser.add_argument("--out", type=Path, default=FIXTURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found: dict[str, Spectrum] = {}
    for bits in options.bits.split(","):
        for name, spectrum in spectra_of(bits):
            values, facts = spectrum.eigenvalues, spectrum.facts
            found[name] = spectrum
            print(
                f"{name}: n = {facts['n']}, [{values[0]:.3g}, {values[-1]:.3g}], {(values < 0).mean():.3f} negative, "
                f"{(values == 0).mean():.3f} exactly zero, symmetry gap {facts['symmetry_gap']:.1e}, topk within "
                f"{facts['topk_difference']:.1e}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            print("    " + ", ".join(f"{key} {value:.3f}" for key, value in facts.items() if "loss" in key), flush=True)
    made_with = {
        "spectra": spectra.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "seed": str(SEED),
        "alpha": str(ALPHA),
    }
    options.out.parent.mkdir(exist_ok=True)
    facts_of = {name: spectrum.facts for name, spectrum in found.items()}
    save_file(
        {name: spectrum.eigenvalues for name, spectrum in found.items()},
        options.out,
        metadata={"facts": json.dumps(facts_of), **made_with},
    )


if __name__ == "__main__":
    main()
