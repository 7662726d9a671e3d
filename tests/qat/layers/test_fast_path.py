"""The quantizers with a hand-written backward against the chains of operations that they replace."""

import math

import pytest
import torch
from oracles import normal
from torch.func import grad, jvp, vmap
from torch.nn.functional import linear

import qat
from qat.layers.config import SUPPORTED_BITS
from qat.layers.fast_path import SCHEMES, quantize
from qat.layers.quantizers.registry import QUANTIZERS, make_quantizer
from qat.layers.quantizers.rounding import SCALE_FLOOR
from qat.layers.quantizers.seq import StretchedElastic

CASES = [(name, bits) for name, widths in SUPPORTED_BITS.items() if QUANTIZERS[name] in SCHEMES for bits in widths]
ALL = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths]


def hard(quantizer, dtype, *, rows=5, columns=24):
    """Weights inside and outside the clip bounds, on bounds and thresholds, zero with both signs; and scales."""
    scale = torch.linspace(0.4, 2, rows, dtype=dtype).unsqueeze(1)
    weight = normal(rows, columns, seed=3).to(dtype) * 2
    positions = [0.0, -0.0, 0.5, -0.5, 0.99, -0.99, 1.0, -1.0, 1.5, -1.5, *quantizer.levels, 7.0, -8.0, 7.01, -8.01]
    for column, position in enumerate(positions[:columns]):
        weight[1:, column] = scale[1:, 0] * position
    return weight, scale


def results(function, weight, scale, upstream):
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    value = function(weight, scale)
    grads = torch.autograd.grad(value, (weight, scale), upstream, allow_unused=True)
    return value, *grads


def same(one, other, dtype):
    """Equal up to rounding errors; None only if both are."""
    assert (one is None) == (other is None)
    if one is not None:
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_values_are_the_chains_bit_for_bit_and_gradients_to_rounding(name, bits, dtype):
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, dtype)
    upstream = normal(*weight.shape, seed=4).to(dtype)
    want = results(quantizer, weight, scale, upstream)
    got = results(lambda w, s: quantize(quantizer, w, s), weight, scale, upstream)
    assert "_Quantize" in type(got[0].grad_fn).__name__
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1] == 0, want[1] == 0)  # the mask is the same, entry by entry
    same(got[1], want[1], dtype)  # the chain multiplies by s and divides by s
    same(got[2], want[2], dtype)
    with torch.no_grad():
        assert torch.equal(quantize(quantizer, weight, scale), want[0])


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_one_row_one_column_transposed_tiny_and_huge(name, bits):
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, torch.float64)
    cases = [
        (weight[:1], scale[:1]),
        (weight[:, :1], scale),
        (weight.t().contiguous().t(), scale),
        (weight, torch.full_like(scale, -1.0)),  # below the floor
        (weight, torch.full_like(scale, SCALE_FLOOR / 3)),
        (weight * 1e-30, scale * 1e-30),
        (weight * 1e30, scale * 1e30),
        (weight, scale * 1e9),
    ]
    for w, s in cases:
        upstream = normal(*w.shape, seed=5)
        want = results(quantizer, w, s, upstream)
        got = results(lambda w, s: quantize(quantizer, w, s), w, s, upstream)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1] == 0, want[1] == 0)
        same(got[1], want[1], torch.float64)
        same(got[2], want[2], torch.float64)


