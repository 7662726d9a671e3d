"""Differences of the gradient as products: their error is measured, is part of intervals, or they are refused."""

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import spectra

BATCHES = tiny_models.classification((9, 6))
FLOATS = [(x.float(), y) for x, y in BATCHES]


class Once(nn.Module):
    """tanh without a second derivative."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return cotangent * (1 - x.tanh() ** 2)

    def forward(self, x):
        return self._Function.apply(x)


class ErringGradient(nn.Module):
    """tanh with a gradient that is off by many times its size, so that differences of it say nothing."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return cotangent * (1 + 30 * torch.sin(1e6 * cotangent))

    def forward(self, x):
        return self._Function.apply(x.tanh())


def network(activation, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3)).to(dtype)


def pair(dtype=torch.float64):
    """The exact Hessian, and differences of the gradient of the same model without a second derivative."""
    batches = BATCHES if dtype == torch.float64 else FLOATS
    exact = spectra.HessianOperator(network(nn.Tanh(), dtype), batches)
    return exact, spectra.HessianOperator(network(Once(), dtype), batches, engine="differences")


@pytest.mark.parametrize(("dtype", "below"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_the_stated_error_bounds_products_in_every_direction(dtype, below):
    exact, op = pair(dtype)
    values, vectors = torch.linalg.eigh(exact.to_dense())
    random = torch.linalg.qr(torch.randn(len(values), 6, generator=torch.Generator().manual_seed(0)).to(dtype))[0]
    directions = torch.cat([vectors[:, -3:], vectors[:, :2], random], dim=1)
    errors = (op @ directions - exact @ directions).norm(dim=0) / values.abs().max()
    assert 0 < float(errors.max()) <= 2 * op.precision_error() < 2 * below
    assert op.engine_used == "differences"
    assert any("products are differences of the gradient" in note for note in op.notes)


def test_the_error_is_part_of_intervals_which_cover_the_truth():
    exact, op = pair(torch.float32)
    truth = np.linalg.eigvalsh(exact.to_dense().double().numpy())[-1]
    found, alike = (spectra.slq(each, probes=2, steps=20).lambda_max() for each in (op, exact))
    assert found.low <= truth <= found.high
    assert found.high - found.low > alike.high - alike.low
    assert op.rounding() >= 2 * op.precision_error()


def test_the_error_is_measured_anew_when_weights_change():
    _, op = pair()
    before = op.precision_error()
    with torch.no_grad():
        op.model[0].weight.mul_(3)
    op.gradient()
    assert op.precision_error() != before > 0


def test_the_size_of_a_vector_does_not_matter():
    _, op = pair()
    vector = torch.linspace(-1, 1, op.shape[0], dtype=op.dtype)
    torch.testing.assert_close(op @ (1e6 * vector), 1e6 * (op @ vector), rtol=1e-6, atol=1e-3)
    assert not (op @ torch.zeros_like(vector)).any()


def test_a_float64_copy_takes_differences_too():
    exact, op = pair(torch.float32)
    with op.in_float64() as precise:
        assert precise.precision_error() < op.precision_error() / 100
        vector = torch.linspace(-1, 1, op.shape[0], dtype=torch.float64)
        torch.testing.assert_close(precise @ vector, exact.in_float64() @ vector, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: spectra.HessianOperator(network(ErringGradient()), BATCHES, engine="differences"),
            "disagree by|is not that of",
        ),
        (lambda: spectra.GaussNewtonOperator(network(nn.Tanh()), BATCHES, engine="differences"), "is for the Hessian"),
        (
            lambda: spectra.HessianOperator(network(nn.Tanh()).float(), FLOATS, engine="differences", precision="tf32"),
            "is for the Hessian in float32 or float64",
        ),
        (lambda: spectra.HessianOperator(network(nn.Tanh()), BATCHES, graph="gather layers"), "fully_shard"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, message):
    with pytest.raises(spectra.InputError, match=message):
        make().loss()


def test_blocks_and_quantized_models_are_refused():
    _, op = pair()
    with pytest.raises(spectra.InputError, match="blocks= is not supported with engine='differences'"):
        spectra.slq(op, probes=2, steps=5, blocks="layers")
    import qat

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    with pytest.raises(spectra.InputError, match="straight-through derivatives of a quantized model"):
        spectra.HessianOperator(model, [(torch.randn(4, 8), torch.randint(3, (4,)))], engine="differences")


def test_the_plan_holds_no_graph():
    _, op = pair()
    planned = spectra.plan(op, probes=1, steps=5)
    assert (planned.kept, planned.graphs) == (0, op.vector_bytes)
    assert planned.product > 2 * op.vector_bytes
