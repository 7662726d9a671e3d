"""The ranking of a model's layers by what quantization costs them."""

import copy

import pytest
import tiny_models
import torch
from torch.nn import functional

import qat
import spectra


@pytest.fixture
def case():
    torch.manual_seed(0)
    return tiny_models.mlp(), tiny_models.regression((9, 4))


@pytest.mark.parametrize("bits", [2, 4])
def test_squared_errors_and_traces_are_those_of_the_config(case, bits):
    model, batches = case
    before = copy.deepcopy(model.state_dict())
    ranking = qat.sensitivity(model, batches, qat.QuantConfig(bits=bits), probes=100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not qat.quant_layers(model)
    assert {block.name for block in ranking.blocks} == {"0.weight", "2.weight"}
    quantized = copy.deepcopy(model)
    qat.quantize_model(quantized, qat.QuantConfig(bits=bits))
    for name, layer in qat.quant_layers(quantized):
        found = ranking[f"{name}.weight"]
        error = (layer.quantized_weight() - layer.weight).detach()
        assert found.squared_error == pytest.approx(float(error.square().sum()))
        own = spectra.HessianOperator(model, batches, params=f"{name}.weight").to_dense()
        assert found.trace.value == pytest.approx(float(own.trace()), rel=1e-6)


def test_a_quantized_model_is_ranked_at_its_latent_weights(case):
    model, batches = case
    want = qat.sensitivity(model, batches, qat.QuantConfig(bits=2), probes=100)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    found = qat.sensitivity(model, batches, probes=100, loss=functional.mse_loss)
    for block in want.blocks:
        assert found[block.name].sensitivity.value == pytest.approx(block.sensitivity.value, rel=1e-6)
    with pytest.raises(qat.InputError, match="quantized already"):
        qat.sensitivity(model, batches, qat.QuantConfig(bits=4))


def test_tied_weights_and_layers_of_a_language_model():
    model, batches = tiny_models.causal_lm("llama-tied"), tiny_models.token_batches()
    config = qat.QuantConfig(bits=4, quantize_head=True, quantize_embeddings=True)
    ranking = qat.sensitivity(model, batches, config, blocks="layers", probes=4)
    assert {block.name for block in ranking.blocks} == {"model.embed_tokens", "model.layers.0", "model.layers.1"}
    assert ranking["model.embed_tokens"].dimension == 192
