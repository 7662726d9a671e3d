"""Quantized layers: what they compute, what gets a gradient, and when there is noise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import normal
from torch import nn

import qat
from qat.layers.config import SUPPORTED_BITS
from qat.layers.linear import (
    QuantEmbedding,
    QuantLinear,
    decay_exempt,
    distinct_quant_layers,
    quant_layers,
    weight_names,
)
from qat.layers.quantizers.hadamard import hadamard
from qat.layers.quantizers.registry import QUANTIZERS, make_quantizer

SCHEMES = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths]
LEARNED = [(name, bits) for name, bits in SCHEMES if QUANTIZERS[name].learned_scale]


def linear(name="seq", bits=2, *, rows=3, columns=5, bias=True, transposed=False, dtype=torch.float64):
    weight = normal(rows, columns, seed=1, dtype=dtype)
    weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    offset = nn.Parameter(normal(rows, seed=2, dtype=dtype)) if bias else None
    return QuantLinear(weight, offset, make_quantizer(name, bits), transposed=transposed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_it_computes_with_the_dequantized_codes(name, bits, bias):
    layer = linear(name, bits, bias=bias)
    x = normal(2, 4, 5, seed=3)
    quantized = layer.quantizer.dequantize(layer.codes(), layer.scale)
    assert torch.equal(layer.quantized_weight(), quantized)
    assert torch.equal(layer(x), F.linear(x, quantized, layer.bias))
    assert layer.codes().dtype == torch.int8
    assert layer.mask().dtype == torch.bool
    assert (layer.in_features, layer.out_features) == (5, 3)


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_the_transposed_layout_is_the_same_layer(name, bits):
    plain, turned = linear(name, bits), linear(name, bits, transposed=True)
    x = normal(4, 5, seed=3)
    torch.testing.assert_close(turned(x), plain(x), rtol=1e-14, atol=1e-14)
    assert turned.weight.shape == (5, 3)
    assert (turned.in_features, turned.out_features) == (5, 3)
    for one, other in [
        (turned.quantized_weight(), plain.quantized_weight()),
        (turned.codes(), plain.codes()),
        (turned.mask(), plain.mask()),
    ]:
        assert one.shape == turned.weight.shape
        assert torch.equal(one.t(), other)
    assert torch.equal(turned.scale, plain.scale)
    plain(x).square().sum().backward()
    turned(x).square().sum().backward()
    torch.testing.assert_close(turned.weight.grad.t(), plain.weight.grad)
    if plain.quantizer.learned_scale:
        torch.testing.assert_close(turned.scale.grad, plain.scale.grad)


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_the_scale_is_a_parameter_only_where_it_is_learned(name, bits):
    layer = linear(name, bits)
    names = {key for key, _ in layer.named_parameters()}
    assert layer.scale.shape == (3, 1)
    if not layer.quantizer.learned_scale:
        assert names == {"weight", "bias"}
        with torch.no_grad():
            before = layer.scale.clone()
            layer.weight.mul_(2)
        torch.testing.assert_close(layer.scale, 2 * before)
        assert not layer.scale.requires_grad
    else:
        assert names == {"weight", "bias", "scale"}
        assert isinstance(layer.scale, nn.Parameter)
        assert "scale" in layer.state_dict()
        layer(normal(4, 5, seed=3)).sum().backward()
        assert layer.scale.grad is not None


def test_the_scale_parameter_lives_like_any_other():
    layer = linear()
    twin = copy.deepcopy(layer)
    assert twin.scale is not layer.scale
    assert torch.equal(twin.scale, layer.scale)
    assert layer.float().scale.dtype == torch.float32
    replaced = nn.Parameter(torch.ones(3, 1))
    layer.scale = replaced
    assert layer.scale is replaced
    out = torch.func.functional_call(
        twin, {"weight": twin.weight, "scale": 2 * twin.scale.detach(), "bias": twin.bias}, normal(2, 5, seed=3)
    )
    assert not torch.equal(out, twin(normal(2, 5, seed=3)))


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_noise_comes_fresh_before_quantization_and_in_train_mode_only(name, bits):
    torch.manual_seed(0)
    layer = linear(name, bits, bias=False)
    x = torch.eye(5, dtype=torch.float64)
    clean = layer(x)
    layer.noise_sigma = 0.3
    first, second = layer(x), layer(x)
    assert not torch.equal(first, clean)
    assert not torch.equal(first, second)
    if layer.quantizer.learned_scale:  # before quantization: what comes out is on the grid of the scale
        positions = first.t() / layer.scale
        levels = torch.tensor(layer.quantizer.levels, dtype=torch.float64)
        assert ((positions[..., None] - levels).abs().amin(-1) < 1e-12).all()
    assert torch.equal(layer.quantized_weight().t(), clean), "no noise in the weights that others read"
    layer.eval()
    assert torch.equal(layer(x), clean)
    layer.train()
    layer.noise_sigma = 0.0
    state = torch.get_rng_state()
    assert torch.equal(layer(x), clean)
    assert torch.equal(torch.get_rng_state(), state), "without noise nothing is drawn"


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_the_noise_has_the_size_it_is_given_and_the_gradient_is_taken_there(name, bits):
    layer = linear(name, bits, bias=False)
    x, sigma = normal(6, 5, seed=3), 0.2
    layer.noise_sigma = sigma
    torch.manual_seed(5)
    layer(x).pow(3).sum().backward()

    torch.manual_seed(5)
    noisy = layer.weight.detach() + sigma * torch.randn(3, 5, dtype=torch.float64)
    scale = layer.scale.detach() if layer.quantizer.learned_scale else layer.quantizer.initial_scale(noisy)
    q = layer.quantizer.dequantize(layer.quantizer.codes(noisy, scale), scale).requires_grad_()
    (upstream,) = torch.autograd.grad(F.linear(x, q).pow(3).sum(), q)
    turn = hadamard if name == "quest" else lambda rows: rows
    torch.testing.assert_close(layer.weight.grad, turn(turn(upstream) * layer.quantizer.mask(noisy, scale)))


def test_noise_on_scales():
    layer = linear("binary", 1, bias=False)
    layer.noise_sigma, x = 0.05, torch.eye(5, dtype=torch.float64)
    assert torch.equal(layer(x).abs().t(), layer.scale.expand(3, 5)), "by default the scales are left alone"
    layer.noise_scales = True
    torch.manual_seed(7)
    magnitudes = layer(x).abs()
    torch.manual_seed(7)
    torch.randn(3, 5, dtype=torch.float64)
    expected = layer.scale + 0.05 * torch.randn(3, 1, dtype=torch.float64)
    torch.testing.assert_close(magnitudes.t(), expected.expand(3, 5))
    plain = linear("rtn", 4)
    plain.noise_sigma, plain.noise_scales = 0.05, True
    plain(normal(2, 5, seed=3))  # no learned scale: nothing more to disturb


def test_16_bit_inputs_are_computed_in_16_bit():
    layer = linear(dtype=torch.float32)
    x = normal(2, 5, seed=3, dtype=torch.float32).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x, layer.quantized_weight().bfloat16(), layer.bias.bfloat16()))
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_embedding_gives_rows_of_the_quantized_table(name, bits):
    layer = QuantEmbedding(nn.Parameter(normal(6, 4, seed=1)), make_quantizer(name, bits), padding_idx=1)
    tokens = torch.tensor([[0, 1, 5], [2, 2, 1]])
    rows = layer(tokens)
    assert torch.equal(rows, layer.quantized_weight()[tokens])
    assert layer.scale.shape == (6, 1)
    rows.square().sum().backward()
    assert torch.equal(layer.weight.grad[[1, 3, 4]], torch.zeros(3, 4, dtype=torch.float64)), "padding and unused rows"
    assert layer.weight.grad[[0, 2, 5]].abs().sum() > 0


def test_embedding_returns_the_dtype_it_is_told():
    layer = QuantEmbedding(nn.Parameter(torch.randn(6, 4)), make_quantizer("lsq", 4), dtype=torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == torch.bfloat16


def test_layers_are_listed_with_names_and_ties_are_counted_once():
    shared = nn.Parameter(normal(6, 4, seed=1))
    model = nn.Module()
    model.table = QuantEmbedding(shared, make_quantizer("seq", 2))
    model.body = nn.Sequential(linear(columns=4, rows=4), nn.Tanh())
    model.head = QuantLinear(shared, None, make_quantizer("seq", 2))
    assert [name for name, _ in quant_layers(model)] == ["table", "body.0", "head"]
    assert [name for name, _ in distinct_quant_layers(model)] == ["table", "body.0"]
    assert weight_names(model) == ("table.weight", "body.0.weight")
    assert decay_exempt(model) == {"table.scale", "body.0.scale", "head.scale"}
    assert decay_exempt(nn.Sequential(linear("rtn", 4))) == frozenset()
    assert qat.quant_layers(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(("name", "bits"), LEARNED)
def test_one_element_rows_and_all_zero_rows(name, bits):
    weight = nn.Parameter(torch.tensor([[0.5], [-0.25], [0.0]]))
    layer = QuantLinear(weight, None, make_quantizer(name, bits))
    y = layer(torch.ones(1, 1))
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(layer.scale.grad).all()
    assert (layer.scale >= 1e-5).all()


def test_repr_names_the_quantizer():
    assert "in_features=5, out_features=3, bias=True, quantizer=StretchedElastic(bits=2)" in repr(linear())
    table = QuantEmbedding(nn.Parameter(torch.ones(6, 4)), make_quantizer("binary", 1))
    assert "rows=6, columns=4, quantizer=BinaryElastic(bits=1)" in repr(table)


@pytest.mark.parametrize(("name", "bits"), LEARNED)
def test_weights_of_a_plain_model_bring_a_scale_that_starts_from_them(name, bits):
    layer, other = linear(name, bits), nn.Linear(5, 3).double()
    state = {"weight": other.weight.detach() * 7, "bias": other.bias.detach()}
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        copy.deepcopy(layer).load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["scale"]
    assert torch.equal(layer.scale, layer.quantizer.initial_scale(state["weight"]))
    kept = {**layer.state_dict(), "scale": layer.scale.detach() * 2}
    layer.load_state_dict(kept)
    assert torch.equal(layer.scale, kept["scale"])
