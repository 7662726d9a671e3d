"""The searched initial scale against a brute search in small steps."""

import pytest
import torch
from oracles import normal
from torch import nn

import qat
from qat.layers.config import SUPPORTED_BITS
from qat.layers.quantizers.registry import QUANTIZERS, make_quantizer
from qat.layers.quantizers.scale_search import COARSE, least_error_scale

LEARNED = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths if QUANTIZERS[name].learned_scale]


def errors(quantizer, weight, scale):
    return (weight - quantizer.dequantize(quantizer.codes(weight, scale), scale)).square().sum(1)


def heavy_tailed(rows, columns, seed):
    """Normal numbers, with a large one in some rows."""
    weight = 0.02 * normal(rows, columns, seed=seed)
    weight[::3, 0] *= 30
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "bits"), LEARNED)
def test_it_finds_the_least_error(name, bits, dtype):
    quantizer, weight = make_quantizer(name, bits), heavy_tailed(12, 64, 1).to(dtype)
    found, start = least_error_scale(quantizer, weight), quantizer.initial_scale(weight)
    assert found.shape == start.shape
    assert found.dtype == dtype
    error = errors(quantizer, weight, found)
    before = errors(quantizer, weight, start)
    assert (error <= before * (1 + 1e-6)).all()
    assert error.sum() < 0.95 * before.sum() or name == "binary"  # whose start has the least error
    trials = [errors(quantizer, weight, start * factor) for factor in torch.logspace(-2.2, 0.3, 2000)]
    best = torch.stack(trials).amin(0)
    slack = 1.25 if bits == 8 else 1.005  # the error of 256 levels has as many minima as a row has weights, or more
    assert (error <= slack * best).all(), (error / best).max()
    # the size of the weights does not matter
    torch.testing.assert_close(least_error_scale(quantizer, 2**30 * weight), 2**30 * found, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "bits"), LEARNED)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 5)])
def test_zeros_and_nothing_start_as_without_a_search(name, bits, shape):
    quantizer, weight = make_quantizer(name, bits), torch.zeros(shape)
    assert torch.equal(least_error_scale(quantizer, weight), quantizer.initial_scale(weight))


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_start_from_it(group_size, transposed):
    weight = heavy_tailed(6, 16, 2)
    parameter = nn.Parameter(weight.t().contiguous() if transposed else weight)
    quantizer = make_quantizer("seq", 2)
    options = {"transposed": transposed, "group_size": group_size}
    layer = qat.QuantLinear(parameter, None, quantizer, initial_scale="mse", **options)
    want = least_error_scale(quantizer, weight.reshape(-1, group_size or 16))
    assert torch.equal(layer.scale, want.reshape(6, -1))
    plain = qat.QuantLinear(parameter, None, quantizer, **options)
    assert (layer.quantized_weight() - parameter).norm() < (plain.quantized_weight() - parameter).norm()


def test_the_config_asks_for_it():
    weight = normal(16, 256, seed=3)
    scales = {}
    for start in ("max", "mse"):
        model = nn.Sequential(nn.Linear(256, 16, dtype=torch.float64))
        model[0].weight = nn.Parameter(weight.clone())
        qat.quantize_model(model, qat.QuantConfig(bits=2, initial_scale=start))
        scales[start] = model[0].scale
    assert (scales["mse"] < scales["max"]).all()
    # levels of +-s/4 and +-3s/4 fit normal numbers best at s = 2 * 0.9957 (Max, 1960)
    assert scales["mse"].mean().item() == pytest.approx(1.991, rel=0.02)


def test_the_factors_tried_lie_between_1_and_a_64th_four_an_octave():
    assert COARSE.tolist() == pytest.approx([0.5 ** (i / 4) for i in range(25)])
    assert (float(COARSE[0]), float(COARSE[-1])) == (1.0, 1 / 64)
