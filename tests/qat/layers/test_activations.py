"""Quantized activations against NumPy in float64: values, levels, masks, and derivatives of every order."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import dense_hessian, normal, relative_error
from tiny_models import mlp, regression
from torch.func import functional_call

import qat
from qat.layers.activations import ActivationQuantizer, quantize_activations
from qat.layers.quantizers.linearization import Linearization

WIDTHS = [(8, True), (8, False), (4, True), (4, False), (3, True), (2, False)]
CASES = {
    "normal": lambda: normal(5, 16, seed=1),
    "three dimensions": lambda: normal(2, 3, 7, seed=2),
    "positive": lambda: normal(4, 9, seed=3).abs() + 1,
    "negative": lambda: -normal(4, 9, seed=4).abs() - 1,
    "one feature": lambda: normal(6, 1, seed=5),
    "zeros": lambda: torch.zeros(2, 5, dtype=torch.float64),
    "huge": lambda: 1e200 * normal(3, 8, seed=6),
    "tiny": lambda: 1e-200 * normal(3, 8, seed=7),
    "not contiguous": lambda: normal(8, 3, seed=8).t(),
    "no token": lambda: torch.zeros(0, 4, dtype=torch.float64),
    "an outlier": lambda: torch.cat([normal(4, 7, seed=9), torch.full((4, 1), 100.0, dtype=torch.float64)], 1),
}


def reference(x, bits, symmetric):
    """Values, and the mask of what is not clipped, token by token."""
    values, mask = np.zeros(x.shape), np.ones(x.shape, dtype=bool)
    for index in np.ndindex(x.shape[:-1]):
        token = x[index].numpy()
        if symmetric:
            step = np.abs(token).max() / (2 ** (bits - 1) - 1)
            values[index] = step * np.round(token / step) if step else 0.0
            continue
        low, high = min(token.min(), 0.0), max(token.max(), 0.0)
        step = (high - low) / (2**bits - 1)
        if step:
            zero = np.round(-low / step)
            position = token / step + zero
            mask[index] = (position >= 0) & (position <= 2**bits - 1)
            values[index] = step * (np.round(np.clip(position, 0, 2**bits - 1)) - zero)
    return torch.from_numpy(values), torch.from_numpy(mask)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
def test_values_and_first_derivative(case, bits, symmetric):
    x = CASES[case]()
    expected, mask = reference(x, bits, symmetric)
    leaf = x.clone().requires_grad_()
    found = quantize_activations(leaf, bits, symmetric=symmetric)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
    assert found.shape == x.shape
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert torch.equal(gradient, mask.double())


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
def test_levels_range_and_error(bits, symmetric):
    x = normal(200, 64, seed=11)
    found = quantize_activations(x, bits, symmetric=symmetric)
    counts = [len(set(token.tolist())) for token in found]
    assert max(counts) <= (2**bits - 1 if symmetric else 2**bits)
    assert torch.equal(quantize_activations(torch.zeros(1, 3), bits, symmetric=symmetric), torch.zeros(1, 3))
    span = 2 * x.abs().amax(1) / (2**bits - 2) if symmetric else (x.amax(1) - x.amin(1)) / (2**bits - 1)
    error = (found - x).abs().amax(1)
    assert (error <= (0.5 + 1e-9) * span * (1 if symmetric else 2)).all()
    if symmetric:
        assert torch.equal(found, -quantize_activations(-x, bits))
        torch.testing.assert_close(found.abs().amax(1), x.abs().amax(1))


def test_a_zero_point_that_is_rounded_clips_an_end_of_the_range():
    token = torch.tensor([[-1.45, 0.0, 13.55]], dtype=torch.float64, requires_grad=True)  # one step is 1
    found = quantize_activations(token, 4, symmetric=False)  # z = 1, and 13.55 + 1 rounds to 15
    assert found.tolist() == [[-1.0, 0.0, 14.0]]
    (gradient,) = torch.autograd.grad(found.sum(), token)
    assert gradient.tolist() == [[0.0, 1.0, 1.0]], "-1.45 lies below the lowest level"


@pytest.mark.parametrize("symmetric", [True, False])
def test_sixteen_bit_activations_are_quantized_in_float32(symmetric):
    x = normal(32, 64, seed=12).to(torch.bfloat16)
    found = quantize_activations(x, 8, symmetric=symmetric)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, quantize_activations(x.float(), 8, symmetric=symmetric).to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_stays_so(bad, symmetric):
    x = torch.tensor([[1.0, bad, -1.0], [1.0, 2.0, 3.0]])
    found = quantize_activations(x, 8, symmetric=symmetric)
    assert not torch.isfinite(found[0]).all()
    assert torch.isfinite(found[1]).all(), "tokens have grids of their own"


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
def test_the_derivative_is_that_of_the_function_with_held_rounding(bits, symmetric):
    """Differences of the linearization, and both modes of differentiation."""
    x = normal(4, 9, seed=13).requires_grad_()
    weight, direction = normal(4, 9, seed=14), normal(4, 9, seed=15)

    def loss(value):
        return (quantize_activations(value, bits, symmetric=symmetric).tanh() * weight).sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    held = Linearization()
    with held.record():
        loss(x)

    def at(step):
        with held.replay():
            return loss(x.detach() + step * direction)

    difference = (at(1e-6) - at(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-8, atol=1e-9)
    forward = torch.func.jvp(loss, (x.detach(),), (direction,))[1]
    torch.testing.assert_close(forward, difference, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS[:2])
def test_vmap_and_compile(bits, symmetric):
    x = normal(3, 4, 9, seed=16)
    expected = quantize_activations(x, bits, symmetric=symmetric)
    batched = torch.func.vmap(lambda part: quantize_activations(part, bits, symmetric=symmetric))(x)
    assert torch.equal(batched, expected)
    compiled = torch.compile(quantize_activations, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, bits, symmetric=symmetric), expected)


def test_a_layer_quantizes_its_input():
    model = mlp()
    plain = copy.deepcopy(model)
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=4, activation_symmetric=False))
    assert model[0].activations == ActivationQuantizer(4, symmetric=False)
    assert "activations=ActivationQuantizer(bits=4" in repr(model[0])
    x = normal(5, 4, seed=17)
    hidden = F.linear(reference(x, 4, False)[0], model[0].quantized_weight(), plain[0].bias).tanh()
    expected = F.linear(reference(hidden.detach(), 4, False)[0], model[2].quantized_weight(), plain[2].bias)
    torch.testing.assert_close(model(x), expected)


# -- spectra


def batches():
    return regression((5, 3), seed=4)


def loss_of(network, data):
    return torch.cat([(network(x) - y).square().mean(1) for x, y in data]).mean()


def quantized_twin(bits, symmetric, weight_bits=2):
    plain = mlp(seed=3)
    model = copy.deepcopy(plain)
    config = qat.QuantConfig(bits=weight_bits, activation_bits=bits, activation_symmetric=symmetric)
    qat.quantize_model(model, config)
    with torch.no_grad():
        for _, layer in qat.quant_layers(model):
            layer.scale.mul_(0.6)
    return plain, model


def hessian_with_held_activations(plain, weights, data, bits, symmetric):
    """The Hessian in the weights of the full-precision network whose activations a are a0 + mask (x - x0).

    a0, mask and x0 are those of the forward pass at these weights.
    """
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]

    def activated(x):
        values, mask = reference(x.detach(), bits, symmetric)
        return values + mask * (x - x.detach())

    def network(x):
        hidden = F.linear(activated(x), leaves[0], plain[0].bias).tanh()
        return F.linear(activated(hidden), leaves[1], plain[2].bias)

    return dense_hessian(loss_of(network, data), leaves)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
@pytest.mark.parametrize("mode", qat.MODES)
def test_every_mode_against_a_dense_hessian(mode, bits, symmetric):
    plain, model = quantized_twin(bits, symmetric)
    layers = [layer for _, layer in qat.quant_layers(model)]
    latent = [layer.weight.detach() for layer in layers]
    options = {"sigma": 0.1, "seed": 5} if mode == "noisy" else {}
    if mode == "noisy":
        from qat.hessian import _standard_normal

        names = [name for name, _ in qat.quant_layers(model)]
        latent = [w + 0.1 * _standard_normal(w, f"5/0/{name}") for w, name in zip(latent, names, strict=True)]
    grid = [layer.quantizer(w, layer.scale).detach() for layer, w in zip(layers, latent, strict=True)]
    at = latent if mode == "latent" else grid
    expected = hessian_with_held_activations(plain, at, batches(), bits, symmetric)
    if mode in ("ste", "noisy"):
        masks = [layer.quantizer.mask(w, layer.scale) for layer, w in zip(layers, latent, strict=True)]
        mask = torch.cat([m.reshape(-1) for m in masks]).double()
        assert 0 < mask.sum() < len(mask)
        expected = mask[:, None] * expected * mask
    with qat.hessian_mode(model, mode, **options):
        loss = loss_of(model, batches())
    dense = dense_hessian(loss, [layer.weight for layer in layers])
    assert relative_error(dense, expected) < 1e-12
    assert (dense - dense.T).abs().max() < 1e-13 * dense.abs().max()
    operator = qat.hessian_operator(model, batches(), mode, **options, **({"draws": 1} if mode == "noisy" else {}))
    assert relative_error(operator @ torch.eye(len(dense), dtype=torch.float64), expected) < 1e-12
    assert operator.symmetry_gap() < 1e-12


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_products_are_differences_of_the_gradient_at_held_rounding(bits, symmetric):
    """Weights and scales together: symmetric, and the derivative of the gradient of the smooth function."""
    _, model = quantized_twin(bits, symmetric)
    names = [name for name, _ in model.named_parameters() if not name.endswith("bias")]
    operator = qat.hessian_operator(model, batches(), "ste", params=names)
    assert operator.symmetry_gap() < 1e-12
    (x, y), *_ = batches()
    chosen = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    held = Linearization()
    with held.record():
        model(x)

    def gradient(step):
        values = {name: (value + step * direction[name]).requires_grad_() for name, value in chosen.items()}
        with held.replay():
            loss = (functional_call(model, values, x) - y).square().mean()
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(values.values()))])

    vector = normal(operator.shape[0], seed=6)
    sizes = [value.numel() for value in chosen.values()]
    parts = dict(zip(chosen, vector.split(sizes), strict=True))
    direction = {name: parts[name].view_as(value) for name, value in chosen.items()}
    single = qat.hessian_operator(model, [(x, y)], "ste", params=names, loss=torch.nn.MSELoss())
    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    assert relative_error(single @ vector, difference) < 1e-7


def test_activations_add_curvature_that_a_plain_network_does_not_have():
    """Four-bit activations change the spectrum: the test above is not about a mode that ignores them."""
    plain, model = quantized_twin(4, True)
    quantized = qat.hessian_operator(model, batches(), "latent").to_dense()
    full = hessian_with_held_activations(plain, [plain[0].weight, plain[2].weight], batches(), 16, True)
    assert relative_error(quantized, full) > 1e-2


def test_inputs_of_full_precision_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    layer, x = model[0], normal(3, 8, seed=5).float()
    assert layer.activations is None
    assert torch.equal(layer(x), F.linear(x, layer.quantized_weight(), layer.bias))
