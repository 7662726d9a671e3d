"""Quantizers against tables worked out by hand in numpy, and their derivatives in every mode of differentiation."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracles import normal
from scipy.linalg import block_diag
from scipy.linalg import hadamard as hadamard_matrix
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from qat.layers.config import BITS, SUPPORTED_BITS
from qat.layers.quantizers.base import Quantizer, mean_magnitude
from qat.layers.quantizers.registry import QUANTIZERS, make_quantizer
from qat.layers.quantizers.rounding import SCALE_FLOOR, round_ste, sign, straight_through, trained_scale
from spectra.backend.errors import InputError

SCHEMES = [(name, bits) for name, widths in SUPPORTED_BITS.items() for bits in widths]
LEARNED = [(name, bits) for name, bits in SCHEMES if QUANTIZERS[name].learned_scale]
DTYPES = (torch.float32, torch.float64)


def table(name, bits, w, s):
    """q, dq/dw and dq/ds of each weight, entry by entry; w (rows, columns), s (rows, 1) float64 arrays.

    dq/ds includes the gradient scale, with the number of weights of the whole matrix. For `quest` w and q are
    transformed weights, see `transform`.
    """
    count = w.size
    q, slope_w, slope_s = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for i, j in np.ndindex(*w.shape):
        scale = max(s[i, 0], 1e-5)
        x = w[i, j] / scale
        gradient_scale, by_scale = 0.0, 0.0
        if name in ("rtn", "lsq"):
            lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            gradient_scale = 1 / math.sqrt(count * highest)
            level = min(max(float(np.rint(x)), lowest), highest)
            inside = lowest <= x <= highest
            by_scale = level - x if inside else level
        elif name == "seq":
            gradient_scale = 1 / math.sqrt(count)
            inside = -0.99 <= x <= 0.99
            if bits == 2:  # cells (-inf, -1/2], (-1/2, 0], (0, 1/2], (1/2, inf) but for who owns a boundary
                level = (np.rint(2 * min(max(x, -0.99), 0.99) - 0.5) + 0.5) / 2
                outermost = 3 / 4
            else:
                level = np.rint(1.5 * min(max(x, -0.99), 0.99)) / 1.5
                outermost = 2 / 3
            by_scale = level - x if inside else math.copysign(outermost, x)
        elif name == "binary":
            gradient_scale = 1 / math.sqrt(count)
            level = 1.0 if w[i, j] >= 0 else -1.0
            inside = abs(w[i, j]) <= scale
            by_scale = level
        elif name == "bitnet":
            level, inside = min(max(float(np.rint(x)), -1.0), 1.0), True
        else:  # the nearest of n levels from -1 to 1; the upper one, or 0, where two are equally near
            spacings = 2 if bits == 1.58 else 2**bits - 1
            exact = Fraction(x) * spacings / 2  # from level 0, in spacings
            if spacings == 2:
                level = min(max(round(exact), -1), 1)
            else:
                level = 2 * min(max(math.floor(exact + Fraction(spacings + 1, 2)), 0), spacings) / spacings - 1
            inside = name == "parq" or abs(level - x) <= (1 + 1e-9) / spacings
        q[i, j] = scale * level
        slope_w[i, j] = float(inside)
        slope_s[i, j] = gradient_scale * by_scale if QUANTIZERS[name].learned_scale else 0.0
    return q, slope_w, slope_s


def transform(name, columns):
    """The orthogonal matrix of the coordinates that a scheme quantizes in: x_h = T x for the row x."""
    if name != "quest":
        return np.eye(columns)
    blocks, rest = [128] * (columns // 128), columns % 128
    while rest:
        blocks.append(2 ** int(math.log2(rest)))
        rest -= blocks[-1]
    return block_diag(*(hadamard_matrix(size) / math.sqrt(size) for size in blocks))


def values_and_gradients(quantizer, weight, scale, upstream):
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    q = quantizer(weight, scale)
    by_weight, by_scale = torch.autograd.grad(q, (weight, scale), upstream, allow_unused=True)
    return q.detach(), by_weight, torch.zeros_like(scale) if by_scale is None else by_scale


def check_against_table(name, bits, weight, scale, dtype):
    quantizer = make_quantizer(name, bits)
    weight, scale = weight.to(dtype), scale.to(dtype)
    upstream = normal(*weight.shape, seed=11).to(dtype)
    q, by_weight, by_scale = values_and_gradients(quantizer, weight, scale, upstream)
    turn = transform(name, weight.shape[1])
    q_h, slope_w, slope_s = table(name, bits, weight.double().numpy() @ turn.T, scale.double().numpy())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    g = upstream.double().numpy()
    np.testing.assert_allclose(q.numpy(), q_h @ turn, **tolerance)
    np.testing.assert_allclose(by_weight.numpy(), (g @ turn.T * slope_w) @ turn, **tolerance)
    np.testing.assert_allclose(by_scale.numpy(), (g * slope_s).sum(1, keepdims=True), **tolerance)
    np.testing.assert_array_equal(quantizer.mask(weight, scale).numpy(), slope_w == 1)
    assert torch.equal(q, quantizer.dequantize(quantizer.codes(weight, scale), scale))
    assert q.dtype == by_weight.dtype == by_scale.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_random_weights_match_the_table(name, bits, dtype):
    weight = 0.02 * normal(7, 33, seed=1)
    quantizer = make_quantizer(name, bits)
    own = quantizer.initial_scale(weight.to(dtype)).double()
    for factor in (1.0, 0.4, 2.6):  # from a third of the weights clipped to none
        check_against_table(name, bits, weight, factor * own, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_edge_inputs_match_the_table(name, bits, dtype):
    # A scale that is a power of two makes the bounds of most schemes exact in both dtypes.
    quantizer = make_quantizer(name, bits)
    top, bottom = bounds_of(name, bits)
    one_up, one_down = 1 + 2e-7, 1 - 2e-7
    bounds = [top, top * one_up, top * one_down, bottom, bottom * one_up, bottom * one_down]
    if name == "quest" and bits not in (1, 1.58):  # n / (n - 1) is no binary fraction: not on the bound, next to it
        bounds = [bound for bound in bounds if abs(bound) not in (top, -bottom)]
    halves = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    weights = torch.tensor([0.0, -0.0, *bounds, *halves, 1e-30, -1e-30, 1e4, -1e4], dtype=torch.float64) * 0.25
    weights = weights.to(torch.float32).double()[:, None]  # the same numbers in both dtypes, a row each
    check_against_table(name, bits, weights, torch.full_like(weights, 0.25), dtype)
    scale = torch.full((3, 1), 0.25, dtype=torch.float64)
    if name != "quest":  # whose rows the transform mixes
        check_against_table(name, bits, weights.T, scale[:1], dtype)
    check_against_table(name, bits, torch.zeros(3, 4, dtype=torch.float64), scale, dtype)
    check_against_table(name, bits, torch.tensor([[0.3], [-0.21], [0.0]], dtype=torch.float64), scale, dtype)
    if (name, bits) in [(n, b) for n, b in SCHEMES if n in ("rtn", "lsq", "binary") or (n == "quest" and b < 2)]:
        bound = torch.tensor([[0.25 * top], [0.25 * bottom]], dtype=dtype)
        assert quantizer.mask(bound, scale[:2].to(dtype)).all(), "clip bounds are inclusive"
        _, gradient, _ = values_and_gradients(quantizer, bound, scale[:2].to(dtype), torch.ones(2, 1, dtype=dtype))
        assert torch.equal(gradient, torch.ones(2, 1, dtype=dtype))


def bounds_of(name, bits):
    """Where a weight begins to be clipped, in scales."""
    if name in ("rtn", "lsq"):
        return 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    if name == "quest":
        count = 3 if bits == 1.58 else 2**bits
        return count / (count - 1), -count / (count - 1)
    return 1, -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SUPPORTED_BITS["seq"])
def test_the_bound_of_seq_is_inclusive(bits, dtype):
    quantizer = make_quantizer("seq", bits)
    one = torch.ones(1, 1, dtype=dtype)
    bound = torch.tensor([[0.99, -0.99]], dtype=dtype)  # at scale 1 the bound is this float
    _, gradient, slope = values_and_gradients(quantizer, bound, one, torch.tensor([[1.0, 0.0]], dtype=dtype))
    assert gradient[0, 0] == 1
    outermost = quantizer.levels[-1]
    assert slope.item() == pytest.approx((outermost - 0.99) / math.sqrt(2), rel=1e-5)
    beyond = torch.nextafter(bound, 2 * bound)
    _, gradient, slope = values_and_gradients(quantizer, beyond, one, torch.tensor([[1.0, 0.0]], dtype=dtype))
    assert gradient[0, 0] == 0
    assert slope.item() == pytest.approx(outermost / math.sqrt(2), rel=1e-6)


def test_the_clipped_scale_gradient_at_158_bits_is_two_thirds():
    quantizer = make_quantizer("seq", 1.58)
    weight = torch.tensor([[3.0, -3.0, 0.0, 0.0]], dtype=torch.float64)
    upstream = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    _, _, slope = values_and_gradients(quantizer, weight, torch.ones(1, 1, dtype=torch.float64), upstream)
    assert slope.item() == pytest.approx(2 / 3 / math.sqrt(4), rel=1e-15)


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("rtn", 2, [2.0, 1e-5, 0.5]),
        ("rtn", 4, [2 / 7, 1e-5, 0.5 / 7]),
        ("lsq", 3, [2 / 3, 1e-5, 0.5 / 3]),
        ("lsq", 4, [2 / 7, 1e-5, 0.5 / 7]),
        ("lsq", 8, [2 / 127, 1e-5, 0.5 / 127]),
        ("seq", 2, [2.0, 1e-5, 0.5]),
        ("seq", 1.58, [2.0, 1e-5, 0.5]),
        ("binary", 1, [1.25, 1e-5, 0.25]),
    ],
)
def test_initial_scales(name, bits, expected):
    weight = torch.tensor([[-2.0, 0.5], [0.0, 0.0], [0.0, 0.5]])
    scale = make_quantizer(name, bits).initial_scale(weight.requires_grad_())
    np.testing.assert_allclose(scale.numpy()[:, 0], expected, rtol=1e-6)
    assert scale.shape == (3, 1)
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "bits"), [(n, b) for n, b in SCHEMES if n in ("rtn", "lsq")])
def test_the_largest_weight_of_a_row_is_never_clipped_by_rounding(name, bits, dtype):
    weight = normal(4000, 1, seed=2, dtype=dtype)
    quantizer = make_quantizer(name, bits)
    scale = quantizer.initial_scale(weight)
    assert quantizer.mask(weight, scale).all()
    assert quantizer.mask(weight.double(), scale.double()).all(), "nor in a float64 copy"


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_levels_are_what_comes_out(name, bits):
    quantizer = make_quantizer(name, bits)
    counts = {1: 2, 1.58: 3}
    assert len(quantizer.levels) == counts.get(bits, 2 ** int(bits))
    assert list(quantizer.levels) == sorted(quantizer.levels)
    weight = torch.linspace(-300, 300, 120001, dtype=torch.float64)[:, None] * (1 if bits == 8 else 0.05)
    if name in ("quest", "parq"):
        weight = 3 * weight / weight.max()  # whose levels end at 1
    scale = torch.ones_like(weight)
    found = torch.unique(quantizer(weight, scale))
    np.testing.assert_allclose(found.numpy(), quantizer.levels, atol=1e-15)
    codes = quantizer.codes(weight, scale)
    assert codes.dtype == torch.int8
    assert len(torch.unique(codes)) == len(quantizer.levels)
    assert (codes.diff(dim=0) >= 0).all(), "codes are monotone"


def test_sign_of_zero_is_plus_one():
    zeros = torch.tensor([[0.0, -0.0]])
    assert torch.equal(sign(zeros), torch.ones(1, 2))
    assert torch.equal(make_quantizer("binary", 1)(zeros, torch.tensor([[0.5]])), torch.full((1, 2), 0.5))


@pytest.mark.parametrize(("name", "bits"), LEARNED)
@pytest.mark.parametrize("bad", [0.0, -0.3, 1e-7])
def test_a_scale_below_the_floor_computes_with_the_floor_and_keeps_its_gradient(name, bits, bad):
    quantizer = make_quantizer(name, bits)
    weight = torch.tensor([[0.4, -0.3, 0.2]], dtype=torch.float64)
    upstream = torch.tensor([[1.0, 0.5, 0.25]], dtype=torch.float64)
    scale = torch.tensor([[bad]], dtype=torch.float64)
    floored = torch.tensor([[SCALE_FLOOR]], dtype=torch.float64)
    q, _, slope = values_and_gradients(quantizer, weight, scale, upstream)
    want, _, want_slope = values_and_gradients(quantizer, weight, floored, upstream)
    assert torch.equal(q, want)
    assert torch.equal(slope, want_slope)
    assert slope.item() != 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_values_are_exact(dtype):
    x = 100 * normal(20000, seed=3, dtype=dtype)
    assert torch.equal(round_ste(x), torch.round(x))
    assert torch.equal(straight_through(x / 3, x), x / 3)
    scale = (1e-3 * normal(20000, seed=4, dtype=dtype)).requires_grad_()
    used = trained_scale(scale, 0.0123)
    assert torch.equal(used, scale.clamp(min=SCALE_FLOOR))
    (gradient,) = torch.autograd.grad(used.sum(), scale)
    assert torch.equal(gradient, torch.full_like(gradient, 0.0123))


def quadratic_of(name, bits, rows=3, columns=4, seed=5):
    """L(w, s) = sum c(Q(w, s)) with a curved, coupled c, and its parts at the quantized weights, all float64."""
    quantizer = make_quantizer(name, bits)
    weight = normal(rows, columns, seed=seed)
    scale = 0.6 * quantizer.initial_scale(weight)  # some weights clipped where the scheme clips at all
    mixing = normal(rows * columns, rows * columns, seed=seed + 1) / 4

    def outer(q):
        return torch.sin(mixing @ q.reshape(-1)).sum() + (q**3).sum()

    def loss(w, s):
        return outer(quantizer(w, s))

    return quantizer, weight, scale, outer, loss


def expected_hessians(name, bits, weight, scale, outer, quantizer):
    """J^T H(q) J with J from the table: for weights alone, and for weights and scales together."""
    q = quantizer(weight, scale).detach()
    inner = torch.autograd.functional.hessian(outer, q).reshape(q.numel(), q.numel())
    turn = torch.as_tensor(transform(name, weight.shape[1]))
    parts = table(name, bits, (weight @ turn.T).numpy(), scale.numpy())
    _, slope_w, slope_s = (torch.as_tensor(part) for part in parts)
    by_weight = torch.block_diag(*(turn.T @ torch.diag(row) @ turn for row in slope_w))
    by_scale = torch.zeros(q.numel(), len(scale), dtype=torch.float64)
    for row in range(len(scale)):
        by_scale[row * weight.shape[1] : (row + 1) * weight.shape[1], row] = slope_s[row]
    both = torch.cat([by_weight, by_scale], dim=1)
    return by_weight.T @ inner @ by_weight, both.T @ inner @ both


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_the_jacobian_of_the_gradient_is_symmetric_and_is_what_the_table_says(name, bits):
    quantizer, weight, scale, outer, loss = quadratic_of(name, bits)
    count = weight.numel()
    assert 0 < quantizer.mask(weight, scale).sum() <= count

    def of_vector(vector):
        return loss(vector[:count].reshape(weight.shape), vector[count:].reshape(scale.shape))

    point = torch.cat([weight.reshape(-1), scale.reshape(-1)])
    dense = torch.autograd.functional.hessian(of_vector, point)
    alone, both = expected_hessians(name, bits, weight, scale, outer, quantizer)
    size = dense.abs().max()
    assert (dense - dense.T).abs().max() <= 1e-14 * size
    torch.testing.assert_close(dense[:count, :count], alone, rtol=0, atol=1e-13 * size.item())
    torch.testing.assert_close(dense, both, rtol=0, atol=1e-13 * size.item())
    if quantizer.learned_scale:
        assert dense[:count, count:].abs().max() > 1e-3 * size, "the mixed block is not zero"


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_every_mode_of_differentiation_gives_the_same_product(name, bits):
    _, weight, scale, _, loss = quadratic_of(name, bits)
    v, u = normal(*weight.shape, seed=8), normal(*scale.shape, seed=9)

    leaf_w, leaf_s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    first = torch.autograd.grad(loss(leaf_w, leaf_s), (leaf_w, leaf_s), create_graph=True, materialize_grads=True)
    inner = (first[0] * v).sum() + (first[1] * u).sum()
    reverse = torch.autograd.grad(inner, (leaf_w, leaf_s), materialize_grads=True)

    def gradient(w, s):
        return grad(loss, argnums=(0, 1))(w, s)

    def check(got):
        torch.testing.assert_close(got[0], reverse[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], reverse[1], rtol=1e-12, atol=1e-12)

    check(jvp(gradient, (weight, scale), (v, u))[1])
    stacked = torch.stack([v, 2 * v]), torch.stack([u, 2 * u])
    several = vmap(lambda a, b: jvp(gradient, (weight, scale), (a, b))[1])(*stacked)
    check([part[0] for part in several])
    check([part[1] / 2 for part in several])

    def reverse_product(a, b):
        return grad(
            lambda w, s: sum((x * y).sum() for x, y in zip(gradient(w, s), (a, b), strict=True)), argnums=(0, 1)
        )(weight, scale)

    check([part[0] for part in vmap(reverse_product)(*stacked)])
    forward = jacfwd(lambda w: grad(loss)(w, scale))(weight)
    torch.testing.assert_close(forward, jacrev(lambda w: grad(loss)(w, scale))(weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "bits"), SCHEMES)
def test_vmap_over_weights_is_a_loop(name, bits):
    quantizer = make_quantizer(name, bits)
    weights = normal(3, 4, 5, seed=10)
    scales = torch.stack([quantizer.initial_scale(weight) for weight in weights])
    want = torch.stack([quantizer(w, s) for w, s in zip(weights, scales, strict=True)])
    assert torch.equal(vmap(quantizer)(weights, scales), want)


def test_third_derivatives_are_those_of_the_smooth_loss():
    """The quantizer adds nothing to derivatives of any order but the mask."""
    quantizer = make_quantizer("lsq", 3)
    weight = torch.tensor([[0.31, -0.7, 0.55]], dtype=torch.float64)
    scale = torch.tensor([[0.2]], dtype=torch.float64)
    q = quantizer(weight, scale)
    third = jacrev(jacrev(grad(lambda w: (quantizer(w, scale) ** 4).sum())))(weight).reshape(3, 3, 3)
    for index in range(3):
        want = 24 * q[0, index] if quantizer.mask(weight, scale)[0, index] else 0 * q[0, index]
        torch.testing.assert_close(third[index, index, index], want)


def test_registry_names_every_scheme_and_refuses_others():
    assert set(QUANTIZERS) == set(SUPPORTED_BITS)
    for name, scheme in QUANTIZERS.items():
        for bits in BITS:
            if bits in SUPPORTED_BITS[name]:
                quantizer = scheme(bits)
                assert (quantizer.name, quantizer.bits) == (name, bits)
                assert quantizer.supported_bits == SUPPORTED_BITS[name]
            else:
                with pytest.raises(InputError, match="use quantizer="):
                    scheme(bits)
    assert make_quantizer("auto", "1.58").name == "seq"
    with pytest.raises(InputError, match="quantizer must be one of"):
        make_quantizer("nope", 2)


@pytest.mark.parametrize("missing", sorted(Quantizer.__abstractmethods__))
def test_a_quantizer_without_one_of_its_methods_cannot_be_made(missing):
    assert Quantizer.__abstractmethods__ == {"levels", "initial_scale", "codes", "dequantize", "mask", "__call__"}
    methods = {name: getattr(QUANTIZERS["seq"], name) for name in Quantizer.__abstractmethods__ - {missing}}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (Quantizer,), {"name": "seq", **methods})(2)


def test_the_mean_of_each_row_of_each_matrix():
    weight = normal(3, 4, 5, seed=0)
    expected = np.abs(weight.numpy()).mean(axis=2)
    np.testing.assert_allclose(mean_magnitude(weight)[..., 0], expected, rtol=1e-12)
    of_matrices = QUANTIZERS["bitnet"](1.58).initial_scale(weight)
    np.testing.assert_allclose(of_matrices[..., 0], np.repeat(expected.mean(1)[:, None], 4, axis=1), rtol=1e-12)
