"""Eigenvalues outside of what was found are seen, or missed as rarely as promised."""

import math

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum

import spectra
from spectra.algorithms.lanczos import LanczosRecurrence
from spectra.algorithms.missed import missed_probability_bound, rules_out_eigenvalues_beyond
from spectra.backend.random_vectors import gaussian, probe_vector

BULK = np.random.default_rng(0).normal(size=2000)


def look(op, basis, low, high, seed, **options):
    return rules_out_eigenvalues_beyond(op, basis, low, high, seed=seed, stream="test", **options)


@pytest.mark.parametrize("gap", [1.1, 1.5, 4.0])
def test_an_eigenvalue_just_beyond_is_missed_no_more_often_than_promised(gap):
    end = gap * np.abs(BULK).max()
    op = spectra.DiagonalOperator(np.append(BULK, end * (1 + 1e-9)))
    nothing = torch.empty(0, op.shape[0], dtype=op.dtype)
    missed = sum(look(op, nothing, -end, end, seed, max_steps=60) for seed in range(200))
    print(f"missed {missed} of 200")
    assert missed <= 19  # 5 % is 10; 19 or more is less likely than .01


def test_an_eigenvalue_further_out_is_hardly_ever_missed():
    end = 1.5 * np.abs(BULK).max()
    op = spectra.DiagonalOperator(np.append(BULK, 2 * end))
    nothing = torch.empty(0, op.shape[0], dtype=op.dtype)
    assert not any(look(op, nothing, -end, end, seed) for seed in range(100))


def test_few_products_rule_out_an_eigenvalue_beyond_the_bounds():
    end = 1.5 * np.abs(BULK).max()
    op = spectra.DiagonalOperator(BULK)
    nothing = torch.empty(0, op.shape[0], dtype=op.dtype)
    assert all(look(op, nothing, -end, end, seed) for seed in range(20))
    assert op.products <= 20 * 8
    half_open = spectra.DiagonalOperator(BULK)
    assert look(half_open, nothing, -math.inf, end, 0)
    assert half_open.products <= op.products / 20


def test_eigenvectors_in_the_basis_do_not_count():
    truth = np.concatenate([BULK[:300], [50.0, 50.0, -70.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=1))
    vectors = torch.linalg.eigh(op.matrix)[1].T
    assert look(op, vectors[[0, -1, -2]], -5.0, 5.0, 0)
    assert not look(op, vectors[[0, -1]], -5.0, 5.0, 0)  # the other copy of 50
    assert not look(op, vectors[[-1, -2]], -5.0, 5.0, 0)
    assert look(op, vectors[[-1, -2]], -math.inf, 5.0, 0)
    assert look(op, vectors, 0.0, 0.0, 0)  # nothing is left


def test_without_a_decision_the_ritz_values_decide():
    """At the edge of a bulk a few products cannot rule out an eigenvalue beyond it."""
    op = spectra.DiagonalOperator(np.linspace(-1, 1, 3000))
    nothing = torch.empty(0, 3000, dtype=op.dtype)
    assert look(op, nothing, -1.1, 1.1, 0, max_steps=15)
    assert op.products == 15
    assert not look(op, nothing, -0.999, 0.999, 0, max_steps=15)


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize("seed", range(5))
def test_without_a_decision_the_extreme_ritz_value_counts_with_its_residual(end, seed):
    """With a bound between the extreme Ritz value and that value moved outward by its residual norm, the answer is no.

    The oracle takes the Ritz pair and its residual ||A x - theta x|| from a basis of its own.
    """
    print(f"seed = {seed}")
    steps, sign = 15, 1 if end == "high" else -1
    op = spectra.DiagonalOperator(np.linspace(-1, 1, 3000))
    basis = spectra.lanczos(op, gaussian(op, seed=seed, index=0, stream="test"), steps).basis
    values, small = torch.linalg.eigh(basis * op.values @ basis.T)
    column = -1 if end == "high" else 0
    vector = small[:, column] @ basis
    theta = float(values[column])
    residual = float((op @ vector - theta * vector).norm())
    assert residual > 1e-3
    nothing = torch.empty(0, 3000, dtype=op.dtype)
    for factor, expected in ((0.1, False), (0.9, False), (1.1, True)):
        bound = theta + sign * factor * residual
        low, high = (-math.inf, bound) if end == "high" else (bound, math.inf)
        assert look(op, nothing, low, high, seed, max_steps=steps) is expected, factor


def test_the_bound_is_that_of_the_mass_of_the_eigenvector():
    """At an eigenvalue beyond the Ritz values it is at least what the mass there gives, and tends to that."""
    outlier = 6.0
    op = spectra.DiagonalOperator(np.append(BULK, outlier))
    for seed in range(20):
        start = probe_vector(op, seed=seed, index=0)
        held = math.sqrt(2 * op.shape[0] * float(start[-1]) ** 2 / math.pi)
        recurrence = LanczosRecurrence(op, start)
        before = 1.0
        for _ in range(12):
            recurrence.advance(1)
            found = recurrence.tridiagonals()[0]
            bound = missed_probability_bound(found, op.shape[0], outlier)
            assert min(held, 1.0) * (1 - 1e-9) <= bound <= before  # each step leaves less
            assert missed_probability_bound(found, op.shape[0], 2 * outlier) <= bound
            before = bound
        assert bound == pytest.approx(min(held, 1.0), rel=0.01)  # all that is left in the end
    assert (
        missed_probability_bound(found, op.shape[0], math.inf)
        == missed_probability_bound(found, op.shape[0], -math.inf)
        == 0
    )


def test_topk_spends_few_products_on_it():
    truth = np.concatenate([BULK, [40.0, 30.0, -25.0]])
    for k, which in ((1, "LM"), (3, "LM"), (2, "LA")):
        op = spectra.DiagonalOperator(truth)
        alone = spectra.topk(op, k, which=which, tol=1e-4, verify=False).products
        spent = spectra.topk(op, k, which=which, tol=1e-4).products - alone
        assert 1 <= spent <= 7
