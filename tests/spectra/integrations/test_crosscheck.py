"""PyHessian itself beside the engine: true numbers inside, and its deviations reported."""

import copy
import re

import numpy as np
import pytest
import tiny_models
import torch
from oracles import random_state, same_random_state
from torch import nn

from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.integrations import crosscheck as module
from spectra.integrations.crosscheck import EIG, Compared, crosscheck

pytest.importorskip("pyhessian")


class Quadratic(nn.Module):
    """L = theta . (values * theta) / 2, whose Hessian is diag(values)."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)
        self.theta = nn.Parameter(torch.full((len(values),), 0.1))
        self.other = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return (self.theta * self.values * self.theta).sum() / 2 + inputs.sum() * self.other.square().sum()


BATCH = [(torch.ones(2), torch.zeros(2))]


def first(outputs, _):
    return outputs


def numbers_of(found):
    return {each.quantity: each for each in found.quantities}


def test_both_find_a_spectrum_that_is_known():
    values = torch.cat([torch.tensor([9.0, -6.0]), torch.linspace(0.5, 1.5, 198)])
    found = crosscheck(Quadratic(values), BATCH, first, params="theta", top=2, max_iterations=400, tol=1e-5, probes=2)
    assert found.dimension == 200
    quantities = numbers_of(found)
    truth = {
        "eigenvalue of largest magnitude": 9.0,
        "eigenvalue 2 by magnitude": -6.0,
        "trace": float(values.sum()),
        "largest eigenvalue, density": 9.0,
        "smallest eigenvalue, density": -6.0,
        "root-mean-square eigenvalue": float(values.square().mean().sqrt()),
        "negative share": 1 / 200,
    }
    assert set(quantities) == set(truth)
    for name, value in truth.items():
        ours = quantities[name].spectra
        margin = 2e-5 * abs(value)  # float32
        assert ours.low - margin <= value <= ours.high + margin, name
        if name != "negative share":
            assert quantities[name].pyhessian == pytest.approx(value, rel=0.02), name
    assert quantities["trace"].inside
    assert set(found.costs) == {"preparation", "eigenvalues", "trace", "density"}
    assert [cost.products for cost in found.costs["density"]] == [80, 80]
    assert all(cost.seconds > 0 for both in found.costs.values() for cost in both)


def test_pyhessians_own_number_is_what_is_reported():
    """The same calls made by hand give the same digits."""
    import pyhessian

    model = tiny_models.mlp(hidden=30, dtype=torch.float32)
    batches = [(inputs.float(), targets) for inputs, targets in tiny_models.classification((30,))]
    found = numbers_of(crosscheck(model, batches, nn.CrossEntropyLoss(), seed=4, steps=12))
    torch.manual_seed(4)
    theirs = pyhessian.hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), data=batches[0], cuda=False)
    (value,), _ = theirs.eigenvalues()
    samples = theirs.trace()
    with module._torch_eig():
        nodes, _ = theirs.density(iter=12, n_v=4)
    assert found["eigenvalue of largest magnitude"].pyhessian == pytest.approx(value, rel=1e-5)
    assert found["trace"].pyhessian == pytest.approx(np.mean(samples), rel=1e-4)
    assert found["largest eigenvalue, density"].pyhessian == pytest.approx(np.max(nodes), rel=1e-4)


def test_a_stall_and_an_iteration_that_ran_out_are_reported():
    values = torch.cat([torch.tensor([-3.0, 2.9]), torch.linspace(-0.1, 0, 300)])
    found = crosscheck(Quadratic(values), BATCH, first, params="theta", tol=1e-9, max_iterations=20, steps=5, probes=1)
    assert any("power iteration took all 20 iterations" in note for note in found.notes)
    assert any("trace ended after 2 of 20 samples (a running mean below zero)" in note for note in found.notes)
    assert EIG in found.notes
    largest = numbers_of(found)["eigenvalue of largest magnitude"]
    assert largest.spectra.value == pytest.approx(-3, rel=1e-5)
    assert largest.inside is False
    assert "outside" in largest.verdict


@pytest.mark.parametrize(
    ("samples", "cause"), [([-1.0, 5.0], "a running mean below zero"), ([5.0, 5.001], "moved by less than 0.001")]
)
def test_why_a_trace_ended_is_told_from_the_mean_before(samples, cause, monkeypatch):
    import importlib

    package = importlib.import_module("pyhessian.hessian")
    monkeypatch.setattr(package.hessian, "trace", lambda *arguments, **options: samples)
    found = crosscheck(Quadratic(torch.linspace(1, 2, 100)), BATCH, first, params="theta", steps=5, probes=1)
    (note,) = [note for note in found.notes if "trace ended" in note]
    assert f"after 2 of 100 samples ({cause if 'below' in cause else 'its running mean ' + cause})" in note


def test_batches_that_count_other_than_by_rows_are_reported():
    model = tiny_models.causal_lm("llama-tied", dtype=torch.float32)
    batches = tiny_models.token_batches(((8, 8, 8), (3,)))
    found = crosscheck(model, batches, params="*mlp*", steps=5, probes=1, max_iterations=5)
    want = float(tiny_models.language_loss(model.eval(), batches).detach())
    assert found.loss == pytest.approx(want, rel=1e-5)
    rows = [float(model(**batch).loss.detach()) for batch in batches]
    theirs = (3 * rows[0] + rows[1]) / 4
    (said,) = [re.search(r"weights batches by their rows: its loss is (\S+), not", note) for note in found.notes[:1]]
    assert float(said[1]) == pytest.approx(theirs, rel=1e-4)
    assert abs(theirs / want - 1) > 1e-3
    even = crosscheck(model, batches[:1], params="*mlp*", steps=5, probes=1, max_iterations=5)
    assert not any("by their rows" in note for note in even.notes)


def test_a_failure_of_pyhessian_is_a_note_and_ours_stands(monkeypatch):
    import importlib

    def fail(*arguments, **options):
        raise RuntimeError("no luck\nmore")

    monkeypatch.setattr(importlib.import_module("pyhessian.hessian").hessian, "density", fail)
    found = crosscheck(Quadratic(torch.linspace(1, 2, 100)), BATCH, first, params="theta", steps=5, probes=1)
    assert "PyHessian failed (density: no luck)" in found.notes
    rms = numbers_of(found)["root-mean-square eigenvalue"]
    assert rms.inside is None
    assert rms.verdict == "no number"
    assert rms.spectra.low <= 1.53 <= rms.spectra.high
    assert "density" not in found.costs


def test_the_model_torch_and_pyhessian_are_left_as_they_were():
    import importlib

    package = importlib.import_module("pyhessian.hessian")
    before = package.hessian_vector_product, package.hessian.dataloader_hv_product, getattr(torch, "eig", None)
    model = tiny_models.conv_net(dropout=0.5).float().train()
    batches = [(inputs.float(), targets) for inputs, targets in tiny_models.images((20,))]
    weights, states = copy.deepcopy(model.state_dict()), random_state()
    crosscheck(model, batches, nn.CrossEntropyLoss(), steps=5, probes=1, max_iterations=5)
    assert same_random_state(random_state(), states)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (
        package.hessian_vector_product,
        package.hessian.dataloader_hv_product,
        getattr(torch, "eig", None),
    ) == before


def test_verdicts_say_how_far_off():
    ours = Estimate(2.0, 1.9, 2.1)
    assert Compared("x", 2.05, ours).verdict == "inside"
    assert Compared("x", 1.5, ours).verdict == "outside, 25 % below"
    assert Compared("x", 7.0, ours).verdict == "outside, 5 above"
    assert str(Compared("x", 1.5, ours)) == "x: PyHessian 1.5, spectra 2.00 [1.90, 2.10]: outside, 25 % below"


def test_bad_numbers_are_refused():
    for name in ("top", "probes", "steps", "max_iterations"):
        with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be at least 1, got 0"):
            crosscheck(Quadratic(torch.ones(9)), BATCH, first, **{name: 0})
