"""The ranking of layers against dense Hessians."""

import pytest
import tiny_models
import torch
from oracles import dense_hessian
from torch.nn import functional

import spectra


@pytest.fixture
def case():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    dense = dense_hessian(functional.mse_loss(model(inputs), targets), list(model.parameters()))
    return model, spectra.HessianOperator(model, batches), dense


def rounded(name, parameter):
    return parameter.round(decimals=1) - parameter if name.endswith("weight") else None


def test_agrees_with_the_dense_hessian(case):
    model, op, dense = case
    ranking = spectra.sensitivity(op, rounded, probes=100)
    values = []
    for name, rows in (("0.weight", range(24)), ("2.weight", range(30, 48))):
        part = dense[list(rows)][:, list(rows)]
        move = rounded(name, dict(model.named_parameters())[name]).detach().reshape(-1)
        found = ranking[name]
        assert found.dimension == len(rows)
        assert found.squared_error == pytest.approx(float(move @ move))
        assert found.trace.value == pytest.approx(float(part.trace()), rel=1e-6)
        assert found.sensitivity.value == pytest.approx(float(part.trace() / len(rows) * (move @ move)), rel=1e-6)
        assert found.sensitivity.low <= found.sensitivity.value <= found.sensitivity.high
        assert found.rise == pytest.approx(float(move @ part @ move / 2), rel=1e-6)
        values.append(found.sensitivity.value)
    assert [block.sensitivity.value for block in ranking.blocks] == sorted(values, reverse=True)


def test_the_rise_is_that_of_the_loss(case):
    """For a small perturbation of the last, linear layer the loss is g . d + d . H d / 2 exactly."""
    model, op, _ = case
    move = 0.1 * torch.ones_like(model[2].weight)
    before, slope = op.loss(), float(op.gradient()[30:48].sum()) * 0.1
    rise = spectra.sensitivity(op, {"2.weight": move}, probes=50)["2.weight"].rise
    with torch.no_grad():
        model[2].weight += move
    assert op.loss() - before == pytest.approx(slope + rise)


def test_layers_hold_their_perturbed_parameters_alone(case):
    _, op, dense = case
    ranking = spectra.sensitivity(op, rounded, blocks="layers", probes=100)
    assert {block.name: block.dimension for block in ranking.blocks} == {"0": 24, "2": 18}
    assert ranking["2"].trace.value == pytest.approx(float(dense[30:48, 30:48].trace()), rel=1e-6)


def test_a_table_says_where_the_order_is_not_known():
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches()
    op = spectra.GaussNewtonOperator(model, batches, params="*mlp*")
    ranking = spectra.sensitivity(op, lambda _, weight: 0.01 * weight, probes=3)
    lines = str(ranking).splitlines()
    assert len(lines) == 1 + len(ranking) + 1
    assert "interval overlaps" in lines[-1]
    for position, line in enumerate(lines[1:-1]):
        assert line.split()[0] == f"{position + 1}{'' if ranking.is_ranked(position) else '~'}"
    kept = ranking.to_dict()["blocks"]
    assert [block["name"] for block in kept] == [block.name for block in ranking.blocks]
    assert not all(block["ranked"] for block in kept)


@pytest.mark.parametrize(
    ("perturbation", "options", "words"),
    [
        ({"1.weight": torch.zeros(3)}, {}, "no parameter '1.weight'"),
        ({"0.weight": torch.zeros(3)}, {}, r"must be a tensor \(6, 4\), got \(3,\)"),
        ({"0.weight": 1.0}, {}, "got float"),
        ({"0.weight": torch.full((6, 4), torch.nan)}, {}, "NaN"),
        ({}, {}, "moves none"),
        (lambda name, parameter: None, {}, "moves none"),
        (3, {}, "takes a mapping or a function"),
        ({"0.weight": torch.zeros(6, 4)}, {"blocks": ["2.*"]}, "no block has a perturbed parameter"),
    ],
)
def test_what_is_refused(case, perturbation, options, words):
    _, op, _ = case
    with pytest.raises(spectra.InputError, match=words):
        spectra.sensitivity(op, perturbation, **options)


def test_a_matrix_is_refused():
    with pytest.raises(spectra.InputError, match="model's parameters"):
        spectra.sensitivity(spectra.DenseOperator(torch.eye(3)), {})
