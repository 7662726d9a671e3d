"""Recurrences that advance by small steps where the growth rounds to nothing."""

import numpy as np

import spectra
from spectra.algorithms.probe_space import ProbeSpace
from spectra.algorithms.share_recurrences import Part, ShareRecurrences


def test_each_estimate_takes_a_step_at_least():
    space = ProbeSpace(spectra.DiagonalOperator(np.linspace(-1, 2, 50)), None, seed=0)
    part = Part(space, space.recurrence(range(1), 0), 1, lambda density: density.share_between(-np.inf, 0.0))
    taken = []
    recurrences = ShareRecurrences(
        [part], lambda found: found[0], remaining=lambda: 9, on_step=lambda: taken.append(1), first_steps=2, growth=0.1
    )
    for steps in (2, 3, 4):
        recurrences.advance()
        assert recurrences.steps == len(taken) == part.density().alphas.shape[1] == steps
