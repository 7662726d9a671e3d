"""The bracket against the exact measure of the start vector, which a diagonal operator makes known."""

import numpy as np
import pytest
import torch

from spectra import DiagonalOperator, lanczos
from spectra.estimates.brackets import bracket


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
