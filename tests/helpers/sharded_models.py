"""What the ranks of tests of sharded models run, under torchrun: python sharded_models.py TASK OUT."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard

import spectra
from spectra import distributed
from spectra.backend import ranks

BATCHES = ((8, 5, 3), (7, 4), (6,), (8, 8), (2, 9))
MODELS = ("llama", "llama-tied", "gpt2", "qwen3", "llama-2bit")


def language_model(name):
    """A tiny model from a config; "-2bit" quantizes its linear layers."""
    model = tiny_models.causal_lm(name.removesuffix("-2bit"))
    if name.endswith("-2bit"):
        import qat  # with transformers, which the other tasks do not need

        qat.quantize_model(model, qat.QuantConfig(bits=2))
    return model.eval()


def sharded(model):
    """The model with each layer, and the rest, sharded by FSDP2."""
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "Block")):
            fully_shard(module)
    return fully_shard(model)


def options_of(name):
    return {"params": lambda n, p: p.ndim > 1 and not n.endswith("scale")} if name.endswith("2bit") else {}


def noisy_product(model, batches):
    """A product of the mean Hessian over draws of weight noise."""
    from qat.hessian import hessian_operator

    op = hessian_operator(model, batches, "noisy", sigma=1e-2, draws=2)
    return whole(op, op @ part(op, torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)))


def whole(op, vector):
    """A vector of an operator, whole also where the operator's vectors are sharded."""
    return (vector if op.shards is None else op.shards.gather(vector)).numpy()


def part(op, vector):
    return vector if op.shards is None else op.shards.take(vector)


def measured(op, *, everything=False):
    """What an operator gives, with whole vectors."""
    vector = torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)
    density = spectra.slq(op, probes=2, steps=10, seed=3, deflate=2)
    found = {
        "product": whole(op, op @ part(op, vector)),
        "gradient": whole(op, op.gradient()),
        "loss": np.array(op.loss()),
        "nodes": density.nodes,
        "weights": density.weights,
        "zeros": np.array(density.zero_share()),
        "symmetry": np.array([max(op.checks["symmetry_gap"], 1e-6), op.unverified == ""]),
    }
    if everything:
        pairs = spectra.topk(op, 2, which="BE", seed=1)
        traces = [spectra.trace(op, method=method, probes=12, seed=2) for method in ("hutchinson", "hutch++", "xtrace")]
        diagonal = op.diagonal(products=4)
        found |= {
            "topk": pairs.values,
            "squared eigenvectors": whole(op, pairs.vectors.T.contiguous()) ** 2,
            "traces": np.array([[t.value, t.low, t.high] for t in traces]),
            "diagonal": np.array([diagonal.value, diagonal.low, diagonal.high]),
        }
    return found


def models(out):
    """Every model, with batches that are split among the ranks."""
    for name in MODELS:
        batches = tiny_models.token_batches(BATCHES)
        model = sharded(language_model(name))
        mine = batches[distributed.rank() :: distributed.rank_count()]
        with spectra.HessianOperator(model, mine, **options_of(name)) as op:
            found = measured(op, everything=name == "llama")
            if name == "llama":
                share = spectra.resolve(op, budget=100, seed=1)
                found["share"] = np.array([share.low, share.high])
            if name == "gpt2":
                recomputed = spectra.HessianOperator(model, mine, graph="recompute layers")
                found["recomputed"] = whole(recomputed, recomputed.multiply_rows(op.gradient()[None])[0])
            if name == "llama-2bit":
                found["noisy"] = noisy_product(model, mine)
            save(out / f"{name}.npz", found)


def save(path, found):
    """Write what every rank has, once they all have the same."""
    for name, value in found.items():
        values = ranks.all_gather(value)
        assert all(np.array_equal(value, other) for other in values), name
    if distributed.rank() == 0:
        np.savez(path, **found)


