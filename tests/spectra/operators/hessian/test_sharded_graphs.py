"""Models that FSDP2 shards over 2 and 4 gloo ranks give what one process gives that holds the whole model."""

import numpy as np
import pytest
import sharded_models
import tiny_models
import torch
from gloo_ranks import NODES, SUMS, run_ranks
from torch import nn

import spectra

VECTORS = ("product", "gradient", "loss", "zeros", "diagonal", "traces")


def torchrun(task, out, *, count):
    return run_ranks([sharded_models.__file__, task, str(out)], count=count)


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """What two ranks found for language models."""
    folder = tmp_path_factory.mktemp("models")
    done = torchrun("models", folder, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """What four ranks found for a small network."""
    folder = tmp_path_factory.mktemp("small")
    done = torchrun("small", folder, count=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def compare(path, op, *, everything=False):
    expected, found = sharded_models.measured(op, everything=everything), np.load(path)
    for name, value in expected.items():
        tolerances = SUMS if name in VECTORS else NODES
        np.testing.assert_allclose(found[name], value, **tolerances, err_msg=f"{path.name}, {name}")


@pytest.mark.parametrize("name", sharded_models.MODELS)
def test_language_models_on_two_ranks_are_measured_as_on_one(language_models, name):
    batches = tiny_models.token_batches(sharded_models.BATCHES)
    op = spectra.HessianOperator(sharded_models.language_model(name), batches, **sharded_models.options_of(name))
    compare(language_models / f"{name}.npz", op, everything=name == "llama")
    if name == "gpt2":
        expected = (op @ op.gradient()).numpy()
        np.testing.assert_allclose(np.load(language_models / f"{name}.npz")["recomputed"], expected, **SUMS)
    if name == "llama-2bit":
        expected = sharded_models.noisy_product(sharded_models.language_model(name), batches)
        np.testing.assert_allclose(np.load(language_models / f"{name}.npz")["noisy"], expected, **SUMS)
    if name == "llama":
        exact = np.linalg.eigvalsh(op.to_dense().numpy())
        low, high = np.load(language_models / f"{name}.npz")["share"]
        assert low <= (exact < 0).mean() <= high


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("own", {}),
        ("same", {}),
        ("same, few", {"few": True}),
        ("spread", {}),
        ("adds up", {"loss": nn.CrossEntropyLoss(reduction="sum")}),
        ("summed", {"loss": nn.CrossEntropyLoss(reduction="sum")}),
        ("microbatches", {}),
        ("part", {"params": "4.*"}),
        ("checkpointed", {}),
        ("gauss-newton", {}),
        ("evaluated", {}),
        ("probed", {}),
    ],
)
def test_uneven_shards_and_every_way_to_give_batches(small_models, name, options):
    batches = tiny_models.classification((5, 3, 4, 2, 6))
    kind = spectra.GaussNewtonOperator if name == "gauss-newton" else spectra.HessianOperator
    given = batches[:1] if options.pop("few", False) else batches
    op = kind(sharded_models.Uneven(), given, **options)
    if name == "probed":
        first, last = spectra.Run(small_models / "run").records
        assert (first.step, last.step, first.dimension) == (0, 2, op.shape[0])
        probe = spectra.SpectrumProbe(sharded_models.Uneven(), batches, probes=3, steps=8, deflate=2)
        (alone,) = probe.measure(0)
        assert first.loss == pytest.approx(alone.loss, rel=1e-12)
        assert first.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-12)
        assert first.weights == alone.weights != last.weights
        for quantity in ("lambda_max", "rms", "trace", "negative_energy_share"):
            ours, theirs = first.estimates[quantity], alone.estimates[quantity]
            assert (ours.low, ours.value, ours.high) == pytest.approx((theirs.low, theirs.value, theirs.high), rel=1e-6)
        return
    compare(small_models / f"{name}.npz", op)


def test_sharded_matrices_are_formed_whole(small_models):
    op = spectra.HessianOperator(sharded_models.Uneven(), tiny_models.classification((5, 3, 4, 2, 6)))
    found = np.load(small_models / "matrix.npz")
    np.testing.assert_allclose(found["matrix"], op.to_dense().numpy(), **SUMS)
    np.testing.assert_allclose(found["nodes"][0], np.linalg.eigvalsh(op.to_dense().numpy()), **NODES)


def test_a_training_step_through_fsdp_is_seen(small_models):
    """The operator from before the training, and a new one, against the whole model with the trained weights."""
    found, model = np.load(small_models / "trained.npz"), sharded_models.Uneven()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    nn.utils.vector_to_parameters(torch.as_tensor(found["weights after"]), model.parameters())
    assert not np.allclose(found["weights after"], before, atol=1e-2)
    op = spectra.HessianOperator(model, tiny_models.classification((5, 3, 4, 2, 6)))
    compare(small_models / "again.npz", op)
    for name in ("product", "gradient", "loss"):
        np.testing.assert_allclose(found[name], np.load(small_models / "again.npz")[name], **SUMS)


def test_the_callback_measures_a_model_that_a_trainer_shards(tmp_path):
    done = torchrun("trainer", tmp_path, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    records = spectra.Run(tmp_path / "trainer" / "spectra").records
    assert [record.step for record in records] == [0, 2, 3]


def test_a_rank_that_dies_ends_the_run(tmp_path):
    done = torchrun("die", tmp_path, count=2)
    assert done.returncode != 0
    assert "another rank stopped" in done.stderr or "exitcode  : 3" in done.stderr
