"""The Lanczos recurrence on matrices whose spectrum is prescribed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, normal

import spectra
from spectra.algorithms import lanczos as lanczos_module
from spectra.algorithms.lanczos import SMALL_BASIS_BYTES, LanczosRecurrence, choose_reorthogonalization
from spectra.algorithms.probe_space import ProbeSpace
from spectra.backend import memory
from spectra.estimates.brackets import bracket
from spectra.estimates.quadrature import gauss_rule


def test_the_basis_and_the_jacobi_matrix_satisfy_the_recurrence():
    """A Q^T = Q^T T + beta_m q_{m+1} e_m^T, with orthonormal q."""
    values = np.concatenate([np.random.default_rng(0).normal(size=80), [30.0, -20.0]])
    matrix = matrix_with_spectrum(values, seed=3)
    found = spectra.lanczos(spectra.DenseOperator(matrix), normal(82, seed=4), 40)
    basis = found.basis
    assert (found.steps, tuple(basis.shape)) == (40, (40, 82))
    torch.testing.assert_close(basis @ basis.T, torch.eye(40, dtype=torch.float64), atol=1e-12, rtol=0)
    off_diagonal = np.diag(found.betas[:-1], 1)
    jacobi = torch.as_tensor(np.diag(found.alphas) + off_diagonal + off_diagonal.T)
    residual = basis @ matrix - jacobi @ basis
    assert residual[:-1].abs().max() < 1e-12
    assert float(residual[-1].norm()) == pytest.approx(found.betas[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_stays_orthogonal_where_residuals_become_small(dtype):
    """T needs semi-orthogonality: inner products below the square root of the rounding unit."""
    eps = torch.finfo(dtype).eps
    values = torch.logspace(0, np.log10(100 * eps), 60, dtype=torch.float64)
    op = spectra.DenseOperator(matrix_with_spectrum(values.numpy(), seed=8).to(dtype))
    basis = spectra.lanczos(op, normal(60, seed=9, dtype=dtype), 50).basis.double()
    gram = basis @ basis.T
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < eps**0.5


def test_a_start_vector_of_any_length_gives_the_same_matrix():
    op, start = spectra.DiagonalOperator(np.linspace(-1, 2, 50)), normal(50, seed=5)
    one, other = (spectra.lanczos(op, scale * start, 10) for scale in (1.0, 1e5))
    np.testing.assert_allclose(one.alphas, other.alphas, atol=1e-12)
    np.testing.assert_allclose(one.betas, other.betas, atol=1e-12)


@pytest.mark.parametrize("basis_size", [0, 12])
def test_start_vectors_advanced_together_give_what_each_gives_alone(basis_size):
    values = np.random.default_rng(4).normal(size=60)
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=1))
    starts = normal(3, 60, seed=2)
    together = LanczosRecurrence(op, starts, basis_size=basis_size)
    together.advance(5)
    together.advance(7)
    assert op.products == 36
    for start, found in zip(starts, together.tridiagonals(), strict=True):
        alone = spectra.lanczos(op, start, 12, reorthogonalize="full" if basis_size else "none")
        np.testing.assert_allclose(found.alphas, alone.alphas, atol=1e-10)
        np.testing.assert_allclose(found.betas, alone.betas, atol=1e-10)


def test_one_recurrence_breaks_down_while_the_others_go_on():
    op = spectra.DiagonalOperator(np.arange(1.0, 21.0))
    starts = torch.zeros(2, 20, dtype=torch.float64)
    starts[0, :3] = 1  # three eigenvectors span its Krylov space
    starts[1] = 1
    recurrence = LanczosRecurrence(op, starts)
    recurrence.advance(10)
    short, long = recurrence.tridiagonals()
    assert (short.steps, long.steps) == (3, 10)
    assert short.betas[-1] == 0.0
    assert not recurrence.broken_down
    np.testing.assert_allclose(
        np.linalg.eigvalsh(np.diag(short.alphas) + np.diag(short.betas[:2], 1) * 1.0, UPLO="U"), [1, 2, 3]
    )
    assert LanczosRecurrence(op, starts[:1]).tridiagonals()[0].steps == 0


def test_given_first_products_save_a_product():
    op = spectra.DiagonalOperator(np.arange(1.0, 21.0))
    start = normal(1, 20, seed=3)
    products = op.multiply_rows(start)
    before = op.products
    recurrence = LanczosRecurrence(op, start, first_products=products)
    recurrence.advance(4)
    assert op.products - before == 3
    np.testing.assert_allclose(recurrence.tridiagonals()[0].alphas, spectra.lanczos(op, start[0], 4).alphas)


def test_no_more_steps_than_the_basis_has_room_for():
    recurrence = LanczosRecurrence(spectra.DiagonalOperator(np.arange(20.0)), normal(1, 20, seed=6), basis_size=3)
    recurrence.advance(3)
    with pytest.raises(spectra.InputError, match="room for 3 Lanczos steps"):
        recurrence.advance(1)


@pytest.mark.parametrize(
    ("start", "steps", "options"),
    [
        (torch.zeros(5), 3, {}),
        (torch.full((5,), float("nan")), 3, {}),
        (torch.ones(5), 0, {}),
        (torch.ones(5), 3, {"reorthogonalize": "auto"}),
    ],
)
def test_bad_arguments_are_refused_in_one_line(start, steps, options):
    with pytest.raises(spectra.InputError) as caught:
        spectra.lanczos(spectra.DiagonalOperator(np.arange(5.0)), start.double(), steps, **options)
    assert "\n" not in str(caught.value)


def test_auto_stores_a_basis_where_it_is_small(monkeypatch):
    op = spectra.DiagonalOperator(np.ones(1000))
    most = SMALL_BASIS_BYTES // op.vector_bytes
    assert choose_reorthogonalization(op, most, "auto") == "full"
    assert choose_reorthogonalization(op, most + 1, "auto") == "none"
    assert choose_reorthogonalization(op, most + 1, "full") == "full"
    monkeypatch.setattr(memory, "available", lambda device: 4 * 10 * op.vector_bytes)
    assert choose_reorthogonalization(op, 10, "auto") == "full"
    assert choose_reorthogonalization(op, 11, "auto") == "none"
    assert choose_reorthogonalization(op, 1, "none") == "none"


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_no_more_steps_than_dimensions(reorthogonalize):
    """Outliers cost orthogonality, so that without a basis the last residual is far from zero."""
    values = np.concatenate([np.linspace(-1, 1, 57), [100.0, 300.0, -200.0]])
    op = spectra.DiagonalOperator(values)
    found = spectra.lanczos(op, normal(60, seed=10), 80, reorthogonalize=reorthogonalize)
    assert found.steps == op.products == 60
    if reorthogonalize == "none":
        assert found.betas[-1] > 0.01


def test_a_breakdown_is_relative_to_the_largest_row_sum_of_the_jacobi_matrix():
    recurrence = LanczosRecurrence(spectra.DiagonalOperator(np.linspace(-1, 2, 90)), normal(2, 90, seed=11))
    for _ in range(6):
        recurrence.advance(1)
        for row, found in enumerate(recurrence.tridiagonals()):
            sums = np.abs(found.alphas) + found.betas + np.append(0, found.betas[:-1])
            assert recurrence._norms[row] == pytest.approx(sums.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seldom_reorthogonalisation_keeps_the_basis_orthogonal_and_the_bracket(dtype):
    """With fewer Gram-Schmidt passes; without any, the outliers appear as copies."""
    values = np.concatenate([np.linspace(-1, 1, 1000), [8.0, 12.0, -9.0]])
    op, start = spectra.DiagonalOperator(torch.as_tensor(values, dtype=dtype)), normal(1003, seed=11, dtype=dtype)
    seldom, never = (LanczosRecurrence(op, start, basis_size=size, seldom=True) for size in (60, 0))
    for recurrence in (seldom, never):
        recurrence.advance(60)
    found, copies = (recurrence.tridiagonals()[0] for recurrence in (seldom, never))
    whole = spectra.lanczos(op, start, 60)
    gram = found.basis @ found.basis.T - torch.eye(60, dtype=dtype)
    assert gram.abs().max() < torch.finfo(dtype).eps ** 0.5
    assert found.lost == 0.0
    got, want = (bracket(t.alphas, t.betas, 0.0) for t in (found, whole))
    assert (got.below, got.at) == pytest.approx((want.below, want.at), abs=1e-4)
    beyond = [int((np.abs(gauss_rule(t.alphas, t.betas).nodes) > 7).sum()) for t in (found, copies)]
    assert beyond[0] == 3 < beyond[1]


def test_orthogonality_that_was_lost_is_reported(monkeypatch):
    """Where outliers came back before a pass, T has an error, which widens its brackets."""
    values = np.concatenate([np.linspace(-1, 1, 1000), [1e3, 1.5e3, -2e3]])
    op, start = spectra.DiagonalOperator(torch.as_tensor(values, dtype=torch.float32)), normal(1003, seed=12).float()
    lost = []
    for early in (lanczos_module.EARLY, 1e30):
        monkeypatch.setattr(lanczos_module, "EARLY", early)
        recurrence = LanczosRecurrence(op, start, basis_size=60, seldom=True)
        recurrence.advance(60)
        lost.append(recurrence.tridiagonals()[0].lost)
    assert lost[0] < 1e-3 < 0.1 < lost[1] <= 1.001
    space, found = ProbeSpace(op, None, seed=0), recurrence.tridiagonals()[0]
    exact, bad = (space.density([replace(found, lost=x)], probes=1, steps=60).measure for x in (0.0, lost[1]))
    assert bad.rounding_error > 100 * exact.rounding_error
