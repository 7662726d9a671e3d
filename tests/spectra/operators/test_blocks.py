"""Diagonal blocks: their products are those of an operator of their own, and odd choices are refused in one line."""

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_hessian, normal, relative_error
from torch import nn
from torch.nn import functional

import spectra
from spectra.operators.base import Block
from spectra.operators.blocks import layer_of


@pytest.fixture
def case():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    dense = dense_hessian(functional.mse_loss(model(inputs), targets), list(model.parameters()))
    return model, batches, dense


@pytest.mark.parametrize(("engine", "graph"), [("reverse", "keep"), ("batched", "keep"), ("auto", "rebuild")])
def test_products_are_rows_and_columns_of_the_dense_hessian(case, engine, graph):
    model, batches, dense = case
    op = spectra.HessianOperator(model, batches, engine=engine, graph=graph)
    blocks = spectra.blocks_of(op, "layers")
    assert list(blocks) == ["0", "2"]
    first = 0
    for block in blocks.values():
        n = block.shape[0]
        exact = dense[first : first + n, first : first + n]
        v = normal(n, 3, seed=first)
        assert relative_error(block @ v, exact @ v) < 1e-10
        assert relative_error(block @ v[:, 0].contiguous(), exact @ v[:, 0]) < 1e-10
        first += n
    assert first == len(dense)


def test_parameters_that_do_not_follow_each_other(case):
    model, batches, dense = case
    block = spectra.blocks_of(spectra.HessianOperator(model, batches), ["*weight"])["*weight"]
    rows = torch.cat([torch.arange(24), torch.arange(30, 48)])
    assert relative_error(block.to_dense(), dense[rows][:, rows]) < 1e-10
    assert block.space.names == ("0.weight", "2.weight")


def test_a_block_of_a_language_model_is_the_operator_of_its_parameters():
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches()
    op = spectra.HessianOperator(model, batches)
    for name in ("model.embed_tokens", "model.layers.0"):
        block = spectra.blocks_of(op)[name]
        own = spectra.HessianOperator(model, batches, params=lambda n, _, name=name: layer_of(n) == name)
        v = normal(own.shape[0], 2, seed=0)
        assert block.space.names == own.space.names
        assert relative_error(block @ v, own @ v) < 1e-12
        assert block.rounding() == pytest.approx(own.rounding(), rel=0.5, abs=1e-6)


def test_weights_that_moved_are_used(case):
    model, batches, _ = case
    op = spectra.HessianOperator(model, batches)
    block = spectra.blocks_of(op)["2"]
    v = normal(block.shape[0], seed=1)
    before = block @ v
    with torch.no_grad():
        model[0].weight.mul_(2)
    inputs, targets = tiny_models.whole(batches)
    dense = dense_hessian(functional.mse_loss(model(inputs), targets), list(model[2].parameters()))
    assert relative_error(block @ v, dense @ v) < 1e-10
    assert relative_error(block @ v, before) > 1e-3


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_the_error_of_a_lower_precision_is_that_of_the_block(precision):
    model, batches = tiny_models.causal_lm("llama", dtype=torch.float32), tiny_models.token_batches()
    block = spectra.blocks_of(spectra.HessianOperator(model, batches, precision=precision))["model.layers.1"]
    own = spectra.HessianOperator(model, batches, params="model.layers.1.*", precision=precision)
    assert block.rounding() == pytest.approx(own.rounding(), rel=0.5)


def test_of_a_mean_and_of_a_difference(case):
    model, batches, dense = case
    whole, first = spectra.HessianOperator(model, batches), spectra.HessianOperator(model, batches[:1])
    part = dense_hessian(functional.mse_loss(model(batches[0][0]), batches[0][1]), list(model.parameters()))
    v = normal(21, 2, seed=3)
    for op, exact in (
        (spectra.MeanOperator([whole, first]), (dense + part) / 2),
        (spectra.DifferenceOperator(whole, first), dense - part),
    ):
        block = spectra.blocks_of(op)["2"]
        assert relative_error(block @ v, exact[30:, 30:] @ v) < 1e-9
        assert 0 < block.rounding() < 1e-10
        assert block.space.names == ("2.weight", "2.bias")


