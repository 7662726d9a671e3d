"""Gauss rules against NumPy's Gauss-Legendre quadrature, and against matrices whose Krylov space is known."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
from measures import jacobi_matrix, sphere_weights

from spectra.estimates.brackets import bracket
from spectra.estimates.quadrature import christoffel, gauss_rule


def legendre(m):
    """The Jacobi matrix of the even measure on [-1, 1]."""
    k = np.arange(1, m + 1)
    return np.zeros(m), k / np.sqrt(4.0 * k**2 - 1)


@pytest.mark.parametrize("m", [1, 2, 7, 30])
def test_the_rule_of_legendre_polynomials(m):
    nodes, weights = np.polynomial.legendre.leggauss(m)
    rule = gauss_rule(*legendre(m))
    np.testing.assert_allclose(rule.nodes, nodes, atol=1e-13)
    np.testing.assert_allclose(rule.weights, weights / 2, atol=1e-13)


def test_polynomials_up_to_twice_the_length_are_integrated_exactly():
    values, (weights,) = np.linspace(-1, 1, 50), sphere_weights(50, probes=1, seed=0)
    rule = gauss_rule(*jacobi_matrix(values, weights, 5))
    for power in range(10):
        assert rule.weights @ rule.nodes**power == pytest.approx(weights @ values**power, abs=1e-13), power
    assert abs(rule.weights @ rule.nodes**10 - weights @ values**10) > 1e-8


def test_last_components_give_the_residual_norms():
    """In the basis of the Krylov space the operator is the longer Jacobi matrix, and a Ritz vector ends after m
    entries."""
    values, (weights,) = np.linspace(-1, 1, 50) ** 3, sphere_weights(50, probes=1, seed=1)
    alphas, betas = jacobi_matrix(values, weights, 20)
    operator = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    rule = gauss_rule(alphas[:8], betas[:8])
    small, vectors = np.linalg.eigh(operator[:8, :8])
    padded = np.vstack([vectors, np.zeros((12, 8))])
    residuals = np.linalg.norm(operator @ padded - padded * small, axis=0)
    np.testing.assert_allclose(betas[7] * np.abs(rule.last_components), residuals, atol=1e-13)


def test_another_driver_is_tried_where_the_fast_one_fails(monkeypatch):
    matrix = jacobi_matrix(np.linspace(-1, 1, 50), np.ones(50), 12)
    expected, solve = gauss_rule(*matrix), scipy.linalg.eigh_tridiagonal

    def failing(diagonal, off_diagonal, lapack_driver="auto"):
        if lapack_driver == "auto":
            raise np.linalg.LinAlgError("no convergence")
        return solve(diagonal, off_diagonal, lapack_driver=lapack_driver)

    monkeypatch.setattr(scipy.linalg, "eigh_tridiagonal", failing)
    rule = gauss_rule(*matrix)
    np.testing.assert_allclose(rule.nodes, expected.nodes, atol=1e-13)
    np.testing.assert_allclose(rule.weights, expected.weights, atol=1e-13)


@pytest.mark.parametrize("point", [-0.9, 0.0, 0.31, 1.0, 2.5])
def test_the_christoffel_function_of_legendre_polynomials(point):
    m = 9
    polynomials = [
        np.sqrt(2 * j + 1) * np.polynomial.legendre.Legendre.basis(j)(point) for j in range(m)
    ]  # orthonormal for the even measure, whose mass is 1
    assert christoffel(*legendre(m), point) == pytest.approx(1 / np.sum(np.square(polynomials)), rel=1e-10)


def test_the_christoffel_function_is_the_weight_of_a_radau_node():
    values, (weights,) = np.linspace(-1, 1, 50), sphere_weights(50, probes=1, seed=2)
    alphas, betas = jacobi_matrix(values, weights, 10)
    for point in (-0.7, 0.05, 0.99):  # the Radau rule has a node more, and so a polynomial more
        longer = np.append(alphas, 0.0)
        assert bracket(alphas, betas, point).at == pytest.approx(christoffel(longer, betas, point), rel=1e-9)


def test_the_christoffel_function_far_outside_the_support_does_not_overflow():
    """Chebyshev polynomials of the second kind at an integer, which are integers."""
    m, point = 52, 300
    polynomials = [1, 2 * point]
    while len(polynomials) < m:
        polynomials.append(2 * point * polynomials[-1] - polynomials[-2])
    total = sum(value**2 for value in polynomials)
    assert total > 10**280  # beyond 1e200 the recurrence is rescaled
    found = christoffel(np.zeros(m), np.full(m, 0.5), float(point))
    assert found == pytest.approx(float(Fraction(1, total)), rel=1e-9)


def test_the_christoffel_function_is_right_after_it_was_rescaled():
    """For alphas = 0 and betas = 1: 1 / (1 + x^2 + (x^2 - 1)^2)."""
    found = christoffel(np.zeros(3), np.ones(2), 1e60)
    assert found == pytest.approx(1e-240, rel=1e-12, abs=0)
