"""Losses kept on the device: how often they are copied, and which step a NaN is named with."""

import math

import torch

from qat.training.losses import StepLosses


def test_losses_are_copied_together_and_parts_of_a_step_are_added():
    losses = StepLosses(every=3)
    losses.add(1, torch.tensor(2.0))
    losses.add(2, torch.tensor(0.5))
    losses.add(2, torch.tensor(0.25))
    assert not losses.due
    losses.add(3, torch.tensor(4.0, dtype=torch.bfloat16))
    assert losses.due
    assert losses.look() == [(1, 2.0), (2, 0.75), (3, 4.0)]
    assert not losses.due
    assert losses.look() == []


def test_the_first_loss_that_is_not_finite_is_the_last_that_is_returned():
    losses = StepLosses(every=10)
    for step, loss in enumerate([1.0, 2.0, math.inf, math.nan, 3.0], start=4):
        losses.add(step, torch.tensor(loss))
    found = losses.look()
    assert found == [(4, 1.0), (5, 2.0), (6, math.inf)]


def test_adding_reads_no_value():
    """Losses without values (meta tensors) can be added: nothing is copied before a look."""
    losses = StepLosses(every=2)
    for step in (1, 1, 2):
        losses.add(step, torch.empty((), device="meta"))
    assert losses.due
