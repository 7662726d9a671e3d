"""What two ranks of tests of layers that are gathered in turn run, under torchrun: python layered_models.py OUT."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded_models
import tiny_models
import torch
from sharded_models import MODELS, Uneven, save, sharded, whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spectra
from spectra import distributed
from spectra.backend import ranks
from spectra.backend.memory import AllocationMeter


def language_model(name):
    """A model whose RMS norms compute in the dtype of their input; those of transformers compute in float32."""
    model = sharded_models.language_model(name)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)
    return model


def rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def mine(batches):
    return batches[distributed.rank() :: distributed.rank_count()]


CHECKED = "llama-2bit"  # the model for which the checks before the first product run
FEW = (5, 3)  # rows of a batch for each rank


def briefly_measured(op, *, checked=False, steps=0):
    """What an operator gives, with whole vectors."""
    if not checked:
        op.trust({})
    vector = torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)
    return {
        "product": whole(op, op @ sharded_models.part(op, vector)),
        "gradient": whole(op, op.gradient()),
        "loss": np.array(op.loss()),
        "nodes": spectra.slq(op, probes=1, steps=steps, seed=3).nodes if steps else np.zeros(0),
    }


def models(out):
    """Every language model; of the quantized ones some parameters alone."""
    batches = mine(tiny_models.token_batches(sharded_models.BATCHES[:2]))
    for name in MODELS:
        model, options = sharded(language_model(name)), sharded_models.options_of(name)
        with spectra.HessianOperator(model, batches, graph="gather layers", **options) as op:
            save(out / f"{name}.npz", briefly_measured(op, checked=name == CHECKED))


def uneven(out):
    """Uneven shards, and differences of the gradient."""
    model, batches = fully_shard(Uneven()), mine(tiny_models.classification(FEW))
    save(out / "uneven.npz", briefly_measured(spectra.HessianOperator(model, batches, graph="gather layers"), steps=4))
    for graph in ("auto", "gather layers"):
        op = spectra.HessianOperator(model, batches, graph=graph, engine="differences")
        op.trust({})
        vector = torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)
        found = {"product": whole(op, op @ op.shards.take(vector)), "error": np.array(op.precision_error())}
        save(out / f"differences, {graph}.npz", found)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.layout == torch.strided:
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return found


def memory(out):
    """The most bytes that a measurement holds, and the plan, with weights that stay gathered and that do not."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 2, "vocab_size": 96, "n_positions": 16}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = sharded(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts)).eval())
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(distributed.rank()))
    for graph in ("keep", "gather layers"):
        op = spectra.HessianOperator(model, [{"input_ids": ids, "labels": ids}], graph=graph, engine="reverse")
        planned = spectra.plan(op, probes=1, steps=2, reorthogonalize="none")
        op.refresh()
        op.trust({})
        with LargestTensor() as largest, AllocationMeter() as meter:
            spectra.slq(op, probes=1, steps=2, reorthogonalize="none")
        found = np.array(ranks.all_gather([meter.peak, planned.peak, largest.numbers, op.shape[0]]))
        op.close()
        save(out / f"memory, {graph}.npz", {"found": found})


def refusals(out):
    """An error on one rank ends the tasks of all, and what cannot be gathered in turn ends in one line."""
    del out
    rank, batches = distributed.rank(), tiny_models.classification(FEW)
    model = fully_shard(Uneven())
    inputs, targets = batches[rank]
    own = batches[rank:][:1]
    for given, options, message in (
        ([(inputs * torch.nan, targets)] if rank else own, {}, "rank 1: the loss of batch 0.* is nan"),
        (own, {"engine": "batched"}, "engine='batched' needs whole weights"),
        (own, {"training": True}, "measures in evaluation mode"),
        (own, {"loss": lambda m, b: 1 / 0 if rank else m(b[0]).sum()}, "division by zero"),
    ):
        with pytest.raises((spectra.InputError, ZeroDivisionError), match=message) as raised:
            spectra.HessianOperator(model, given, graph="gather layers", **options).gradient()
        assert len(set(ranks.all_gather(str(raised.value)))) == 1
    with pytest.raises(spectra.InputError, match="is for the Hessian alone"):
        spectra.GaussNewtonOperator(model, batches, graph="gather layers")
    with pytest.raises(spectra.InputError, match=r"shard it with torch.distributed.fsdp.fully_shard"):
        spectra.HessianOperator(FullyShardedDataParallel(Uneven(), device_id=torch.device("cpu")), batches)
    offloaded = fully_shard(Uneven(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert spectra.HessianOperator(offloaded, own).loss() > 0  # on a CPU there is nothing to offload to


def out_of_memory(out):
    """A rank that runs out of memory once: all go on with graphs that every product builds again."""
    del out
    model = fully_shard(Uneven())
    op = spectra.HessianOperator(model, mine(tiny_models.classification(FEW)), graph="gather layers")
    op.trust({})
    vector = torch.ones(op.entries, dtype=op.dtype)
    expected, exchange = op @ vector, op._graphs.local.exchange
    prepare, left = exchange.prepare, [distributed.rank()]

    def failing(request, payload):
        if left[0]:
            left[0] = 0
            raise torch.OutOfMemoryError("as if memory were full")
        return prepare(request, payload)

    exchange.prepare = failing
    torch.testing.assert_close(op @ vector, expected, rtol=1e-12, atol=1e-14)
    assert any("went on with graphs rebuilt at every product" in note for note in op.notes)


def read_elsewhere(out):
    """A parameter that the loss reads while its module does not compute stays gathered."""
    batches = tiny_models.classification(FEW)
    op = spectra.HessianOperator(fully_shard(Uneven()), mine(batches), loss=decayed, graph="gather layers")
    save(out / "decayed.npz", briefly_measured(op))
    assert any("'0.weight' is read outside of its module" in note for note in op.notes)


def decayed(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 0.1 * model[0].weight.square().sum()


if __name__ == "__main__":
    distributed.start(device="cpu", minutes=0.7)
    for task in (refusals, out_of_memory, uneven, read_elsewhere, memory, models):
        task(Path(sys.argv[1]))
    distributed.stop()
