"""Sums that keep their digits, probes that depend on (seed, index) alone, and orthonormal rows."""

import numpy as np
import pytest
import torch
from oracles import normal

import spectra
from spectra import vectors


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


def test_a_probe_depends_on_seed_and_index_and_on_nothing_else():
    op = spectra.DiagonalOperator(np.ones(3 * vectors.STRETCH // 2, dtype=np.float32))
    probe = vectors.probe(op, seed=3, index=1)
    torch.manual_seed(1)
    assert torch.equal(probe, vectors.probe(op, seed=3, index=1))
    assert vectors.norm(probe) == pytest.approx(1.0)
    start = vectors.probe(spectra.DiagonalOperator(np.ones(vectors.STRETCH, dtype=np.float32)), seed=3, index=1)
    first = probe[: vectors.STRETCH]
    assert torch.allclose(first / vectors.norm(first), start, atol=1e-7)  # stretches do not depend on the dimension
    for other in ({"seed": 4, "index": 1}, {"seed": 3, "index": 2}):
        assert abs(vectors.dot(probe, vectors.probe(op, **other))) < 0.01
    assert abs(vectors.dot(probe[: vectors.STRETCH // 2], probe[vectors.STRETCH :])) < 0.01


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_rows_are_made_orthonormal_and_keep_their_span(spread):
    rows = torch.linalg.qr(normal(200, 6, seed=1))[0].T + spread * normal(6, 200, seed=2)
    orthonormal = vectors.orthonormal_rows(rows)
    assert torch.allclose(orthonormal @ orthonormal.T, torch.eye(6, dtype=torch.float64), atol=1e-13)
    assert torch.allclose((rows @ orthonormal.T) @ orthonormal, rows, atol=1e-12)