class Uneven(nn.Sequential):
    """Layers whose rows do not divide by the number of ranks, and a bias with fewer rows than ranks."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 3))
        self.double()


def uneven(out):
    """Parameters that leave ranks empty, in every way in which batches are given, before and after a training step."""
    batches, rank, count = tiny_models.classification((5, 3, 4, 2, 6)), distributed.rank(), distributed.rank_count()
    model = fully_shard(Uneven())
    mine = batches[rank::count]
    for name, given, options in (
        ("own", mine, {}),
        ("same", batches, {}),
        ("same, few", batches[:1], {}),
        ("spread", batches, {"spread": "batches"}),
        ("adds up", mine, {"loss": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum")}),
        ("summed", mine, {"loss": nn.CrossEntropyLoss(reduction="sum")}),
        ("microbatches", mine, {"microbatch": 2, "graph": "rebuild"}),
        ("part", mine, {"params": "4.*"}),
    ):
        save(out / f"{name}.npz", measured(spectra.HessianOperator(model, given, **options)))
    checkpointed = Uneven()
    apply_activation_checkpointing(checkpointed, check_fn=lambda module: isinstance(module, nn.Linear))
    save(out / "checkpointed.npz", measured(spectra.HessianOperator(fully_shard(checkpointed), mine)))
    exact = spectra.HessianOperator(model, mine)
    save(out / "matrix.npz", {"matrix": exact.to_dense().numpy(), "nodes": spectra.slq(exact, steps=60).nodes})
    save(out / "gauss-newton.npz", measured(spectra.GaussNewtonOperator(model, mine)))
    with torch.no_grad():
        model(mine[0][0])  # leaves the parameters of the outermost module whole
    save(out / "evaluated.npz", measured(exact))
    train(model, mine)
    save(out / "trained.npz", measured(exact) | {"weights after": torch.cat([full(p) for p in model.parameters()])})
    save(out / "again.npz", measured(spectra.HessianOperator(model, mine)))


def full(parameter):
    return parameter.detach().full_tensor().flatten()


def train(model, batches, steps=3, step=lambda i: None):
    """Steps of Adam, through the hooks of FSDP2."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for i in range(steps):
        step(i)
        inputs, targets = batches[i % len(batches)]
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def probed(out):
    """A probe beside a training: one run folder, and the training as it is without the probe."""
    batches, trained = tiny_models.classification((5, 3, 4, 2, 6)), {}
    mine = batches[distributed.rank() :: distributed.rank_count()]
    for watched in (False, True):
        model = fully_shard(Uneven())
        if watched:
            settings = {"every": 2, "probes": 3, "steps": 8, "deflate": 2, "strict": True}
            with spectra.SpectrumProbe(model, mine, out=out / "run", **settings) as probe:
                train(model, mine, step=probe.step)
        else:
            train(model, mine)
        trained[watched] = torch.cat([full(p) for p in model.parameters()])
    assert torch.equal(trained[False], trained[True])
    assert (probe.run is None) == (distributed.rank() != 0)
    assert [record.step for record in probe.records] == [0, 2]
    assert any("without a change of variables" in note for record in probe.records for note in record.notes)


def errors(out):
    """An error on one rank is raised by all, wherever it happens, and none waits."""
    del out
    rank, count, model = distributed.rank(), distributed.rank_count(), fully_shard(Uneven())
    batches = tiny_models.classification((5, 3, 4, 2, 6))
    mine = batches[rank::count]
    inputs, targets = mine[0]
    cases = [
        (lambda: [(inputs * torch.nan, targets)] if rank == 1 else mine, {}, "rank 1: the loss of batch 0.* is nan"),
        (lambda: "nothing" if rank == 1 else mine, {}, "rank 1: batches must be"),
        (lambda: mine, {"loss": lambda m, b: 1 / 0 if rank == 1 else m(b[0]).sum()}, "rank 1: "),
        (lambda: mine, {"loss": lambda m, b: m(b[0]).sum() ** 3}, "the loss of a rank's batches is no mean"),
        (lambda: mine[:1], {"loss": lambda m, b: m(b[0]).sum() ** 3}, "the loss of a rank's batches is no mean"),
        (lambda: mine, {"spread": "batches"}, "the ranks were given different ones"),
    ]
    for given, options, message in cases:
        with pytest.raises((spectra.InputError, ZeroDivisionError), match=message) as raised:
            spectra.HessianOperator(model, given(), **options).gradient()
        texts = ranks.all_gather(str(raised.value))
        assert len(set(texts)) == 1, texts
    op = spectra.HessianOperator(model, mine)
    with pytest.raises(spectra.NonFiniteError, match="is not finite"):
        op @ torch.full((op.entries,), torch.inf if rank == 0 else 1.0)
    for refused, message in (
        (lambda: op.to_scipy(), "SciPy takes whole vectors"),
        (lambda: spectra.SpectrumProbe(model, mine, batch_groups=2), "batch_groups is not supported for a sharded"),
        (lambda: spectra.slq(op, blocks="layers"), "blocks= is not supported for a sharded model"),
        (lambda: op @ torch.ones(op.shape[0]), "this rank's part"),
    ):
        with pytest.raises(spectra.InputError, match=message):
            refused()


