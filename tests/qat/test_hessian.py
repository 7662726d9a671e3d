"""Each definition of the Hessian against one built densely from the full-precision network, in float64."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from oracles import dense_hessian, normal, random_state, relative_error, same_random_state
from tiny_models import causal_lm, mlp, regression, token_batches
from torch import nn
from torch.func import functional_call

import qat
from qat.layers.config import SUPPORTED_BITS
from qat.layers.quantizers.hadamard import hadamard
from qat.layers.quantizers.registry import QUANTIZERS
from spectra.backend.errors import InputError

SCHEMES = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths]
CASES = [(name, bits, None) for name, bits in SCHEMES]  # and in groups of two columns
CASES += [("binary", 1, 2), ("seq", 1.58, 2), ("lsq", 4, 2), ("rtn", 2, 2), ("quest", 3, 2), ("parq", 2, 2)]
LEARNED = [case for case in CASES if QUANTIZERS[case[0]].learned_scale]
WEIGHTS = ("0.weight", "2.weight")
COUNT = 42  # weights of the two layers


def models(name, bits, group=None, *, shrink=0.6):
    """A full-precision network and its quantized twin; learned scales small enough to clip a few weights."""
    plain = mlp(seed=3)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2.0)
    quantized = copy.deepcopy(plain)
    qat.quantize_model(quantized, qat.QuantConfig(bits=bits, quantizer=name, group_size=group))
    with torch.no_grad():
        for _, layer in qat.quant_layers(quantized):
            if layer.quantizer.learned_scale:
                layer.scale.mul_(shrink)
    return plain, quantized


def batches():
    return regression((5, 3), seed=4)


def loss_of(model, data):
    """Mean over all rows of the squared error, whatever the batches."""
    errors = torch.cat([(model(x) - y).square().mean(1) for x, y in data])
    return errors.mean()


def hessian_at(plain, weights, data):
    """H(V): the dense Hessian of the full-precision network with `weights` in place of its own, in these weights."""
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]

    def network(x):
        return functional_call(plain, dict(zip(WEIGHTS, leaves, strict=True)), x)

    return dense_hessian(loss_of(network, data), leaves)


def quantized_weights(model):
    return [layer.quantized_weight().detach() for _, layer in qat.quant_layers(model)]


def jacobian(layers, weights):
    """dQ/dW, dense: the mask on its diagonal, but for `quest`, which masks the transform of each row or group."""
    blocks = []
    for layer, w in zip(layers, weights, strict=True):
        scale = layer.scale if layer.quantizer.learned_scale else layer.quantizer.initial_scale(w)
        mask = layer.quantizer.mask(w, scale).double()
        for row in mask.reshape(-1, getattr(layer.quantizer, "size", mask.shape[1])):
            turn = torch.eye(len(row), dtype=torch.float64)
            turn = hadamard(turn) if layer.quantizer.name == "quest" else turn
            blocks.append(turn.T @ torch.diag(row) @ turn)
    return torch.block_diag(*blocks)


def measured(model, data, mode, **options):
    """The dense Hessian that autograd finds within the mode."""
    weights = [layer.weight for _, layer in qat.quant_layers(model)]
    with qat.hessian_mode(model, mode, **options):
        loss = loss_of(model, data)
    return dense_hessian(loss, weights)


def noise_of(model, *, draw, seed, sigma):
    """The weight noise U of the mode, from the generator that the mode uses."""
    from qat.hessian import _standard_normal

    return [sigma * _standard_normal(layer.rows(), f"{seed}/{draw}/{name}") for name, layer in qat.quant_layers(model)]


@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_ste_is_m_h_m(name, bits, group):
    plain, model = models(name, bits, group)
    layers = [layer for _, layer in qat.quant_layers(model)]
    by_weight = jacobian(layers, [layer.weight.detach() for layer in layers])
    if QUANTIZERS[name].learned_scale:
        assert 0 < by_weight.trace() < COUNT, "some weights are clipped and some are not"
    expected = by_weight.T @ hessian_at(plain, quantized_weights(model), batches()) @ by_weight
    dense = measured(model, batches(), "ste")
    assert relative_error(dense, expected) < 1e-12
    assert (dense - dense.T).abs().max() < 1e-13 * dense.abs().max()


@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_quantized_is_h_at_the_quantized_weights(name, bits, group):
    plain, model = models(name, bits, group)
    expected = hessian_at(plain, quantized_weights(model), batches())
    assert relative_error(measured(model, batches(), "quantized"), expected) < 1e-12


@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_latent_is_h_at_the_weights_and_between(name, bits, group):
    plain, model = models(name, bits, group)
    latent = [layer.weight.detach() for _, layer in qat.quant_layers(model)]
    grid = quantized_weights(model)
    for point in (None, 0, 0.3, 0.8, 1):
        t = point or 0.0
        at = [w + t * (q - w) for w, q in zip(latent, grid, strict=True)]
        expected = hessian_at(plain, at, batches())
        assert relative_error(measured(model, batches(), "latent", point=point), expected) < 1e-12
    with qat.hessian_mode(model, "latent"):
        assert torch.equal(loss_of(model, batches()), loss_of(plain, batches()))
    with qat.hessian_mode(model, "latent", point=1):
        at_grid = loss_of(model, batches())
    with qat.hessian_mode(model, "quantized"):
        assert torch.equal(at_grid, loss_of(model, batches())), "point 1 is the quantized network, exactly"


@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_noisy_is_ste_at_the_noisy_weights(name, bits, group):
    plain, model = models(name, bits, group)
    layers = [layer for _, layer in qat.quant_layers(model)]
    expected = 0
    for draw in range(3):
        noise = noise_of(model, draw=draw, seed=5, sigma=0.1)
        noisy = [layer.weight.detach() + u for layer, u in zip(layers, noise, strict=True)]
        by_weight = jacobian(layers, noisy)
        grid = []
        for layer, w in zip(layers, noisy, strict=True):
            scale = layer.scale if layer.quantizer.learned_scale else layer.quantizer.initial_scale(w)
            grid.append(layer.quantizer(w, scale).detach())
        expected_draw = by_weight.T @ hessian_at(plain, grid, batches()) @ by_weight
        dense = measured(model, batches(), "noisy", draw=draw, seed=5, sigma=0.1)
        assert relative_error(dense, expected_draw) < 1e-12
        expected = expected + expected_draw / 3
    operator = qat.hessian_operator(model, batches(), "noisy", draws=3, seed=5, sigma=0.1)
    assert relative_error(operator @ torch.eye(COUNT, dtype=torch.float64), expected) < 1e-12


@pytest.mark.parametrize("mode", qat.MODES)
@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_the_operator_is_the_dense_matrix_of_its_mode(name, bits, group, mode):
    _, model = models(name, bits, group)
    operator = qat.hessian_operator(model, batches(), mode, draws=1, sigma=0.1)
    assert operator.shape == (COUNT, COUNT), "by default the latent weights alone: no biases, no scales"
    expected = measured(model, batches(), mode, **({"sigma": 0.1} if mode == "noisy" else {}))
    assert relative_error(operator @ torch.eye(COUNT, dtype=torch.float64), expected) < 1e-12
    assert operator.symmetry_gap() < 1e-12


@pytest.mark.parametrize(("name", "bits", "group"), LEARNED)
def test_weights_with_scales_are_symmetric(name, bits, group):
    _, model = models(name, bits, group)
    operator = qat.hessian_operator(model, batches(), "ste", params=["*.weight", "*.scale"])
    count = COUNT + (9 if group is None else COUNT // group)
    assert operator.shape == (count, count)
    assert operator.symmetry_gap() < 1e-12
    dense = operator @ torch.eye(count, dtype=torch.float64)
    parameters = [p for key, p in model.named_parameters() if not key.endswith("bias")]
    expected = dense_hessian(loss_of(model, batches()), parameters)
    assert relative_error(dense, expected) < 1e-12
    assert (expected - expected.T).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("mode", qat.MODES)
def test_every_mode_on_a_language_model(mode, bits):
    model = causal_lm("llama")
    qat.quantize_model(model, qat.QuantConfig(bits=bits))
    operator = qat.hessian_operator(model, token_batches(), mode, sigma=1e-2, draws=2)
    vector = normal(operator.shape[0], seed=6)
    product = operator @ vector
    assert torch.isfinite(product).all()
    assert product.norm() > 0
    assert operator.symmetry_gap() < 1e-5  # transformers' own float32 inside
    if mode == "ste":
        mask = torch.cat([layer.mask().reshape(-1) for _, layer in qat.quant_layers(model)])
        assert torch.equal(product[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


def test_conv1d_and_batches_one_by_one():
    """The transposed layout, and that an iterator of batches serves every draw."""
    model = causal_lm("gpt2")
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    data = token_batches()
    from_list = qat.hessian_operator(model, data, "noisy", draws=2, sigma=1e-2)
    from_iterator = qat.hessian_operator(model, iter(data), "noisy", draws=2, sigma=1e-2)
    vector = normal(from_list.shape[0], seed=6)
    assert torch.equal(from_list @ vector, from_iterator @ vector)


def test_noise_is_fixed_by_seed_draw_and_layer_and_leaves_random_states_alone():
    _, model = models("lsq", 8, shrink=1.0)
    x = normal(4, 4, seed=7)

    def output(**options):
        with qat.hessian_mode(model, "noisy", sigma=0.1, **options):
            return model(x).detach()

    before = random_state()
    first = output()
    assert same_random_state(before, random_state())
    torch.manual_seed(1234)
    assert torch.equal(output(), first)
    assert not torch.equal(output(draw=1), first)
    assert not torch.equal(output(seed=1), first)
    model.train()
    assert torch.equal(output(), first)
    model.eval()
    assert torch.equal(output(), first)
    with qat.hessian_mode(model, "noisy", sigma=0.1):
        assert torch.equal(model(x), model(x)), "one draw for all forward passes"
    copied = copy.deepcopy(model)
    with qat.hessian_mode(copied, "noisy", sigma=0.1):
        assert torch.equal(copied(x).detach(), first)


def test_noise_is_standard_normal_and_differs_between_layers_of_a_shape():
    from qat.hessian import _standard_normal

    like = torch.zeros(200, 200, dtype=torch.float64)
    one, other = _standard_normal(like, "0/0/a"), _standard_normal(like, "0/0/b")
    assert one.mean().item() == pytest.approx(0, abs=0.02)
    assert one.std().item() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(one.flatten(), other.flatten())[0, 1] == pytest.approx(0, abs=0.02)


def test_sigma_defaults_to_that_of_the_layers():
    _, model = models("lsq", 4)
    x = normal(4, 4, seed=7)
    with pytest.raises(InputError, match="needs a noise size"), qat.hessian_mode(model, "noisy"):
        pass
    for _, layer in qat.quant_layers(model):
        layer.noise_sigma = 0.07
    with qat.hessian_mode(model, "noisy"):
        default = model(x)
    with qat.hessian_mode(model, "noisy", sigma=0.07):
        assert torch.equal(model(x), default)


@pytest.mark.parametrize("mode", qat.MODES)
def test_everything_comes_back_also_after_an_error_and_when_nested(mode):
    _, model = models("seq", 2)
    x = normal(4, 4, seed=7)
    model.eval()
    plain = model(x)
    state = copy.deepcopy(model.state_dict())
    options = {"sigma": 0.1} if mode == "noisy" else {}
    with pytest.raises(RuntimeError, match="inside"), qat.hessian_mode(model, mode, **options):
        raise RuntimeError("inside")
    assert torch.equal(model(x), plain)
    with qat.hessian_mode(model, "latent"):
        latent = model(x)
        with qat.hessian_mode(model, mode, **options):
            model(x)
        assert torch.equal(model(x), latent)
    assert torch.equal(model(x), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert all(layer.weight_override is None for _, layer in qat.quant_layers(model))


@pytest.mark.parametrize("mode", ["ste", "quantized", "latent"])
def test_training_noise_is_off_inside(mode):
    _, model = models("seq", 2)
    x = normal(4, 4, seed=7)
    with qat.hessian_mode(model, mode):
        expected = model(x)
    model.train()
    for _, layer in qat.quant_layers(model):
        layer.noise_sigma = 0.5
    with qat.hessian_mode(model, mode):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), model(x)), "and on again outside"


def test_a_copy_in_another_precision_is_measured_in_the_mode_asked_for():
    _, model = models("seq", 2)
    model.float()
    exact = qat.hessian_operator(copy.deepcopy(model).double(), batches(), "latent")
    copied = qat.hessian_operator(model, batches(), "latent", precision="float64")
    vector = normal(COUNT, seed=8)
    torch.testing.assert_close(copied @ vector, exact @ vector, rtol=1e-12, atol=1e-12)
    ste = qat.hessian_operator(model, batches(), "ste", precision="float64")
    assert relative_error(ste @ vector, exact @ vector) > 1e-3


@pytest.mark.parametrize(("name", "bits", "group"), CASES)
def test_a_plain_operator_is_ste(name, bits, group):
    from spectra import HessianOperator

    _, model = models(name, bits, group)
    plain = HessianOperator(model, batches(), params=list(WEIGHTS)).to_dense()
    wanted = measured(model, batches(), "ste")
    assert wanted.abs().max() > 1e-3
    assert relative_error(plain, wanted) < 1e-9


def test_it_serves_a_probe_as_builder():
    from spectra import SpectrumProbe

    _, model = models("seq", 2)
    modes = {mode: partial(qat.hessian_operator, mode=mode, sigma=0.1, draws=2) for mode in qat.MODES}
    probe = SpectrumProbe(model, batches(), modes=modes, probes=2, steps=5)
    records = probe.measure(0)
    assert [record.mode for record in records] == list(qat.MODES)
    assert all(record.dimension == COUNT for record in records)
    assert len({record.estimates["trace"].value for record in records}) == len(qat.MODES)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("full", {}, "mode must be one of ste, quantized, latent, noisy; got 'full'"),
        ("ste", {"point": 0.5}, "point goes with mode 'latent'"),
        ("latent", {"point": 1.5}, r"lies in \[0, 1\]"),
        ("noisy", {"sigma": 0.0}, "needs a noise size above 0"),
        ("noisy", {"sigma": float("nan")}, "needs a noise size above 0"),
    ],
)
def test_refusals(mode, options, message):
    _, model = models("seq", 2)
    with pytest.raises(InputError, match=message) as caught:
        qat.hessian_mode(model, mode, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        qat.hessian_operator(model, batches(), mode, **options)


def test_a_full_precision_model_and_no_draws_are_refused():
    for call in (qat.hessian_mode, partial(qat.hessian_operator, batches=batches())):
        with pytest.raises(InputError, match=r"no quantized layers: call qat\.quantize_model"):
            call(nn.Sequential(nn.Linear(2, 2)), mode="ste")
    _, model = models("seq", 2)
    with pytest.raises(InputError, match="draws must be 1 or more"):
        qat.hessian_operator(model, batches(), "noisy", draws=0, sigma=0.1)
