"""Which parameters are chosen, in which order, and each counted once."""

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


class Odd(nn.Module):
    """Parameters that are no matrices of real numbers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale, self.none = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.empty(0, 3))
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.mask = nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(2, dtype=dtype))


def test_scalar_and_empty_parameters_are_counted_and_integers_left_out():
    space = ParameterSpace(Odd())
    assert space.names == ("scale", "none", "weight")
    assert space.dimension == 3
    scale, none, weight = space.unflatten(torch.arange(3.0))
    assert (scale.shape, none.shape, weight.tolist()) == ((), (0, 3), [1.0, 2.0])
    assert [space.name_at(i) for i in range(3)] == ["scale", "weight", "weight"]


@pytest.mark.parametrize(
    ("model", "params", "cause"),
    [
        (Odd(torch.complex64), None, "complex64"),
        (Odd(), "index", "int64"),
        (Odd(), "none", "no numbers"),
        (nn.LazyLinear(3), None, "lazy module"),
        (nn.Linear(2, 2, device="meta"), None, "meta device"),
        (Odd(), 3, "int"),
        (Odd(), [], "empty list"),
        (Odd(), nn.Linear(2, 2), "the Linear given"),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused_in_a_line(model, params, cause):
    with pytest.raises(InputError, match=cause) as error:
        ParameterSpace(model, params)
    assert "\n" not in str(error.value)


def test_renewed_parameters_are_those_of_the_same_names(network):
    space = ParameterSpace(network, "2.*")
    network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()}, assign=True)
    renewed = space.renewed(network)
    assert renewed.names == space.names
    assert all(p is dict(network.named_parameters())[n] for n, p in zip(renewed.names, renewed.parameters, strict=True))
    assert not set(map(id, renewed.parameters)) & set(map(id, space.parameters))


@pytest.mark.parametrize("change", ["gone", "shape", "dtype", "tied"])
def test_other_parameters_are_refused(change):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    space = ParameterSpace(network)
    if change == "gone":
        network[1] = nn.Identity()
    elif change == "tied":
        network[1].weight = network[0].weight
    else:
        values = torch.zeros(4, 3) if change == "shape" else torch.zeros(3, 3, dtype=torch.float64)
        network[1].weight = nn.Parameter(values)
    with pytest.raises(InputError, match="make a new operator"):
        space.renewed(network)
