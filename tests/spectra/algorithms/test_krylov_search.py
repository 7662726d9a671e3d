"""Which eigenvalues are wanted, and what a search leaves in its Krylov basis."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, normal

import spectra
from spectra.algorithms import krylov_search
from spectra.algorithms.krylov_search import KrylovSearch, select
from spectra.backend import memory
from spectra.backend.memory import AllocationMeter


@pytest.mark.parametrize(
    ("which", "k", "wanted"),
    [
        ("LM", 3, [-9, 8, -7]),
        ("LA", 2, [8, 3]),
        ("SA", 2, [-9, -7]),
        ("BE", 3, [8, 3, -9]),  # the odd one from the top
        ("BE", 4, [8, 3, -9, -7]),
        ("BE", 9, [8, 3, 1, -7, -9]),
        ("LM", 9, [-9, 8, -7, 3, 1]),
    ],
)
def test_which_eigenvalues_are_wanted(which, k, wanted):
    values = np.array([3.0, -9.0, 1.0, 8.0, -7.0])
    assert sorted(values[select(values, k, which)]) == sorted(wanted)


@pytest.mark.parametrize(("which", "winner"), [("LM", 0), ("LA", 1), ("SA", 0)])
def test_a_margin_makes_a_value_more_extreme(which, winner):
    """-2 against 2.05: the margin outweighs a small lead in magnitude, counts upwards for LA and downwards for SA."""
    values = np.array([-2.0, 2.05])
    assert select(values, 1, which, margin=np.array([0.1, 0.0]))[0] == winner
    if which == "LM":
        assert select(values, 1, which)[0] == 1


def test_locked_vectors_are_not_found_again():
    truth = np.concatenate([np.linspace(-1, 1, 200), [5.0, 6.0, 7.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=1))
    exact = torch.linalg.eigh(op.matrix)[1].T
    search = KrylovSearch(op, 40, 1e-8, 0, max_products=1000)
    values, vectors, residuals = search.find(2, "LA", locked=exact[[-1, -3]])
    np.testing.assert_allclose(np.sort(values), [1.0, 6.0], atol=1e-9)
    assert (vectors @ exact[[-1, -3]].T).abs().max() < 1e-12
    assert (residuals <= search.tolerances(values)).all()
    assert search.products == op.products
    assert search.norm == pytest.approx(6.0)


def test_a_spectrum_within_the_bounds_ends_the_search_early():
    op = spectra.DiagonalOperator(np.random.default_rng(0).uniform(-1, 1, size=3000))
    search = KrylovSearch(op, 40, 1e-8, 0, max_products=1000)
    search.find(2, "BE", beyond=(-3.0, 3.0))
    assert search.products == 15


def test_a_ritz_value_whose_residual_reaches_beyond_keeps_the_search_going():
    op = spectra.DiagonalOperator(np.linspace(-1, 1, 3000))
    search = KrylovSearch(op, 40, 1e-8, 0, max_products=1000)
    values, _, residuals = search.find(2, "BE", beyond=(-1.001, 1.001))
    assert search.products > 15
    assert (np.abs(values) + residuals <= 1.001).all()


def test_residuals_include_what_inexact_locked_vectors_leave():
    truth = np.concatenate([np.linspace(-1, 1, 200), [5.0, 6.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=2))
    exact = torch.linalg.eigh(op.matrix)[1].T
    locked = (exact[-1] + 1e-3 * exact[-2] + 1e-3 * exact[0])[None]
    locked /= locked.norm()
    values, vectors, residuals = KrylovSearch(op, 40, 1e-10, 0, max_products=1000).find(1, "LA", locked=locked)
    true = (vectors @ op.matrix - torch.as_tensor(values)[:, None] * vectors).norm(dim=1)
    assert true[0] > 1e-4
    np.testing.assert_allclose(residuals, true, rtol=1e-6)


def test_a_copy_at_the_bound_is_not_beyond_it():
    """Bounds are moved outward by the tolerance: with one of two equal eigenvalues wanted, the other is not missed."""
    truth = np.concatenate([0.1 * np.random.default_rng(1).normal(size=300), [5.0, 5.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=3))
    search = KrylovSearch(op, 40, 1e-6, 0, max_products=1000)
    values, vectors, _ = search.find(1, "LM")
    assert values[0] == pytest.approx(5.0)
    assert search.rules_out_missed(vectors, (-5.0, 5.0))
    search.find(1, "LM")
    assert not search.rules_out_missed(vectors, (-4.9, 4.9))


def test_a_search_stops_at_its_number_of_products():
    op = spectra.DiagonalOperator(np.linspace(-1, 1, 3000))
    search = KrylovSearch(op, 20, 1e-10, 0, max_products=57)
    values, vectors, residuals = search.find(3, "LA")
    assert search.products == op.products == 57
    assert search.out_of_products
    true = (vectors * op.values - torch.as_tensor(values)[:, None] * vectors).norm(dim=1)
    np.testing.assert_allclose(residuals, true, rtol=0.01)


@pytest.mark.parametrize(("free", "low", "high"), [(1 << 40, 8_000_000, 9_000_000), (0, 0, 2 << 20)])
def test_a_basis_is_rotated_in_slices_where_memory_holds_no_second_one(monkeypatch, free, low, high):
    monkeypatch.setattr(memory, "available", lambda device: free)
    monkeypatch.setattr(krylov_search, "SLICE_BYTES", 1 << 20)
    search = KrylovSearch(spectra.DiagonalOperator(np.ones(100_000)), 20, 1e-6, 0, max_products=1)
    search._basis = normal(21, 100_000, seed=1)
    rotation = torch.linalg.qr(normal(20, 20, seed=2))[0][:, :10]
    want = rotation.T @ search._basis[:20]
    want /= want.norm(dim=1, keepdim=True)
    with AllocationMeter() as meter:
        search._rotate_in_place(rotation.numpy())
    torch.testing.assert_close(search._basis[:10], want)
    assert low <= meter.peak <= high


def test_a_product_whose_norm_overflows_ends_the_search():
    op = spectra.DiagonalOperator(np.append(np.arange(99.0), 1e200))
    with pytest.raises(spectra.NonFiniteError, match="product number 1 of the operator is not finite"):
        KrylovSearch(op, 40, 1e-6, 0, max_products=50).find(2, "LM")


def test_one_vector_more_than_the_basis_is_allocated():
    search = KrylovSearch(spectra.DiagonalOperator(np.arange(90.0)), 7, 1e-6, 0, max_products=9)
    assert search._basis.shape == (8, 90)
