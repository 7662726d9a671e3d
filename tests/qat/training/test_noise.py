"""Noise drawn for all layers at once: its distribution, its freshness, who gets it, and what it leaves behind."""

import pytest
import tiny_models
import torch

import qat
from qat.training.noise import DrawnNoise


def noisy_model(architecture="llama", sigma=0.1):
    model = tiny_models.causal_lm(architecture, dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    for _, layer in qat.quant_layers(model):
        layer.noise_sigma = sigma
    return model.train()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # the latter has transposed weights
def test_each_layer_computes_with_its_own_part_and_it_is_normal(architecture):
    model = noisy_model(architecture)
    noise = DrawnNoise(model)
    torch.manual_seed(1)
    noise.draw()
    parts = []
    for _, layer in qat.quant_layers(model):
        part = layer.drawn_noise
        assert part.shape == layer.rows().shape
        assert part.data_ptr() % 64 == 0
        want = layer.quantizer(layer.rows() + layer.noise_sigma * part, layer.scale)
        assert torch.equal(layer.training_weight(), want)
        parts.append(part.flatten())
    together = torch.cat(parts)
    count = len(together)
    assert abs(together.mean()) < 5 / count**0.5
    assert abs(together.square().mean() - 1) < 5 * (2 / count) ** 0.5
    assert len(together.unique()) > 0.99 * count  # no two layers share numbers


def test_every_draw_is_another_and_a_seed_repeats_it():
    model = noisy_model()
    noise, layer = DrawnNoise(model), qat.quant_layers(model)[0][1]
    seen = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        noise.draw()
        seen.append(layer.drawn_noise.clone())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_only_layers_that_train_with_noise_get_it_and_none_keeps_it():
    model = noisy_model()
    layers = [layer for _, layer in qat.quant_layers(model)]
    noise = DrawnNoise(model)
    layers[0].noise_sigma = 0.0
    layers[1].eval()
    noise.draw()
    assert [layer.drawn_noise is None for layer in layers] == [True, True] + [False] * (len(layers) - 2)
    layers[0].noise_sigma = 0.1
    noise.draw()
    assert layers[0].drawn_noise is not None
    model.eval()
    noise.draw()
    assert all(layer.drawn_noise is None for layer in layers)
    noise.draw()
    noise.clear()
    assert all(layer.drawn_noise is None for layer in layers)


def test_a_model_without_noise_or_quantized_layers_costs_nothing():
    models = noisy_model(sigma=0.0), torch.nn.Linear(3, 3)
    state = torch.get_rng_state()
    for model in models:
        noise = DrawnNoise(model)
        noise.draw()
        assert noise._memory == []
    assert torch.equal(torch.get_rng_state(), state)