def refusals(out):
    """Shardings that are not supported end in one line."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    del out
    batches = tiny_models.classification((5, 3))
    mesh = init_device_mesh("cpu", (distributed.rank_count(),))
    planned = parallelize_module(Uneven(), mesh, {"0": ColwiseParallel()})
    with pytest.raises(spectra.InputError, match="as tensor parallel plans make it, which is not supported"):
        spectra.HessianOperator(planned, batches)
    rank, count = distributed.rank(), distributed.rank_count()
    pairs = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(spectra.InputError, match=f"sharded over 2 of {count} ranks, a mesh with all of them"):
        spectra.HessianOperator(fully_shard(Uneven(), mesh=pairs["shard"]), batches)
    hybrid = spectra.HessianOperator(fully_shard(Uneven(), mesh=pairs), batches[rank % 2 :][:1])
    expected = spectra.HessianOperator(Uneven(), batches).gradient()
    torch.testing.assert_close(hybrid.shards.gather(hybrid.gradient()), expected, rtol=1e-12, atol=1e-14)


def die(out):
    """A rank that dies in the middle of a measurement."""
    del out
    op = spectra.HessianOperator(fully_shard(Uneven()), tiny_models.classification((5, 3)), strict=False)
    op.loss()
    if distributed.rank() == 1:
        raise SystemExit(3)
    spectra.slq(op, probes=2, steps=5)


def trainer(out):
    """The Trainer with and without the callback, on a model that is sharded as accelerate does it on GPUs."""
    import transformers

    rows = torch.randint(2, tiny_models.VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
    settings |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 1e-2}
    trained = {}
    for watched in (False, True):
        transformers.set_seed(3)
        model = sharded(tiny_models.causal_lm("llama", dtype=torch.float32))
        arguments = transformers.TrainingArguments(output_dir=str(out / "trainer"), ddp_timeout=60, **settings)
        callback = spectra.SpectrumCallback(every=2, probes=1, steps=3, deflate=0, params="*mlp*", strict=True)
        run = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback] if watched else [])
        run.accelerator.prepare_model = lambda model, **_: (
            model
        )  # on CPUs accelerate would wrap it for data parallelism
        run.train()
        trained[watched] = torch.cat([full(p) for p in model.parameters()])
    assert torch.equal(trained[False], trained[True])
    assert [record.step for record in callback.probe.records] == [0, 2, 3]
    assert all(record.is_measured for record in callback.probe.records)
    assert (callback.probe.run is None) == (distributed.rank() != 0)
    losses = [entry["spectra/loss"] for entry in run.state.log_history if "spectra/loss" in entry]
    assert len(losses) == (3 if distributed.rank() == 0 else 0)


def small(out):
    """All that needs no language model."""
    for task in (uneven, probed, errors, refusals):
        task(out)


TASKS = {"models": models, "trainer": trainer, "small": small, "die": die}


def main(task, out):
    distributed.start(device="cpu", minutes=0.7)
    TASKS[task](Path(out))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
