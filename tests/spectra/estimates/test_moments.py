"""Sums over eigenvalues and their ratios."""

import numpy as np
import pytest

import spectra
from spectra.estimates import moments
from spectra.estimates.quadrature import GaussRule

NOTHING = np.zeros(0)


def seen(eigenvalues, *, probes, seed):
    """The measures that probes on the sphere see, without a recurrence in between."""
    squares = np.random.default_rng(seed).normal(size=(probes, len(eigenvalues))) ** 2
    return [GaussRule(eigenvalues, row / row.sum(), np.zeros(len(eigenvalues))) for row in squares]


@pytest.mark.parametrize("few", [True, False])
def test_differences_of_a_few_eigenvalues_have_more_room_than_sums(few):
    eigenvalues = np.concatenate([[3.0, -2.0, 1.0], np.full(997, 1e-3)]) if few else np.linspace(-1, 1, 1000)
    rules = seen(eigenvalues, probes=4, seed=0)
    plain, wider = (
        moments.sum_over_eigenvalues(lambda x: x, rules, 1000, NOTHING, NOTHING, difference=difference)
        for difference in (False, True)
    )
    assert wider.value == plain.value
    assert wider.half_width == pytest.approx(plain.half_width, rel=1e-2) or few
    assert wider.half_width > 1.1 * plain.half_width or not few


def test_ratios_of_a_few_eigenvalues_are_covered():
    """Twelve outliers make up the energy, as after deflating some of them."""
    values = np.concatenate([np.geomspace(0.3, 3, 12) * np.where(np.arange(12) % 4 == 3, -1, 1), np.full(800, 5e-3)])
    truth = (values[values < 0] ** 2).sum() / (values**2).sum()
    held = 0
    for seed in range(400):
        rules = seen(values, probes=4, seed=seed)
        ratio = moments.ratio_of_sums(
            lambda x: np.where(x < 0, x * x, 0.0), np.square, rules, len(values), NOTHING, NOTHING
        )
        held += ratio.low <= truth <= ratio.high
    print("seeds = 0 to 399, covered", held)
    assert held >= 0.93 * 400


def test_a_ratio_is_resolved_to_each_side():
    """Where chance made it small its spread is small too, and only the far side shows that."""
    values = np.concatenate([np.geomspace(1, 10, 30), -np.geomspace(1, 6, 12), np.linspace(-0.1, 0.1, 900)])
    lopsided = 0
    for seed in range(40):
        share = spectra.slq(spectra.DiagonalOperator(values), probes=10, steps=60, seed=seed).negative_energy_share()
        above = share.high - share.value
        assert share.resolved == (max(above, share.value - share.low) <= 0.05)
        lopsided += share.half_width <= 0.05 < above
    print("seeds = 0 to 39, lopsided", lopsided)
    assert lopsided
