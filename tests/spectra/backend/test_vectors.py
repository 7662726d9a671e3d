"""Dot products that keep their digits, and orthonormal rows."""

import numpy as np
import pytest
import torch
from oracles import normal

from spectra.backend import vectors


@pytest.mark.parametrize("n", [1, 1000, 1024, 5_000_000])
def test_dots_and_norms_of_float32_vectors_keep_their_digits(n):
    u, v = normal(2, n, seed=0, dtype=torch.float32)
    scale = float(u.double().norm() * v.double().norm())
    assert vectors.dot(u, v) == pytest.approx(float(u.double() @ v.double()), abs=1e-7 * scale)
    assert vectors.norm(u) == pytest.approx(float(u.double().norm()), rel=1e-6)
    assert vectors.row_dots(torch.stack([u, v]), torch.stack([v, v])).tolist() == [
        vectors.dot(u, v),
        vectors.dot(v, v),
    ]


@pytest.mark.parametrize("n", [1, 1000, 70_000, 600_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_subtracted_and_their_dots_are_those_of_what_results(n, dtype):
    rows, others, against = normal(3, 3, n, seed=n, dtype=dtype)
    factors = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    exact = rows.double() - factors[:, None] * others.double()
    eps = torch.finfo(dtype).eps
    for partner in (against, rows):  # of `rows` itself it is what they have become
        result = rows.clone()
        along = result if partner is rows else partner
        dots = vectors.subtract_and_dot_(result, others, factors, against=along)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=16 * eps)
        partners = exact if partner is rows else partner.double()
        scale = (exact.norm(dim=1) * partners.norm(dim=1)).max().item()
        torch.testing.assert_close(dots, (exact * partners).sum(dim=1), rtol=0, atol=8 * eps * scale)
        assert dots.dtype == torch.float64


@pytest.mark.parametrize(
    ("perturbation", "dtype"),
    [(0.0, torch.float64), (1e-3, torch.float64), (1.0, torch.float64), (0.3, torch.float32), (1e-9, torch.float32)],
)
def test_rows_are_made_orthonormal_and_their_factor_kept(perturbation, dtype):
    """Sizes that fall by four decades, in columns enough for several blocks."""
    mixed = torch.linalg.qr(normal(200_000, 6, seed=1))[0].T + perturbation * normal(6, 200_000, seed=2) / 450
    rows = (torch.logspace(0, -4, 6, dtype=torch.float64)[:, None] * mixed).to(dtype)
    lower, orthonormal = vectors.orthonormal_rows(rows)
    digits = 10 * torch.finfo(dtype).eps
    gram = orthonormal.double() @ orthonormal.double().T
    assert torch.allclose(gram, torch.eye(6, dtype=torch.float64), atol=10 * digits)
    assert torch.allclose(lower, lower.tril())
    error = torch.linalg.vector_norm(lower @ orthonormal.double() - rows.double(), dim=1)
    assert (error <= 10 * digits * torch.linalg.vector_norm(rows.double(), dim=1)).all()


def test_dependent_rows_still_get_an_orthonormal_basis():
    rows = normal(3, 50, seed=3)
    lower, orthonormal = vectors.orthonormal_rows(torch.cat([rows, rows[:1]]))
    assert torch.allclose(orthonormal @ orthonormal.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(lower @ orthonormal, torch.cat([rows, rows[:1]]), atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(1, 5), (3, 65_535), (4, 3_000_001)])
def test_products_with_rows_keep_their_digits(m, n):
    """All entries positive, so that a naive float32 sum would drift."""
    rows, vector = normal(m, n, seed=6, dtype=torch.float32).abs(), normal(n, seed=7, dtype=torch.float32).abs()
    exact = rows.double() @ vector.double()
    assert torch.allclose(vectors.basis_coefficients(rows, vector), exact, rtol=2e-6)
    assert torch.allclose(vectors.inner_products(rows, vector[None])[:, 0], exact, rtol=1e-12)
    assert torch.allclose(vectors.inner_products(rows, rows), rows.double() @ rows.double().T, rtol=1e-12)


@pytest.mark.parametrize("left", [1.0, 1e-3, 1e-6])
def test_what_is_left_is_orthogonal_to_every_basis(left):
    """Also where almost all of the vector lies in the bases, which one pass does not survive."""
    first, second = torch.linalg.qr(normal(100_000, 7, seed=8))[0].T.float().split([3, 4])
    inside = 3 * first[0] - 2 * second[3]
    vector = inside + left * normal(100_000, seed=9, dtype=torch.float32) / 100_000**0.5
    exact = vector.double()
    (one, other), size = vectors.orthogonalize_(vector, first, second)
    assert np.allclose(one, (first.double() @ exact).numpy(), atol=1e-6)
    assert np.allclose(other, (second.double() @ exact).numpy(), atol=1e-6)
    assert size == pytest.approx(float(vector.double().norm()), rel=1e-6)
    assert size == pytest.approx(left, rel=0.1)
    for basis in (first, second):
        assert float((basis.double() @ vector.double()).abs().max()) < 1e-5 * size


@pytest.mark.parametrize("n", [1000, 600_001])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
def test_squares_beyond_the_range_of_float32(n, size):
    """1e-30 squared is 1e-60, which float32 does not hold."""
    rows = (size * normal(2, n, seed=5)).to(torch.float32)
    exact = rows.double().square().sum(dim=1)
    assert vectors.row_dots(rows, rows).tolist() == pytest.approx(exact.tolist(), rel=1e-6)
    assert vectors.norm(rows[0]) == pytest.approx(float(exact[0].sqrt()), rel=1e-6)
    none = torch.zeros(2, dtype=torch.float64)
    found = vectors.subtract_and_dot_(rows, torch.zeros_like(rows), none, against=rows)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-6)
