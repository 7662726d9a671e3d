"""The bracket against the exact measure of the start vector, which a diagonal operator makes known."""

import numpy as np
import pytest
import torch

from spectra import DiagonalOperator, lanczos
from spectra.estimates.brackets import bracket, mass_bounds


def start_and_values(seed, n=300):
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.standard_t(3, size=n - 6) * 0.05, [0.0, 0.0, 0.0, 4.0, 9.0, -2.0]])
    start = rng.normal(size=n)
    return torch.tensor(start / np.linalg.norm(start)), values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_bounds_the_measure_on_both_sides(seed, steps):
    start, values = start_and_values(seed)
    result = lanczos(DiagonalOperator(values), start, steps)
    mass = start.numpy() ** 2
    for threshold in (-3.0, -0.1, -1e-3, 0.0, 0.02, 0.3, 5.0, 10.0):
        found = bracket(result.alphas, result.betas, threshold)
        assert found.below <= mass[values < threshold].sum() + 1e-12
        assert found.below + found.at >= mass[values <= threshold].sum() - 1e-12
        assert found.below >= 0
        assert found.below + found.at <= 1 + 1e-12


def test_more_steps_narrow_it():
    start, values = start_and_values(0)
    result = lanczos(DiagonalOperator(values), start, 120)
    widths = [bracket(result.alphas[:m], result.betas[:m], 0.01).at for m in (10, 30, 60, 120)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1


def test_is_exact_after_a_breakdown():
    values = np.array([-1.0, -1.0, 0.0, 2.0, 2.0, 2.0])
    start = torch.full((6,), 1 / np.sqrt(6), dtype=torch.float64)
    result = lanczos(DiagonalOperator(values), start, 6)
    assert result.betas[-1] == 0
    found = bracket(result.alphas, result.betas, 0.0)
    assert found.below == pytest.approx(2 / 6, abs=1e-12)
    assert found.at == pytest.approx(1 / 6, abs=1e-12)


def test_a_threshold_on_a_ritz_value():
    start, values = start_and_values(1)
    result = lanczos(DiagonalOperator(values), start, 12)
    ritz = np.linalg.eigvalsh(np.diag(result.alphas) + np.diag(result.betas[:-1], 1) + np.diag(result.betas[:-1], -1))
    mass = start.numpy() ** 2
    for threshold in ritz[3:9]:
        found = bracket(result.alphas, result.betas, float(threshold))
        assert found.below <= mass[values < threshold].sum() + 1e-9
        assert found.below + found.at >= mass[values <= threshold].sum() - 1e-9


@pytest.mark.parametrize("steps", [3, 10, 40])
def test_bounds_at_many_thresholds_hold_the_mass_and_are_hardly_wider(steps):
    start, values = start_and_values(steps)
    result = lanczos(DiagonalOperator(values), start, steps)
    mass = start.numpy() ** 2
    thresholds = np.concatenate([np.linspace(-3, 10, 101), np.linspace(-0.2, 0.2, 101), values + 1e-9, values - 1e-9])
    low, high = mass_bounds(result.alphas, result.betas, thresholds)
    below, up_to = ((values < thresholds[:, None]) @ mass, (values <= thresholds[:, None]) @ mass)
    assert np.all(low <= below + 1e-12)
    assert np.all(high >= up_to - 1e-12)
    assert np.all((low >= 0) & (high <= 1 + 1e-12))
    exact = [bracket(result.alphas, result.betas, float(t)) for t in thresholds[:202]]
    room = [one.at - (high[i] - low[i]) for i, one in enumerate(exact)]
    assert max(room) < 1e-9  # never narrower than the best bounds
    assert np.mean(room) > -0.15 * np.mean([one.at for one in exact])
    assert min(room) > -max(one.at for one in exact)


def test_bounds_are_those_of_the_bracket_where_that_is_asked_for():
    start, values = start_and_values(4)
    result = lanczos(DiagonalOperator(values), start, 25)
    thresholds = [-0.1, 0.0, 0.02, 5.0]
    low, high = mass_bounds(result.alphas, result.betas, np.array(thresholds), exactly_at=thresholds, rules=1)
    exact = [bracket(result.alphas, result.betas, t) for t in thresholds]
    assert low == pytest.approx([one.below for one in exact], abs=1e-9)
    assert high == pytest.approx([one.below + one.at for one in exact], abs=1e-9)


def test_bounds_are_exact_after_a_breakdown():
    values = np.array([-1.0, -1.0, 0.0, 2.0, 2.0, 2.0])
    start = torch.full((6,), 1 / np.sqrt(6), dtype=torch.float64)
    result = lanczos(DiagonalOperator(values), start, 6)
    low, high = mass_bounds(result.alphas, result.betas, np.array([-2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0]))
    assert low == pytest.approx(np.array([0, 0, 2, 2, 3, 3, 6]) / 6, abs=1e-12)
    assert high == pytest.approx(np.array([0, 2, 2, 3, 3, 6, 6]) / 6, abs=1e-12)
