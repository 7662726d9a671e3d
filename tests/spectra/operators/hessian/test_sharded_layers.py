"""Models whose weights are gathered one layer at a time give what one process gives that holds the whole model."""

from types import SimpleNamespace

import layered_models
import numpy as np
import pytest
import sharded_models
import tiny_models
import torch
from gloo_ranks import NODES, SUMS, run_ranks
from torch.distributed.tensor import Shard

import spectra
from spectra.operators.hessian import sharded_weights


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("layers")
    done = run_ranks([layered_models.__file__, str(folder)], count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def compare(path, op, **options):
    for name, value in layered_models.briefly_measured(op, **options).items():
        tolerances = NODES if name == "nodes" else SUMS
        np.testing.assert_allclose(np.load(path)[name], value, **tolerances, err_msg=f"{path.name}, {name}")


@pytest.mark.parametrize("name", sharded_models.MODELS)
def test_language_models_are_measured_as_on_one_rank(found, name):
    batches = tiny_models.token_batches(sharded_models.BATCHES[:2])
    op = spectra.HessianOperator(layered_models.language_model(name), batches, **sharded_models.options_of(name))
    compare(found / f"{name}.npz", op, checked=name == layered_models.CHECKED)


def test_uneven_shards_and_parameters_that_are_read_elsewhere(found):
    batches = tiny_models.classification(layered_models.FEW)
    compare(found / "uneven.npz", spectra.HessianOperator(sharded_models.Uneven(), batches), steps=4)
    op = spectra.HessianOperator(sharded_models.Uneven(), batches, loss=layered_models.decayed)
    compare(found / "decayed.npz", op)


def test_they_take_the_planned_memory_and_no_whole_vector(found):
    kept, layered = (np.load(found / f"memory, {graph}.npz")["found"] for graph in ("keep", "gather layers"))
    for (whole, planned, largest, n), (peak, plan, most, _) in zip(kept, layered, strict=True):
        assert whole / planned <= 1.15
        assert 0.7 < peak / plan <= 1.15
        assert peak < 0.7 * whole
        assert most <= n / 2 + 1 < n <= largest  # this rank's half of a vector is the largest tensor


@pytest.mark.parametrize("graph", ["auto", "gather layers"])
def test_differences_of_a_sharded_gradient_are_off_by_what_they_state(found, graph):
    op = spectra.HessianOperator(sharded_models.Uneven(), tiny_models.classification(layered_models.FEW))
    vector = torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)
    loaded = np.load(found / f"differences, {graph}.npz")
    largest = np.abs(np.linalg.eigvalsh(op.to_dense().numpy())).max()
    error = np.linalg.norm(loaded["product"] - (op @ vector).numpy()) / (largest * float(vector.norm()))
    assert error <= 2 * loaded["error"] < 1e-6


def test_parameters_that_are_offloaded_to_the_cpu_are_refused():
    mesh = SimpleNamespace(size=lambda: 1, device_type="cuda")
    parameter = SimpleNamespace(device_mesh=mesh, placements=(Shard(0),), device=torch.device("cpu"))
    with pytest.raises(spectra.InputError, match=r"CPUOffloadPolicy.*shard it without an offload policy"):
        sharded_weights.check_parameter("0.weight", parameter, managed=True)
