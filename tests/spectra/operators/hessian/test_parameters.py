"""Which parameters are meant, in which order, and once each."""

import re

import pytest
import tiny_models
import torch
from oracles import flat, normal
from torch import nn

from spectra import InputError, ParameterSpace


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))


ALL = ("0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias")


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (None, ALL),
        ("*.weight", ("0.weight", "1.weight", "2.0.weight", "2.1.weight")),
        ("2.*", ("2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias")),
        ("0.bias", ("0.bias",)),
        (["0.*", "2.1.bias"], ("0.weight", "0.bias", "2.1.bias")),
        (["*.bias", "0.*", "0.bias"], ("0.weight", "0.bias", "1.bias", "2.0.bias", "2.1.bias")),  # none twice
        (re.compile(r"^2\..*weight$"), ("2.0.weight", "2.1.weight")),
        (nn.LayerNorm, ("1.weight", "1.bias", "2.1.weight", "2.1.bias")),
        (nn.Linear, ("0.weight", "0.bias", "2.0.weight", "2.0.bias")),
        (lambda name, parameter: parameter.ndim == 2, ("0.weight", "2.0.weight")),
        (lambda name, parameter: name.startswith("1."), ("1.weight", "1.bias")),
    ],
)
def test_selection(network, params, names):
    space = ParameterSpace(network, params)
    named = dict(network.named_parameters())
    assert set(space.names) == set(names)
    assert len(space.names) == len(names) == len(space.parameters)
    assert all(named[name] is parameter for name, parameter in zip(space.names, space.parameters, strict=True))
    assert space.dimension == sum(named[name].numel() for name in names)


@pytest.mark.parametrize("params", [None, "*", "*.weight", nn.Linear])
def test_the_order_is_the_models(network, params):
    names = ParameterSpace(network, params).names
    assert list(names) == [name for name in ALL if name in names]


def test_frozen_parameters_are_left_out_by_default(network):
    network[0].weight.requires_grad_(False)
    assert "0.weight" not in ParameterSpace(network).names
    assert not network[0].weight.requires_grad


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_tied_weights_count_once_under_either_name(architecture):
    model = tiny_models.causal_lm(architecture)
    both = dict(model.named_parameters(remove_duplicate=False))
    (embedding,) = [name for name in both if name.endswith(("embed_tokens.weight", "wte.weight"))]
    weight = both[embedding]
    assert both["lm_head.weight"] is weight
    for params in (embedding, "lm_head.weight", "lm_head.*", [embedding, "lm_head.weight"]):
        space = ParameterSpace(model, params)
        assert len(space.parameters) == 1, params
        assert space.parameters[0] is weight
        assert space.dimension == weight.numel()
    assert ParameterSpace(model).dimension == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "params",
    ["no_such_layer.*", ["0.*", "no_such_layer.*"], re.compile("no_such_layer"), nn.Conv2d, lambda name, p: False],
    ids=["glob", "one glob of two", "regex", "module type", "predicate"],
)
def test_a_selection_of_nothing_is_refused_in_one_line(network, params):
    with pytest.raises(InputError) as caught:
        ParameterSpace(network, params)
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(params, str | list):
        assert "no_such_layer.*" in message
        assert "0.weight" in message  # names there are to choose from


def test_a_model_with_nothing_to_train_is_refused(network):
    network.requires_grad_(False)
    with pytest.raises(InputError):
        ParameterSpace(network)


def test_flatten_and_unflatten(network):
    space = ParameterSpace(network, ["0.weight", "2.*"])
    tensors = [normal(*parameter.shape, seed=i) for i, parameter in enumerate(space.parameters)]
    vector = space.flatten(tensors)
    assert torch.equal(vector, flat(tensors))
    views = space.unflatten(vector)
    assert isinstance(views, tuple)
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))
    vector.zero_()
    assert all(not view.any() for view in views)  # views, no copies


def test_flatten_takes_tensors_of_any_layout(network):
    space = ParameterSpace(network, "0.weight")
    tensor = normal(3, 4, seed=0).T  # not contiguous
    assert torch.equal(space.flatten([tensor]), tensor.contiguous().reshape(-1))


@pytest.mark.parametrize("size", [-1, 1])
def test_unflatten_refuses_another_size(network, size):
    space = ParameterSpace(network)
    with pytest.raises(InputError, match=str(space.dimension)):
        space.unflatten(torch.zeros(space.dimension + size))
