"""Spectra and traces of all blocks from one operator, against an operator for each."""

import itertools

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_hessian
from torch.nn import functional

import spectra
from spectra.operators.blocks import layer_of


@pytest.fixture
def case():
    model, batches = tiny_models.mlp(inputs=6, hidden=16), tiny_models.classification((9, 4), inputs=6)
    return model, batches, spectra.HessianOperator(model, batches)


@pytest.mark.parametrize("options", [{}, {"deflate": 2}, {"reorthogonalize": "none", "congruence": True}])
def test_densities_are_those_of_the_blocks_own_operators(case, options):
    model, batches, op = case
    found = spectra.slq(op, blocks="layers", probes=2, steps=8, **options)
    assert list(found) == ["0", "2"]
    for layer in found:
        own = spectra.HessianOperator(model, batches, params=lambda name, _, layer=layer: layer_of(name) == layer)
        want = spectra.slq(own, probes=2, steps=8, **options)
        np.testing.assert_allclose(found[layer].nodes, want.nodes, atol=1e-6)
        for quantity in ("trace", "rms", "lambda_max", "lambda_min"):
            one, other = getattr(found[layer], quantity)(), getattr(want, quantity)()
            assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-6)
        assert found[layer].dimension == own.shape[0]
        assert found[layer].origin == want.origin
        assert found[layer].zero_share() == want.zero_share()


def test_small_blocks_are_exact():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    dense = dense_hessian(functional.mse_loss(model(inputs), targets), list(model.parameters()))
    found = spectra.slq(spectra.HessianOperator(model, batches), blocks=["2.*", "0.*"], steps=40)
    assert list(found) == ["2.*", "0.*"]
    for density, part in ((found["0.*"], dense[:30, :30]), (found["2.*"], dense[30:, 30:])):
        assert density.exact
        values = torch.linalg.eigvalsh(part)
        assert density.lambda_max().value == pytest.approx(values[-1].item())
        assert density.trace().value == pytest.approx(values.sum().item())


def test_a_block_does_not_depend_on_the_others(case):
    _, _, op = case
    alone = spectra.slq(op, blocks=["2.*"], probes=2, steps=8)
    among = spectra.slq(op, blocks=["0.*", "2.*"], probes=2, steps=8)
    name = "2.*"
    np.testing.assert_allclose(alone[name].nodes, among[name].nodes, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces(case, method):
    model, batches, op = case
    found = spectra.trace(op, blocks=["2.bias", "0.*"], method=method, probes=20, seed=3)
    own = spectra.HessianOperator(model, batches, params="0.*")
    want = spectra.trace(own, method=method, probes=20, seed=3)
    assert found["0.*"].value == pytest.approx(want.value, rel=1e-5)
    assert found["0.*"].high == pytest.approx(want.high, rel=1e-5)
    exact = spectra.HessianOperator(model, batches, params="2.bias").to_dense()
    assert found["2.bias"].value == pytest.approx(exact.trace().item())


def test_progress_ends_full(case):
    _, _, op = case
    seen = []
    before = op.products
    spectra.slq(op, blocks="layers", probes=1, steps=6, progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total <= op.products - before
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))


def test_what_belongs_to_the_whole_is_refused(case):
    _, _, op = case
    pairs = spectra.topk(op, 2)
    with pytest.raises(spectra.InputError, match="deflate= as a number"):
        spectra.slq(op, blocks="layers", deflate=pairs)
