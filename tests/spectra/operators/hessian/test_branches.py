"""Piecewise linear functions on held branches: their values, derivatives, and the differences of networks with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra.operators.hessian.branches import BranchesSeen, HeldBranches

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "relu": functional.relu,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "module": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.3),
    "abs": torch.abs,
    "pool": nn.MaxPool2d(2, stride=1, padding=1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_held_branch_gives_the_function_and_its_derivative_there_and_is_linear_elsewhere(name):
    function, held = FUNCTIONS[name], HeldBranches(torch.device("cpu"))
    x = IMAGES.clone().requires_grad_()
    with held.record():
        wanted = function(x)
    with held.replay():
        found = function(x)
    assert torch.equal(found, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (one,), (other,) = (torch.autograd.grad((y * weights).sum(), x) for y in (wanted, found))
    assert torch.equal(one, other)
    moved = (x.detach() + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    with held.replay():
        far = function(moved)
    (there,) = torch.autograd.grad((far * weights).sum(), moved)
    assert torch.allclose(there, one)
    assert not torch.allclose(far, function(moved))


def test_integers_and_tensors_without_a_gradient_hold_nothing():
    with BranchesSeen() as seen:
        torch.abs(torch.tensor([-1, 2]))
        torch.relu(torch.tensor([-1.0]))
    assert not seen.found


def test_a_call_of_another_shape_takes_its_own_branch():
    held = HeldBranches(torch.device("cpu"))
    with held.record():
        torch.relu(torch.ones(3, requires_grad=True))
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    with held.replay():
        assert torch.relu(x).tolist() == [0.0, 1.0]


def network(between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), between(), nn.Linear(128, 128), between(), nn.Linear(128, 4))


@pytest.mark.parametrize("between", [nn.ReLU, nn.LeakyReLU])
def test_a_network_with_kinks_is_checked_in_float32_to_the_tolerance_of_a_smooth_one(between, monkeypatch):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    y = torch.randint(0, 4, (256,), generator=torch.Generator().manual_seed(4))
    op = spectra.HessianOperator(network(between), [(x, y)], loss=functional.cross_entropy)
    dtypes, at = [], op._graphs.gradient_at
    monkeypatch.setattr(op._graphs, "gradient_at", lambda *a, **k: dtypes.append(k["dtype"]) or at(*a, **k))
    op @ torch.ones(op.shape[0])
    assert dtypes == [torch.float32] * 2
    assert op.checks["product_error"] < 2e-3


def test_a_wrong_derivative_beside_kinks_is_refused():
    class Wrong(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 0.05 * torch.tanh(x).detach()

    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    y = torch.randint(0, 4, (256,), generator=torch.Generator().manual_seed(4))
    with pytest.raises(spectra.InputError, match=r"wrong|not that of the loss"):
        spectra.HessianOperator(network(Wrong), [(x, y)], loss=functional.cross_entropy) @ torch.ones(25348)
