"""A matrix that is not symmetric, or zero because the loss is rounded, is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import InputError
from spectra.operators.hessian.symmetry import check_symmetry

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(1))


def net(between=None):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), between or nn.Tanh(), nn.Linear(5, 3))


class RowScale(torch.autograd.Function):
    """A scale by row that its own derivative leaves out, as that of an embedding with scale_grad_by_freq does."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient * torch.linspace(0.9, 1.1, len(gradient))[:, None]

    @staticmethod
    def backward(ctx, vector):
        return vector


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient g becomes D g, and whose product D H v: a derivative, and of no function."""

    @staticmethod
    def forward(ctx, w):
        return w.clone()

    @staticmethod
    def backward(ctx, gradient):
        return RowScale.apply(gradient)


class Scaled(nn.Module):
    """A network, the gradient of whose first weight is scaled by a few percent on its way."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        weight = ScaledGradient.apply(self.net[0].weight)
        return self.net[2](torch.tanh(functional.linear(x, weight, self.net[0].bias)))


def test_a_gradient_scaled_by_little_passes_the_differences_and_not_the_symmetry():
    op = spectra.HessianOperator(Scaled(), [(X, Y)])
    with pytest.raises(InputError, match="not symmetric"):
        op.preflight()
    op = spectra.HessianOperator(Scaled(), [(X, Y)], strict=False)
    op.preflight()
    assert "not symmetric" in op.unverified
    assert not spectra.trace(op).resolved


@pytest.mark.parametrize(("rounding", "refused"), [(1e-7, True), (1e-2, False)])
def test_an_asymmetry_of_rounding_error_is_accepted(rounding, refused):
    gap = 0.05 / math.sqrt(1000)
    if refused:
        with pytest.raises(InputError, match="by about 5%"):
            check_symmetry(gap, rounding, 1000)
    else:
        check_symmetry(gap, rounding, 1000)
    check_symmetry(1e-4, 0.0, 1000)


@pytest.mark.parametrize("name", ["round", "floor", "ceil", "trunc", "sign"])
def test_a_rounded_loss_is_refused_with_the_function(name):
    step = getattr(torch, name)
    op = spectra.HessianOperator(net(), [(X, Y)], loss=lambda out, y: functional.cross_entropy(step(3 * out), y))
    with pytest.raises(InputError, match=f"every derivative of the loss is zero, since it is computed with {name}"):
        op.preflight()


class Rounded(nn.Module):
    """Rounds in the middle."""

    def forward(self, x):
        return x.round()


def test_parameters_before_a_rounding_are_noted():
    op = spectra.HessianOperator(net(Rounded()), [(X, Y)])
    op.preflight()
    assert "rows are zero of parameters whose derivatives may end at round: 0.weight, 0.bias" in op.notes


def test_a_zero_without_a_rounding_is_a_zero():
    loss = lambda out, y: (out.abs() - 100).relu().square().mean()  # noqa: E731, met everywhere
    op = spectra.HessianOperator(net(), [(X, Y)], loss=loss)
    assert not (op @ torch.ones(op.shape[0])).any()


def test_fake_quantization_whose_products_cannot_be_compared_is_refused():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = net(nn.ReLU()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)
    model(X)
    with pytest.raises(InputError, match=r"fake quantization"):
        spectra.HessianOperator(model, [(X, Y)]).preflight()
