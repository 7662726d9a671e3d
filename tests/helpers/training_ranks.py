"""What the ranks of a test train, under torchrun: python training_ranks.py OUT."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import qat
from qat.text.corpus import Blocks
from qat.training.config import TrainConfig
from qat.training.ranks import rank
from qat.training.train import train
from spectra.backend.errors import NonFiniteError
from spectra.runs.folder import Run

BASE = TrainConfig(steps=4, batch_size=8, learning_rate=1e-2, evaluate_every=2)
WAYS = {
    "whole": {},
    "parts": {"accumulate": 2},
    "checkpointed": {"activation_checkpointing": True},
    "own": {"rank_noise": "own"},
}


def blocks(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Blocks(torch.randint(2, tiny_models.VOCABULARY, (count * 8,), generator=generator), 8)


def trained(out):
    """The weights after a training with noise and resets, for each way; the first rank records what happens."""
    found = {}
    for name, changes in WAYS.items():
        model = tiny_models.causal_lm("llama", dtype=torch.float32)
        qat.quantize_model(model, qat.QuantConfig(bits=2))
        run = Run.create(out / name, {}) if rank() == 0 else None
        callbacks = [qat.WinQCallback(every=2, sigma=1e-2)]
        config = replace(BASE, **changes)
        result = train(model, blocks(16, 1), blocks(3, 2), config, run=run, callbacks=callbacks, device="cpu")
        found[name] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()
        found[f"{name} curve"] = np.array(result.curve)
        if run is not None:
            found[f"{name} losses"] = np.array([line["loss"] for line in run.telemetry[1:]])
    return found


def stopped():
    """A weight of the second rank becomes NaN; both ranks stop at the step that has it in its loss."""
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **kwargs):
            if state.global_step == 2 and rank() == 1:
                next(model.parameters()).data.fill_(torch.nan)

    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 3 of 4"):
        train(model, blocks(16, 1), blocks(3, 2), replace(BASE, evaluate_every=4), callbacks=[Poison()], device="cpu")


def main(out):
    np.savez(Path(out) / f"rank-{rank()}.npz", **trained(Path(out)))
    stopped()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
