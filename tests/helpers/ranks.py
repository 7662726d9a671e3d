"""What the ranks of tests run, under torchrun: python ranks.py OUT TASK..."""

import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn.parallel import DistributedDataParallel

import spectra
from spectra import distributed
from spectra.backend import ranks

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


def alone():
    """A rank that measures alone is refused what would wait for the other, on its own thread, and for that time."""
    ones, refused, wrapped = torch.ones(2), [], DistributedDataParallel(torch.nn.BatchNorm1d(2))
    if distributed.rank() == 0:
        with ranks.without_collectives("the loss"):
            for call in (
                lambda: torch.distributed.all_reduce(ones),
                torch.distributed.barrier,
                lambda: torch.distributed.all_gather_object([None, None], 1),
                lambda: wrapped(ones.expand(3, 2)),  # which sends its buffers
            ):
                with pytest.raises(
                    spectra.InputError, match=r"the loss calls torch\.distributed.*one rank measures alone"
                ):
                    call()
                refused.append(call)
            thread = threading.Thread(target=torch.distributed.all_reduce, args=(ones,))
            thread.start()
            thread.join()
        assert len(refused) == 4
    else:
        torch.distributed.all_reduce(ones)
    assert ones.tolist() == [2, 2]
    torch.distributed.all_reduce(ones)
    assert ones.tolist() == [4, 4]


def trained(out):
    """A Trainer on two ranks with and without the callback, whose compute_loss asks the other rank on request."""
    import transformers

    class Own(transformers.Trainer):
        gathers = False

        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss = self.model_wrapped(**inputs).loss
            return loss + (0 * self.accelerator.gather(loss.detach()).mean() if self.gathers else 0)

    rows = torch.randint(2, tiny_models.VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    found, records = {}, {}
    for name, kind in (
        ("stock", transformers.Trainer),
        ("own", Own),
        ("gathers", type("G", (Own,), {"gathers": True})),
    ):
        for watched in (False, True):
            transformers.set_seed(3)
            model = tiny_models.causal_lm("llama", dtype=torch.float32)
            settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
            settings |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 1e-2}
            arguments = transformers.TrainingArguments(output_dir=str(out / name), ddp_timeout=60, **settings)
            options = {"probes": 1, "steps": 3, "deflate": 0, "count_products": 0, "params": "*mlp*"}
            callback = spectra.SpectrumCallback(every=2, **options)
            trainer = kind(model, arguments, train_dataset=data, callbacks=[callback] if watched else [])
            trainer.train()
            found[name, watched] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(found[name, False], found[name, True])
        records[name] = callback.probe.records if callback.probe is not None else []
    if arguments.process_index == 0:
        assert all([record.is_measured for record in records[name]] == [True] * 3 for name in ("stock", "own"))
        assert ["torch.distributed.all_gather" in record.reason for record in records["gathers"]] == [True] * 3
    else:
        assert not any(records.values())


def measure(out):
    """What each rank finds, and a run that both measure."""
    for spread in ("probes", "batches"):
        np.savez(out / f"{spread}-{distributed.rank()}.npz", **measured(spread=spread))
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches(BATCHES)
    options = {"probes": 3, "steps": 10, "deflate": 2, "count_products": 100}
    probe = spectra.SpectrumProbe(model, batches, out=out / "run", spread="batches", **options)
    probe.measure(0)
    assert len(probe.records) == 1


def die():
    """The second rank ends while the first waits for it."""
    op = spectra.DiagonalOperator(np.arange(1.0, 2000.0))
    if distributed.rank() == 1:
        raise SystemExit(3)
    spectra.slq(op, probes=2, steps=5, spread="probes")


def main(out, *tasks):
    calls = {"measure": partial(measure, Path(out)), "alone": alone, "trainer": partial(trained, Path(out)), "die": die}
    distributed.start(device="cpu", minutes=0.5)
    for task in tasks:
        calls[task]()
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
