"""Quantized keys and values: what lies in the model's own cache, against its full-precision content."""

import copy

import model_families
import pytest
import torch
import transformers as t
from model_families import COMMON, CONFIGS, MODERN
from oracles import normal
from torch import nn

import qat
from qat.layers.activations import quantize_activations
from qat.layers.cache import CacheQuantizer, Heads, cache_projections
from spectra.backend.errors import InputError

# Families whose cached keys are the projections' outputs at every position, and those that rotate all but the first.
PLAIN = ("gpt2", "opt", "bloom", "mpt", "falcon-alibi")
ROTATED = ("llama", "gpt-neox", "phi", "phi3", "falcon", "falcon-groups")
NORMED = ("qwen3",)
# Features of keys and values together where heads share them; else twice the hidden size.
FEATURES = {"llama": 16, "phi3": 16, "falcon": 8, "falcon-groups": 16}
TOKENS = torch.arange(2, 22).reshape(2, 10)


def build(family):
    model = model_families.causal_lm(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def cached(model):
    """Keys and values of the first layer, (batch, heads, tokens, head dimension)."""
    layer = model(input_ids=TOKENS, use_cache=True).past_key_values.layers[0]
    return layer.keys.detach(), layer.values.detach()


def twins(family, **options):
    """A model with quantized weights, and one with a quantized cache as well: equal up to the first cache."""
    model = build(family)
    other = copy.deepcopy(model)
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    report = qat.quantize_model(other, qat.QuantConfig(bits=4, **options))
    return model, other, report


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False)])
@pytest.mark.parametrize("name", PLAIN + ROTATED + NORMED)
def test_the_cache_holds_quantized_heads(name, bits, symmetric):
    """Values at every position; keys where nothing happens to them after the projection."""
    model, other, report = twins(name, cache_bits=bits, activation_symmetric=symmetric)
    assert report.cache_bits == bits
    (keys, values), (quantized_keys, quantized_values) = cached(model), cached(other)
    expected = quantize_activations(values, bits, symmetric=symmetric)
    assert not torch.equal(expected, values)
    torch.testing.assert_close(quantized_values, expected)
    if name in NORMED:
        return
    positions = slice(None) if name in PLAIN else slice(0, 1)  # the rotation of the first position is the identity
    expected = quantize_activations(keys[:, :, positions], bits, symmetric=symmetric)
    torch.testing.assert_close(quantized_keys[:, :, positions], expected)


@pytest.mark.parametrize("name", PLAIN + ROTATED)
def test_queries_are_not_quantized(name):
    """A hook on the projections: what is changed is as much as keys and values are."""
    model = build(name)
    projections = cache_projections(model)
    found = {}

    def keep(key):
        return lambda module, inputs, output: found.setdefault(key, output.detach())

    for key, (module, _) in projections.items():
        module.register_forward_hook(keep(key))
    model(input_ids=TOKENS)
    first = [key for key in projections if ".0." in key]
    changed = 0
    for key in first:
        module, heads = projections[key]
        output = CacheQuantizer(heads, 4)(module, (), found[key])
        assert output.shape == found[key].shape
        changed += (output != found[key]).reshape(-1, output.shape[-1]).any(0).sum().item()
    width = FEATURES.get(name, 32)
    assert 0.7 * width < changed <= width, "the largest entry of a head lies on its grid"


def test_layouts():
    output = normal(2, 3, 24, seed=1)
    quantized = CacheQuantizer(Heads(1, 0, 8), 4)(None, (), output)
    assert torch.equal(quantized, quantize_activations(output.reshape(2, 3, 3, 8), 4).reshape(2, 3, 24))
    by_head = CacheQuantizer(Heads(2, 1, 4), 4)(None, (), output)  # q k v, q k v, each of 4 features
    for start in (0, 12):
        assert torch.equal(by_head[..., start : start + 4], output[..., start : start + 4])
        for first in (start + 4, start + 8):
            expected = quantize_activations(output[..., first : first + 4], 4)
            assert torch.equal(by_head[..., first : first + 4], expected)


def test_generation_with_a_cache_is_that_without():
    model, other, _ = twins("llama", cache_bits=4)
    with torch.no_grad():
        whole = other(input_ids=TOKENS).logits
        first = other(input_ids=TOKENS[:, :6], use_cache=True)
        rest = other(input_ids=TOKENS[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(whole, model(input_ids=TOKENS).logits, atol=1e-3)


def test_projections_in_full_precision_are_quantized_too():
    config = qat.QuantConfig(bits=4, cache_bits=4, skip=("*.k_proj", "*.v_proj"))
    model = build("llama")
    values = cached(model)[1]
    qat.quantize_model(model, config)
    torch.testing.assert_close(cached(model)[1], quantize_activations(values, 4))


@pytest.mark.parametrize("bits", [8, 4])
def test_spectra_through_a_quantized_cache(bits):
    model = build("llama").double()
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=8, cache_bits=bits))
    for mode in qat.MODES:
        operator = qat.hessian_operator(model, [{"input_ids": TOKENS, "labels": TOKENS}], mode, sigma=1e-2, draws=1)
        assert (operator @ normal(operator.shape[0], seed=2)).norm() > 0  # checks differences of the gradient first
        assert operator.symmetry_gap() < 1e-5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential has none: leave cache_bits=16"),
        (lambda: t.BertModel(t.BertConfig(**COMMON, **MODERN)), "BertSelfAttention .*neither k_proj and v_proj"),
        (lambda: t.GPTBigCodeForCausalLM(CONFIGS["gpt-bigcode"]()), "GPTBigCodeAttention .*leave cache_bits"),
    ],
)
def test_models_without_a_known_layout_are_refused(model, message):
    model = model()
    with pytest.raises(InputError, match=message) as caught:
        qat.quantize_model(model, qat.QuantConfig(bits=4, cache_bits=4))
    assert "\n" not in str(caught.value)
    assert qat.quant_layers(model) == [], "a refusal leaves the model as it was"