def test_a_block_of_a_matrix():
    matrix = normal(9, 9, seed=4)
    matrix = matrix + matrix.T
    block = spectra.BlockOperator(spectra.DenseOperator(matrix), Block("some", ((1, 3), (5, 9))))
    rows = torch.tensor([1, 2, 5, 6, 7, 8])
    assert relative_error(block.to_dense(), matrix[rows][:, rows]) < 1e-12
    assert block.rounding() < 1e-12
    for ranges in ((), ((3, 1),), ((0, 10),), ((0, 3), (2, 5)), ((-1, 3),)):
        with pytest.raises(spectra.InputError, match="ascending and disjoint"):
            spectra.BlockOperator(spectra.DenseOperator(matrix), Block("some", ranges))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (["*nothing*"], "no parameter matches"),
        (["*attn*", "*q_proj*"], "is in two blocks, '\\*attn\\*' and '\\*q_proj\\*'"),
        (["*embed_tokens*", "lm_head*"], "tied: .*lm_head.weight.* in two blocks"),
        (["model.norm*"], "none of the .* parameters of the operator"),
        ([nn.Conv2d], "no Conv2d of the model"),
        ([], "is empty"),
        ({}, "is empty"),
        (3, "takes"),
        ([3], "takes"),
    ],
)
def test_choices_that_are_refused(blocks, words):
    model, batches = tiny_models.causal_lm("llama-tied"), tiny_models.token_batches()
    op = spectra.HessianOperator(model, batches, params=lambda name, _: name != "model.norm.weight")
    with pytest.raises(spectra.InputError, match=words) as caught:
        spectra.blocks_of(op, blocks)
    assert "\n" not in str(caught.value)


def test_an_operator_without_parameters_is_refused():
    with pytest.raises(spectra.InputError, match="model's parameters"):
        spectra.blocks_of(spectra.DiagonalOperator(np.ones(3)))


def test_a_tied_weight_is_in_one_block_once():
    model, batches = tiny_models.causal_lm("llama-tied"), tiny_models.token_batches()
    blocks = spectra.blocks_of(spectra.HessianOperator(model, batches))
    assert list(blocks) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    assert sum(block.shape[0] for block in blocks.values()) == sum(p.numel() for p in model.parameters())


def test_module_types_and_mappings():
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches()
    op = spectra.HessianOperator(model, batches)
    layer = type(model.model.layers[0])
    assert list(spectra.blocks_of(op, layer)) == ["model.layers.0", "model.layers.1"]
    assert list(spectra.blocks_of(op, nn.Embedding)) == ["model.embed_tokens"]
    named = spectra.blocks_of(op, {"attention": "*attn*", "head": model.lm_head})
    assert [block.shape[0] for block in named.values()] == [2 * 192, 192]


class _Detached(nn.Module):
    """Two branches: the second, of small curvature, has a wrong second derivative."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        y = self.small(x)
        return 10 * torch.tanh(self.large(x)) + 0.01 * (y * y.detach() + y)


def test_a_wrong_derivative_in_a_small_block_is_found():
    torch.manual_seed(0)
    model, batches = _Detached(), tiny_models.regression((9,))
    op = spectra.HessianOperator(model, batches)
    v = normal(op.shape[0], seed=0)
    assert torch.isfinite(op @ v).all()  # the check of the whole does not see it
    blocks = spectra.blocks_of(op)
    assert (blocks["large"] @ v[:15]).norm() > 0
    with pytest.raises(spectra.InputError, match=r"block 'small': .*detach"):
        blocks["small"] @ v[:15]
    loose = spectra.HessianOperator(model, batches, strict=False)
    estimate = spectra.trace(spectra.blocks_of(loose)["small"], probes=4)
    assert not estimate.resolved
    assert "detach" in estimate.reason


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "0"),
        ("weight", "weight"),
        ("conv1.weight", "conv1"),
        ("layer1.0.conv2.weight", "layer1.0"),
        ("blocks.12", "blocks"),
    ],
)
def test_layers(name, layer):
    assert layer_of(name) == layer
