"""What the ranks of tests/spectra/backend/test_ranks.py run, under torchrun: python ranks.py TASK OUT."""

import sys
from pathlib import Path

import numpy as np
import tiny_models
import torch

import spectra
from spectra import distributed

BATCHES = ((8, 5, 3), (7, 4), (6,), (8, 8))


def measured(*, spread):
    """Everything that a spread may change, on the tiny Llama."""
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches(BATCHES)
    op = spectra.HessianOperator(model, batches, engine="reverse", spread="batches" if spread == "batches" else "none")
    over_probes = "probes" if spread == "probes" else "none"
    density = spectra.slq(op, probes=5, steps=20, seed=3, deflate=3, spread=over_probes)
    vector = torch.linspace(-1, 1, op.shape[0], dtype=torch.float64)
    return {
        "nodes": density.nodes,
        "weights": density.weights,
        "zeros": np.array(density.zero_share()),
        "product": (op @ vector).numpy(),
        "gradient": op.gradient().numpy(),
        "loss": np.array(op.loss()),
    }


def main(task, out):
    distributed.start(device="cpu", minutes=0.5)
    if task == "die":
        op = spectra.DiagonalOperator(np.arange(1.0, 2000.0))
        if distributed.rank() == 1:
            raise SystemExit(3)
        spectra.slq(op, probes=2, steps=5, spread="probes")
    else:
        for spread in ("probes", "batches"):
            np.savez(Path(out) / f"{spread}-{distributed.rank()}.npz", **measured(spread=spread))
        model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches(BATCHES)
        probe = spectra.SpectrumProbe(model, batches, probes=3, steps=10, out=Path(out) / "run", spread="batches")
        probe.measure(0)
        assert len(probe.records) == 1
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