@pytest.mark.parametrize("which", ["weights", "scales", "both"])
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_hessian_in_weights_and_scales_is_the_chains_and_symmetric(name, bits, which):
    """A loss that is curved in Q(W): its Hessian by double backward, against that of the chain."""
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, torch.float64, rows=2, columns=8)
    inputs, target = normal(6, 8, seed=6), normal(6, 2, seed=7)
    sizes = (
        {"weights": weight.numel(), "scales": 0, "both": weight.numel()}[which],
        (0 if which == "weights" or not quantizer.learned_scale else scale.numel()),
    )
    if sum(sizes) == 0:
        pytest.skip("no scale is learned")

    def hessian(function):
        w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_(quantizer.learned_scale)
        chosen = [tensor for tensor, size in ((w, sizes[0]), (s, sizes[1])) if size]
        loss = (linear(inputs, function(w, s)).tanh() - target).square().sum()
        first = torch.autograd.grad(loss, chosen, create_graph=True)
        flat = torch.cat([g.flatten() for g in first])
        rows = [torch.autograd.grad(entry, chosen, retain_graph=True, allow_unused=True) for entry in flat]
        return torch.stack(
            [
                torch.cat(
                    [
                        torch.zeros_like(c).flatten() if r is None else r.flatten()
                        for r, c in zip(row, chosen, strict=True)
                    ]
                )
                for row in rows
            ]
        )

    got, want = hessian(lambda w, s: quantize(quantizer, w, s)), hessian(quantizer)
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, got.t(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("name", "bits"), ALL)
def test_a_frozen_weight_or_scale_gets_no_gradient(name, bits, learned):
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, torch.float64)
    weight.requires_grad_(not learned)
    scale.requires_grad_(learned and quantizer.learned_scale)
    value = quantize(quantizer, weight, scale)
    if weight.requires_grad or scale.requires_grad:
        value.sum().backward()
    assert (weight.grad is not None) == weight.requires_grad
    assert (scale.grad is not None) == scale.requires_grad


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_function_transforms_forward_mode_and_compile_see_the_chain(name, bits):
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, torch.float64)
    tangent = normal(*weight.shape, seed=8)

    def loss(quantizer_of, w):
        return (quantizer_of(w, scale) ** 3).sum()

    def fast(w, s):
        return quantize(quantizer, w, s)

    for transform in (
        lambda f: grad(f)(weight),
        lambda f: vmap(grad(f))(torch.stack([weight, 2 * weight])),
        lambda f: jvp(grad(f), (weight,), (tangent,))[1],
        lambda f: torch.compile(f, backend="eager", fullgraph=True)(weight),
    ):
        assert torch.equal(transform(lambda w: loss(fast, w)), transform(lambda w: loss(quantizer, w)))
    torch._dynamo.reset()


def test_a_scheme_without_an_entry_and_scales_of_groups_use_the_chain():
    calls = []

    class Own(StretchedElastic):
        def __call__(self, weight, scale):
            calls.append(scale.shape)
            return super().__call__(weight, scale)

    weight, scale = hard(make_quantizer("seq", 2), torch.float64)
    assert torch.equal(quantize(Own(2), weight, scale), make_quantizer("seq", 2)(weight, scale))
    quantize(Own(2), weight, scale.expand(-1, weight.shape[1]))
    assert calls == [scale.shape, weight.shape]
    by_weight = quantize(make_quantizer("seq", 2), weight, scale.expand(-1, weight.shape[1]).clone())
    assert torch.equal(by_weight, make_quantizer("seq", 2)(weight, scale))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_weight_that_is_not_a_number_stays_visible(name, bits):
    quantizer = make_quantizer(name, bits)
    weight, scale = hard(quantizer, torch.float32)
    weight[2, 3] = math.nan
    value = quantize(quantizer, weight.requires_grad_(), scale)
    assert value.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("noise_scales", [False, True])
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_noisy_layer_is_the_quantizer_at_the_drawn_weights(name, bits, noise_scales):
    model = torch.nn.Sequential(torch.nn.Linear(12, 7))
    qat.quantize_model(model, qat.QuantConfig(bits=bits, quantizer=name))
    layer = model[0]
    layer.noise_sigma, layer.noise_scales = 0.05, noise_scales
    torch.manual_seed(11)
    got = layer.training_weight()
    torch.manual_seed(11)
    weight = layer.weight.detach() + 0.05 * torch.randn(7, 12)
    scale = layer.scale.detach() if layer.quantizer.learned_scale else layer.quantizer.initial_scale(weight)
    if layer.quantizer.learned_scale and noise_scales:
        scale = scale + 0.05 * torch.randn(7, 1)
    assert torch.equal(got, layer.quantizer(weight, scale))
    assert not torch.equal(got, layer.quantized_weight())
