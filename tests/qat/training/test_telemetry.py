"""Flip rate, distance to the grid, clipped share and relative gradient norm, counted by hand."""

import numpy as np
import pytest
import tiny_models
import torch
from oracles import normal
from torch import nn

import qat
from qat.training.telemetry import Telemetry
from spectra.backend.errors import InputError


def model_of(*rows, bits=1, scale=1.0):
    """One layer with the given weights, and that scale in every row."""
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows))
    qat.quantize_model(model, qat.QuantConfig(bits=bits))
    with torch.no_grad():
        model[0].scale.fill_(scale)
    return model


def test_numbers_by_hand():
    model = model_of([0.5, -3.0, 2.0], [1.0, -1.0, 0.25])
    numbers = Telemetry(model).measure()
    assert set(numbers) == {"flip_rate", "distance_to_grid", "clipped_share"}
    assert numbers["flip_rate"] == 0
    assert numbers["clipped_share"] == pytest.approx(2 / 6)  # -3 and 2; exactly on the bound is not clipped
    distance = 0.5**2 + 2**2 + 1**2 + 0 + 0 + 0.75**2
    size = 0.5**2 + 3**2 + 2**2 + 1 + 1 + 0.25**2
    assert numbers["distance_to_grid"] == pytest.approx(np.sqrt(distance / size), rel=1e-6)


def test_flips_are_counted_since_the_previous_call():
    model = model_of([0.5, -3.0, 2.0], [1.0, -1.0, 0.25])
    telemetry = Telemetry(model)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.5
        model[0].weight[1, 1] = -0.2  # moves within its cell
    assert telemetry.measure()["flip_rate"] == pytest.approx(1 / 6)
    assert telemetry.measure()["flip_rate"] == 0
    with torch.no_grad():
        model[0].weight.neg_()
    assert telemetry.measure()["flip_rate"] == 1
    with torch.no_grad():
        model[0].weight.neg_()
        model[0].weight.neg_()
    assert telemetry.measure()["flip_rate"] == 0, "there and back between two calls is not seen"


def test_a_scale_alone_can_flip_codes():
    model = model_of([0.9, 0.2], [0.1, -0.9], bits=2)
    telemetry = Telemetry(model)
    before = model[0].codes()
    with torch.no_grad():
        model[0].scale.fill_(3.0)
    assert telemetry.measure()["flip_rate"] == (before != model[0].codes()).float().mean().item() > 0


def test_the_gradient_norm_is_relative_and_left_out_without_gradients():
    model = model_of([0.5, -3.0, 2.0], [1.0, -1.0, 0.25])
    telemetry = Telemetry(model)
    assert "relative_gradient_norm" not in telemetry.measure()
    model[0].weight.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    size = np.sqrt(0.5**2 + 3**2 + 2**2 + 1 + 1 + 0.25**2)
    assert telemetry.measure()["relative_gradient_norm"] == pytest.approx(5 / size, rel=1e-6)
    model.zero_grad()
    assert "relative_gradient_norm" not in telemetry.measure()


def test_several_layers_count_by_weight_and_ties_once():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["table"].weight
    qat.quantize_model(model, qat.QuantConfig(bits=1, quantize_head=True, quantize_embeddings=True))
    telemetry = Telemetry(model)
    with torch.no_grad():
        model["table"].weight.neg_()
    assert telemetry.measure()["flip_rate"] == pytest.approx(24 / 40)
    model["table"].weight.grad = torch.ones(6, 4)
    assert "relative_gradient_norm" not in telemetry.measure(), "one gradient is missing"


def test_norms_are_accumulated_in_float64():
    model = nn.Sequential(nn.Linear(2000, 2000, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(1e-2 * normal(2000, 2000, seed=1).float())
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    weight, quantized = (tensor.detach().double() for tensor in (model[0].weight, model[0].quantized_weight()))
    exact = ((weight - quantized).norm() / weight.norm()).item()
    assert Telemetry(model).measure()["distance_to_grid"] == pytest.approx(exact, rel=1e-6)


def test_measuring_changes_nothing_and_ignores_noise():
    model = model_of([0.5, -3.0, 2.0], [1.0, -1.0, 0.25]).train()
    model[0].noise_sigma = 10.0
    telemetry = Telemetry(model)
    state = torch.get_rng_state()
    assert telemetry.measure() == telemetry.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[0].weight.grad is None


def test_a_model_on_the_grid_and_a_model_of_zeros():
    model = model_of([0.5, -3.0, 2.0], [1.0, -1.0, 0.25])
    qat.interpolate_(model, alpha=1.0)
    numbers = Telemetry(model).measure()
    assert numbers["distance_to_grid"] == numbers["clipped_share"] == 0
    assert Telemetry(model_of([0.0, 0.0])).measure()["distance_to_grid"] == 0


def test_a_full_precision_model_is_refused():
    with pytest.raises(InputError, match="no quantized layers"):
        Telemetry(nn.Linear(2, 2))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_measured_together_give_the_sums_of_each_alone(architecture, bits, monkeypatch):
    """Rows of alike layers are measured as one matrix; the numbers are those of a layer after the other."""
    model = tiny_models.causal_lm(architecture, dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=bits))
    together = Telemetry(model)
    with monkeypatch.context() as patched:
        patched.setattr("qat.training.telemetry.SCHEMES", {})
        alone = Telemetry(model)
    assert (len(together._groups) < len(alone._groups)) == (architecture == "llama")
    for seed in (1, 2):
        for index, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.add_(0.1 * normal(*parameter.shape, seed=100 * seed + index).float())
            parameter.grad = normal(*parameter.shape, seed=200 * seed + index).float()
        assert together.measure() == pytest.approx(alone.measure(), rel=1e-12)
        assert all(torch.equal(one, other) for one, other in zip(together._codes, alone._codes, strict=True))


def test_no_more_weights_than_allowed_are_measured_together(monkeypatch):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    largest = max(layer.weight.numel() for _, layer in qat.quant_layers(model))
    monkeypatch.setattr("qat.training.telemetry.MEASURED_TOGETHER", largest)
    telemetry = Telemetry(model)
    sizes = [sum(telemetry._layers[index].weight.numel() for index in group) for group in telemetry._groups]
    assert max(sizes) <= largest
    assert sorted(index for group in telemetry._groups for index in group) == list(range(len(telemetry._layers)))


def test_lost_updates_are_those_that_16_bits_cannot_hold():
    model = model_of([1.0, 1.0, 1.0, 1.0], bits=1).bfloat16()
    telemetry, layer = Telemetry(model), model[0]
    telemetry.before_update()
    layer.weight.grad = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.add_(torch.tensor([[1e-3, 1e-3, 1e-1, 0.0]], dtype=torch.bfloat16))
    assert telemetry.measure()["lost_updates"] == pytest.approx(2 / 3)
    assert "lost_updates" not in telemetry.measure()
