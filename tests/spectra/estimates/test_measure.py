"""What probe vectors saw, as one value: against dense eigenvalues and shorter recurrences."""

import dataclasses

import numpy as np
import pytest
from measures import even_weights, jacobi_matrix, known_eigenvalues, measure_of, only_known, sphere_weights, stacked

import spectra
from spectra.estimates.measure import FLOAT64_ERROR, KnownEigenvalues, SpectralMeasure


def test_known_eigenvalues_are_counted_with_multiplicity():
    known = known_eigenvalues([-1.0, 0.0, 5.0], counts=[1, 30, 2], errors=[0.1, 0.0, 0.2])
    assert known.total == 33
    assert KnownEigenvalues().total == 0
    mirrored = known.negated()
    assert mirrored.values.tolist() == [1.0, 0.0, -5.0]
    assert (mirrored.counts.tolist(), mirrored.errors.tolist()) == ([1, 30, 2], [0.1, 0.0, 0.2])
    rest = known.without_zeros()
    assert (rest.values.tolist(), rest.counts.tolist(), rest.errors.tolist()) == ([-1.0, 5.0], [1, 2], [0.1, 0.2])


@pytest.mark.parametrize("residual", [0.1, 0.01, 0.001])
def test_the_deflation_shift_is_how_far_a_coupled_eigenvalue_moves(residual):
    """Two eigenvalues 5 and -3, each coupled to the third by a residual, and deflated as if they were not."""
    matrix = np.array([[5.0, 0.0, residual], [0.0, -3.0, 2 * residual], [residual, 2 * residual, 0.0]])
    moved = abs(np.linalg.eigvalsh(matrix)[1])
    pushed_down, pushed_up = residual**2 / 5, (2 * residual) ** 2 / 3
    shift = known_eigenvalues([5.0, -3.0], errors=[residual, 2 * residual]).deflation_shift(0.0)
    assert shift == pytest.approx(pushed_down + pushed_up, rel=1e-12)
    assert moved == pytest.approx(pushed_up - pushed_down, rel=0.02)
    assert moved <= shift


def test_the_deflation_shift_at_the_eigenvalue_itself_is_its_residual():
    assert known_eigenvalues([2.0, 7.0], errors=[0.1, 0.0]).deflation_shift(2.0) == pytest.approx(0.1)
    assert known_eigenvalues([2.0], errors=[0.1]).deflation_shift(2.05) == pytest.approx(0.1)
    assert known_eigenvalues([2.0]).deflation_shift(2.0) == 0.0


def test_probe_vectors_without_a_recurrence_are_left_out():
    matrices = [jacobi_matrix(np.arange(9.0), np.ones(9), m) for m in (3, 5)]
    jacobi = stacked(matrices, 6)
    jacobi = dataclasses.replace(jacobi, lengths=np.array([3, 0]))
    (used,) = jacobi.used
    np.testing.assert_array_equal(used[0], matrices[0][0])
    np.testing.assert_array_equal(used[1], matrices[0][1])
    assert len(SpectralMeasure(jacobi, 9).rules) == 1


def test_shortened_matrices_keep_one_step():
    jacobi = stacked([jacobi_matrix(np.arange(9.0), np.ones(9), m) for m in (1, 3, 8)], 8)
    assert jacobi.shortened(2).lengths.tolist() == [1, 1, 4]
    assert jacobi.shortened(4).lengths.tolist() == [1, 1, 2]
    assert dataclasses.replace(jacobi, lengths=np.array([0, 3, 8])).shortened(2).lengths.tolist() == [0, 1, 4]


def test_a_shortened_measure_is_that_of_fewer_steps():
    values = np.random.default_rng(0).normal(size=200)
    long, short = (spectra.slq(spectra.DiagonalOperator(values), probes=3, steps=m).measure for m in (24, 12))
    for cut, rule in zip(long.shortened(2).rules, short.rules, strict=True):
        np.testing.assert_allclose(cut.nodes, rule.nodes, atol=1e-12)
        np.testing.assert_allclose(cut.weights, rule.weights, atol=1e-12)
    for cut, residuals in zip(long.shortened(2).residuals, short.residuals, strict=True):
        np.testing.assert_allclose(cut, residuals, atol=1e-12)


def test_rules_find_the_eigenvalues_and_their_weights():
    values, weights = np.array([-2.0, 0.5, 1.0, 3.0]), sphere_weights(4, probes=2, seed=0)
    measure = measure_of(values, weights)
    for rule, row, residuals in zip(measure.rules, weights, measure.residuals, strict=True):
        np.testing.assert_allclose(rule.nodes, values, atol=1e-12)
        np.testing.assert_allclose(rule.weights, row, atol=1e-12)
        np.testing.assert_allclose(residuals, 0, atol=1e-9)


def test_residuals_are_those_of_each_probe_vector():
    values, weights = np.linspace(-1, 1, 40), sphere_weights(40, probes=2, seed=1)
    measure = measure_of(values, weights, steps=6)
    for row, found in zip(weights, measure.residuals, strict=True):
        alphas, betas = jacobi_matrix(values, row, 6)
        vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))[1]
        np.testing.assert_allclose(found, betas[-1] * np.abs(vectors[-1]), atol=1e-12)


def test_dimension_and_radius_count_known_eigenvalues_in():
    known = known_eigenvalues([-40.0, 0.0], counts=[1, 6])
    measure = measure_of([1.0, 2.0, 3.0], even_weights(3), known=known)
    assert (measure.sampled_dimension, measure.dimension) == (3, 10)
    assert measure.radius == 40.0
    assert measure_of([1.0, 2.0, -3.0], even_weights(3), known=known_eigenvalues([0.0])).radius == pytest.approx(3)
    assert only_known([-2.0, 1.0]).radius == 2.0


def test_the_relative_rounding_error_is_that_of_float64_at_least():
    values = np.array([1.0, 2.0, -4.0])
    assert measure_of(values, even_weights(3), rounding_error=1e-3).relative_rounding_error == pytest.approx(2.5e-4)
    assert measure_of(values, even_weights(3)).relative_rounding_error == FLOAT64_ERROR
    assert only_known([0.0]).relative_rounding_error == FLOAT64_ERROR
