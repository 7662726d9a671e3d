"""The smooth function of a straight-through derivative: values held as they were recorded, one forward pass each."""

import pytest
import torch
from oracles import normal

from qat.layers.quantizers.linearization import Linearization, clamped, held


def test_forward_passes_are_replayed_in_turn():
    linearization, values = Linearization(), [torch.tensor(float(i)) for i in range(3)]
    for value in values:
        with linearization.record():
            assert held(value) == value
            assert held(10 * value) == 10 * value
    for expected in (0, 1, 2, 0, 1):
        with linearization.replay():
            assert held(torch.tensor(-1.0)) == expected
            assert held(torch.tensor(-1.0)) == 10 * expected


def test_outside_nothing_is_held():
    linearization = Linearization()
    with linearization.record():
        held(torch.ones(1))
    x = torch.tensor([2.0, -3.0], requires_grad=True)
    assert torch.equal(held(x), x.detach())
    assert not held(x).requires_grad
    assert torch.equal(clamped(x, -1.0, 5.0), torch.tensor([2.0, -1.0]))
    with pytest.raises(RuntimeError), linearization.replay():
        raise RuntimeError
    assert torch.equal(held(x), x.detach())


def test_a_clamp_moves_where_it_lay_within_the_bounds_both_included():
    start = torch.tensor([-2.0, -1.0, 0.3, 1.0, 1.5], dtype=torch.float64)
    linearization = Linearization()
    with linearization.record():
        assert torch.equal(clamped(start, -1.0, 1.0), start.clamp(-1, 1))
    move = normal(5, seed=1)
    x = (start + move).requires_grad_()
    with linearization.replay():
        found = clamped(x, -1.0, 1.0)
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, start.clamp(-1, 1) + inside * move)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], inside)
