"""Curves against closed forms."""

import numpy as np
import pytest
from scipy.stats import norm

from spectra.estimates.curves import cumulative_share, kernel_widths, smoothed_density


def test_kernel_widths_are_the_local_node_spacing():
    nodes = np.array([[0.0, 1.0, 3.0, 7.0]])
    np.testing.assert_allclose(kernel_widths(nodes), [[1.0, 1.5, 3.0, 4.0]])
    np.testing.assert_allclose(kernel_widths(np.array([[2.0, 2.0, 2.0]])), [[2e-6] * 3])
    np.testing.assert_allclose(kernel_widths(np.array([[-5.0]])), [[5e-6]])
    np.testing.assert_allclose(kernel_widths(np.array([[0.0, 0.0]])), [[1e-12] * 2])


def test_the_smoothed_density_is_a_mixture_of_normal_densities():
    nodes, weights = np.array([[-1.0, 2.0], [0.0, 9.0]]), np.array([[0.25, 0.75], [1.0, 0.0]])
    widths, grid = np.array([[0.5, 1.0], [2.0, 1.0]]), np.linspace(-9, 9, 3601)
    found = smoothed_density(nodes, weights, widths, grid)
    expected = (0.25 * norm.pdf(grid, -1, 0.5) + 0.75 * norm.pdf(grid, 2, 1) + norm.pdf(grid, 0, 2)) / 2
    np.testing.assert_allclose(found[1:-1], expected[1:-1], atol=1e-5)


def test_each_cell_holds_the_mass_that_falls_into_it():
    """Kernels much narrower than the grid: each inner cell is as wide as the grid's spacing."""
    grid = np.arange(5.0)
    found = smoothed_density(np.array([[1.2, 3.0]]), np.array([[0.3, 0.7]]), np.full((1, 2), 1e-3), grid)
    np.testing.assert_allclose(found, [0, 0.3, 0, 0.7, 0], atol=1e-12)


def test_the_cumulative_share_counts_half_of_a_node_at_it():
    nodes, weights = np.array([-1.0, 0.0, 2.0]), np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(cumulative_share(nodes, weights, nodes), [0.1, 0.45, 0.85])
    np.testing.assert_allclose(cumulative_share(nodes, weights, np.array([-1.1, 2.1])), [0, 1])
    between = cumulative_share(nodes, weights, np.linspace(-1, 2, 50))
    assert (np.diff(between) > 0).all()


def test_one_node_is_a_step():
    found = cumulative_share(np.array([1.0]), np.array([1.0]), np.array([0.9, 1.0, 1.1]))
    assert found.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("distance", [0.0, 1e-14])
def test_copies_of_a_node_count_as_one(distance):
    grid = np.linspace(-1, 6, 71)
    plain = cumulative_share(np.array([0.0, 1.0, 5.0]), np.array([0.3, 0.3, 0.4]), grid)
    nodes, weights = np.array([0.0, 1.0, 5.0, 5.0 + distance]), np.array([0.3, 0.3, 0.1, 0.3])
    np.testing.assert_allclose(cumulative_share(nodes, weights, grid), plain, atol=1e-12)
