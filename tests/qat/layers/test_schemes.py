"""What is special to single schemes, and all of them on inputs at the ends of what floats can hold, and compiled."""

import numpy as np
import pytest
import torch
from oracles import normal
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import nn

import qat
from qat.layers.config import SUPPORTED_BITS
from qat.layers.linear import QuantLinear
from qat.layers.quantizers.grouped import Grouped
from qat.layers.quantizers.hadamard import hadamard
from qat.layers.quantizers.quest import LARGEST_LEVEL
from qat.layers.quantizers.registry import QUANTIZERS, make_quantizer
from spectra.backend.errors import InputError

SCHEMES = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths]
COMPILED = [("lsq", 4), ("quest", 4)]  # a second or two each


# -- bitnet


def test_bitnet_has_one_scale_for_the_tensor():
    weight = torch.tensor([[-2.0, 0.5], [0.25, 0.0], [0.0, 0.25]])
    quantizer = make_quantizer("bitnet", 1.58)
    scale = quantizer.initial_scale(weight)
    assert torch.equal(scale, torch.full((3, 1), 0.5))
    assert quantizer(weight, scale).tolist() == [[-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]  # 0.25 / 0.5 is half: to even


# -- quest


@pytest.mark.parametrize("bits", SUPPORTED_BITS["quest"])
def test_the_scale_of_quest_has_the_least_squared_error_for_normal_numbers(bits):
    count = 3 if bits == 1.58 else 2**bits

    def error(c):
        """E (x - q)^2, the sum over cells (a, b] of the normal distribution's moments up to the second."""
        q = c * np.linspace(-1, 1, count)
        cuts = np.concatenate([[-40.0], (q[1:] + q[:-1]) / 2, [40.0]])
        mass, density = np.diff(norm.cdf(cuts)), norm.pdf(cuts)
        return ((1 + q**2) * mass - np.diff(cuts * density) + 2 * q * np.diff(density)).sum()

    best = minimize_scalar(error, bounds=(0.5, 5), method="bounded", options={"xatol": 1e-8}).x
    assert LARGEST_LEVEL[bits] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("bits", SUPPORTED_BITS["quest"])
def test_a_reset_of_quest_is_one_in_the_transformed_space_and_keeps_codes_at_one_scale(bits):
    quantizer, weight = make_quantizer("quest", bits), normal(6, 200, seed=1)
    scale = quantizer.initial_scale(weight)
    codes, quantized = quantizer.codes(weight, scale), quantizer(weight, scale)
    torch.testing.assert_close(scale[:, 0], LARGEST_LEVEL[bits] * hadamard(weight).square().mean(1).sqrt())
    levels = scale * torch.tensor(quantizer.levels, dtype=torch.float64)[codes.long() - quantizer.grid.lowest]
    for alpha in (0.1, 0.4, 0.9):
        moved = weight + alpha * (quantized - weight)
        want = hadamard((1 - alpha) * hadamard(weight) + alpha * levels)
        torch.testing.assert_close(moved, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(quantizer.codes(moved, scale), codes)
    assert torch.equal(quantizer.codes(quantized, scale), codes)


# -- parq


@pytest.mark.parametrize("bits", SUPPORTED_BITS["parq"])
@pytest.mark.parametrize("inverse_slope", [0.0, 1e-30, 0.1, 0.5, 0.9, 1.0])
def test_the_annealed_weights_of_parq(bits, inverse_slope):
    quantizer = make_quantizer("parq", bits)
    weight = torch.cat([normal(4, 300, seed=1), torch.zeros(4, 1, dtype=torch.float64)], 1)
    scale = 0.9 * quantizer.initial_scale(weight)
    quantizer.set_inverse_slope(inverse_slope, weight.device)
    r, levels = quantizer.inverse_slope.item(), np.array(quantizer.levels)
    leaf = weight.clone().requires_grad_()
    found = quantizer.annealed(leaf, scale)
    want = np.empty(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        w, grid = weight[i, j].item(), scale[i, 0].item() * levels
        if inverse_slope == 1:
            want[i, j] = w
            continue
        upper = min(max(int(np.searchsorted(grid, w, side="right")), 1), len(grid) - 1)
        low, high = grid[upper - 1], grid[upper]
        middle = (low + high) / 2
        far = np.inf if r == 0 else abs(w - middle) / r
        want[i, j] = min(max(middle + np.copysign(far, w - middle), low), high)
    zeros = weight == 0 if inverse_slope == 0 else torch.zeros_like(weight, dtype=torch.bool)  # between two levels
    np.testing.assert_allclose(found.detach()[~zeros], want[~zeros.numpy()], rtol=1e-12, atol=1e-13)
    if inverse_slope == 0:
        assert torch.equal(found, quantizer(weight, scale))
    upstream = normal(4, 301, seed=2)
    assert torch.equal(torch.autograd.grad(found, leaf, upstream)[0], upstream)
    assert torch.equal(quantizer(weight, scale), quantizer.dequantize(quantizer.codes(weight, scale), scale))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_parq_is_that_of_torchao(bits):
    """Against torchao's implementation, of which it shares the grid and the map, but no code."""
    parq = pytest.importorskip("torchao.prototype.parq.optim.parq")
    uniform = pytest.importorskip("torchao.prototype.parq.quant.uniform")
    weight, steps = normal(5, 80, seed=3), 20
    quantizer = make_quantizer("parq", bits)
    _, targets = uniform.UnifQuantizer().quantize(weight, bits, dim=-1)
    reference, config = parq.ProxPARQ(4, 16, steepness=8), qat.PARQConfig(start=0.2, end=0.8, steepness=8)
    for step in range(steps + 1):
        annealed = weight.clone()
        reference.apply_(annealed, None, targets, step, dim=-1)
        value = qat.training.parq.inverse_slope(step / steps, config)
        quantizer.set_inverse_slope(value, weight.device)
        found = quantizer.annealed(weight, quantizer.initial_scale(weight))
        if step != 4:  # where they clamp already, and the slope here is still that of full precision
            torch.testing.assert_close(found, annealed, rtol=1e-5, atol=1e-6)


# -- all of them


def quantizers(name, bits):
    scheme = make_quantizer(name, bits)
    return [scheme, Grouped(scheme, 4)] if scheme.grouped else [scheme]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_inputs_at_the_ends(name, bits, dtype):
    huge = 1e30 if dtype == torch.float32 else 1e200
    ordinary = normal(6, 8, seed=1, dtype=dtype)
    cases = {
        "no rows": ordinary[:0],
        "no columns": ordinary[:, :0],
        "one row": ordinary[:1],
        "not contiguous": normal(8, 6, seed=1, dtype=dtype).t(),
        "huge": huge * ordinary,
        "tiny": 1e-30 * ordinary,
        "below normal": torch.full((2, 8), 1e-40, dtype=dtype),
        "zeros": torch.zeros(2, 8, dtype=dtype),
        "one large": torch.tensor([[1e6, *[1e-3] * 7]], dtype=dtype),
    }
    for quantizer in quantizers(name, bits):
        for what, weight in cases.items():
            leaf, scale = weight.clone().requires_grad_(), quantizer.initial_scale(weight)
            found = quantizer(leaf, scale)
            assert found.dtype == scale.dtype == dtype, what
            assert torch.isfinite(scale).all(), what
            assert (scale >= 1e-5 * (1 - 1e-6)).all(), what
            assert torch.isfinite(found).all(), what
            assert found.shape == weight.shape == quantizer.mask(weight, scale).shape, what
            assert torch.equal(found, quantizer.dequantize(quantizer.codes(weight, scale), scale)), what
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
            assert torch.isfinite(gradient).all(), what
            assert torch.equal(quantizer.annealed(weight, scale), found), what
        spread = weight_error(quantizer, huge * ordinary) / weight_error(quantizer, ordinary)
        assert spread == pytest.approx(1, rel=1e-3), "the relative error does not depend on the size"


def weight_error(quantizer, weight):
    found = quantizer(weight, quantizer.initial_scale(weight))
    largest = weight.abs().max()
    return ((found - weight) / largest).square().mean().item()


@pytest.mark.parametrize(("name", "bits"), COMPILED)
def test_compiled_it_has_the_same_values_and_gradients(name, bits):
    quantizer = quantizers(name, bits)[-1]
    weight, upstream = normal(4, 8, seed=2, dtype=torch.float32), normal(4, 8, seed=3, dtype=torch.float32)
    scale = 0.8 * quantizer.initial_scale(weight)

    def run(call):
        leaf, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        found = call(leaf, s)
        return found.detach(), *torch.autograd.grad(found, (leaf, s), upstream, materialize_grads=True)

    eager = run(quantizer.annealed)
    compiled = run(torch.compile(lambda w, s: quantizer.annealed(w, s), backend="aot_eager", fullgraph=True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_new_slope_compiles_nothing_again():
    from torch._dynamo.testing import CompileCounter

    layer = QuantLinear(nn.Parameter(normal(3, 8, seed=1)), None, make_quantizer("parq", 2), group_size=4).train()
    counter = CompileCounter()
    compiled, x, seen = torch.compile(layer, backend=counter), normal(2, 8, seed=2), []
    for value in (1.0, 0.7, 0.3, 0.0):
        layer.scheme.set_inverse_slope(value, layer.weight.device)
        seen.append(compiled(x))
        assert torch.equal(seen[-1], layer(x))
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_rows_of_their_own(name, bits, transposed):
    scheme, weight = make_quantizer(name, bits), normal(6, 12, seed=4)
    if not scheme.grouped:
        pytest.skip("one scale for the tensor")
    parameter = nn.Parameter(weight.t().contiguous() if transposed else weight.clone())
    layer = QuantLinear(parameter, None, scheme, group_size=4, transposed=transposed)
    alone = QuantLinear(nn.Parameter(weight.reshape(18, 4)), None, scheme)
    assert layer.scale.shape == (6, 3)
    assert torch.equal(layer.scale.reshape(18, 1), alone.scale)

    def rows(matrix):
        return (matrix.t() if transposed else matrix).reshape(18, 4)

    for one, other in [
        (layer.quantized_weight(), alone.quantized_weight()),
        (layer.codes(), alone.codes()),
        (layer.mask(), alone.mask()),
    ]:
        assert one.shape == parameter.shape
        assert torch.equal(rows(one), other)
    upstream = normal(18, 4, seed=5)
    (rows(layer.quantized_weight()) * upstream).sum().backward()
    (alone.quantized_weight() * upstream).sum().backward()
    assert torch.equal(rows(layer.weight.grad), alone.weight.grad)
    if scheme.learned_scale:
        assert torch.equal(layer.scale.grad.reshape(18, 1), alone.scale.grad)
    assert f"{type(scheme).__name__}(bits={bits}, group_size=4)" in repr(layer)


def test_a_width_that_groups_do_not_fill_is_refused_with_the_size_that_fits():
    model = nn.Sequential(nn.Linear(48, 72), nn.ReLU(), nn.Linear(72, 48))
    with pytest.raises(InputError, match=r"32 does not divide the 48 columns of 0: use group_size=8"):
        qat.quantize_model(model, qat.QuantConfig(bits=4, group_size=32))
    assert type(model[0]) is nn.Linear
    report = qat.quantize_model(model, qat.QuantConfig(bits=4, group_size=8))
    assert "one scale for each 8 columns of a row" in str(report)
    assert model[2].scale.shape == (48, 9)
    with pytest.raises(InputError, match="use one scale a row"):
        QuantLinear(nn.Parameter(torch.ones(2, 9)), None, make_quantizer("lsq", 4), group_size=4)


def test_every_scheme_declares_what_the_registry_reads():
    for scheme in QUANTIZERS.values():
        assert scheme.supported_bits
        assert isinstance(scheme.learned_scale, bool)


@pytest.mark.parametrize(("name", "group_size"), [("rtn", None), ("rtn", 8), ("quest", None), ("parq", 8)])
def test_eight_bits_lose_next_to_nothing(name, group_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x = normal(256, 16, seed=1, dtype=torch.float32)
    labels = (x[:, :4] + 0.5 * normal(256, 4, seed=2, dtype=torch.float32)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(x), labels).item()
        qat.quantize_model(model, qat.QuantConfig(bits=8, quantizer=name, group_size=group_size))
        after = nn.functional.cross_entropy(model(x), labels).item()
    assert 0.05 < before < 0.8
    assert after == pytest.approx(before, rel=0.005)
    assert after != before
