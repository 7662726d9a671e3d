"""Outliers and known zeros taken out of the recurrence, and put back with their exact weights."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum

import spectra
from spectra.algorithms.resolve import find_outliers
from spectra.operators.derived import CongruentOperator


def spectrum_with_outliers(n=3000, zeros=0, seed=0):
    rng = np.random.default_rng(seed)
    values = 0.005 * (rng.normal(size=n) + 0.2)
    values[:10] = np.geomspace(0.5, 27, 10) * np.where(np.arange(10) == 3, -1, 1)
    values[10 : 10 + zeros] = 0.0
    return values


def test_the_deflated_operator_is_p_a_p():
    rng = np.random.default_rng(0)
    matrix = matrix_with_spectrum(rng.normal(size=30), 0)
    vectors = torch.tensor(rng.normal(size=(30, 4)))
    op = spectra.DeflatedOperator(spectra.DenseOperator(matrix), vectors)
    basis = torch.linalg.qr(vectors)[0]
    projector = torch.eye(30, dtype=torch.float64) - basis @ basis.T
    want = projector @ torch.as_tensor(matrix) @ projector
    v = torch.tensor(rng.normal(size=(30, 3)))
    assert torch.allclose(op @ v, want @ v, atol=1e-12)
    assert torch.allclose(op @ v[:, 0], want @ v[:, 0], atol=1e-12)
    with pytest.raises(spectra.InputError, match="30"):
        spectra.DeflatedOperator(spectra.DenseOperator(matrix), torch.zeros(7, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deflation_narrows_the_negative_share_and_keeps_the_outliers(dtype):
    values = spectrum_with_outliers()
    op = spectra.DiagonalOperator(torch.as_tensor(values).to(dtype))
    plain = spectra.slq(op, probes=4, steps=25, seed=0)
    deflated = spectra.slq(op, probes=4, steps=25, seed=0, deflate=10)
    truth = (values < 0).mean()
    for density in (plain, deflated):
        share = density.negative_share()
        assert share.low <= truth <= share.high
    assert deflated.negative_share().half_width < 0.75 * plain.negative_share().half_width
    np.testing.assert_allclose(np.sort(deflated.atoms), np.sort(values[:10]), rtol=1e-4)
    np.testing.assert_allclose(deflated.weights.sum(1), 1, atol=1e-12)
    assert deflated.trace().half_width < plain.trace().half_width / 20
    assert deflated.trace().low <= values.sum() <= deflated.trace().high
    assert deflated.lambda_max().value == pytest.approx(27, rel=1e-5)
    assert deflated.lambda_min().value == pytest.approx(values.min(), rel=1e-4)


def test_coordinates_that_map_to_zero_are_counted_exactly():
    values = spectrum_with_outliers(zeros=1290)
    op = spectra.DiagonalOperator(values)
    density = spectra.slq(op, probes=3, steps=80, seed=1, deflate=10)
    assert density.zero_share() == pytest.approx(1290 / 3000)
    assert op.products <= 3 * 80 + 200
    share, near = density.negative_share(), density.near_zero_share(1e-3)
    assert share.low <= (values < 0).mean() <= share.high
    assert near.low <= (np.abs(values) < 1e-3).mean() <= near.high
    assert share.half_width < 0.05
    assert share.half_width > 0


def test_zeros_in_a_rotated_basis_are_not_claimed():
    """Without the coordinates to see them by, a large atom at the threshold has to leave the share unresolved."""
    values = np.concatenate([np.random.default_rng(0).normal(size=350) * 0.01, np.zeros(250), [3.0, 5.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(values, 3))
    share = spectra.slq(op, probes=4, steps=60, seed=0, deflate=2).negative_share()
    assert share.low <= (values < 0).mean() <= share.high
    assert not share.resolved


def test_storage_keeps_atoms():
    density = spectra.slq(spectra.DiagonalOperator(spectrum_with_outliers(zeros=90)), probes=2, steps=30, deflate=5)
    again = spectra.SpectralDensity.from_arrays(density.to_arrays())
    assert again.negative_share() == density.negative_share()
    assert again.trace() == density.trace()
    assert again.zero_share() == density.zero_share() > 0
    np.testing.assert_array_equal(again.nodes, density.nodes)


def test_outliers_are_found_and_given_to_slq():
    values = spectrum_with_outliers()
    op = spectra.DiagonalOperator(values)
    pairs = find_outliers(op, products=40, seed=0)
    assert set(np.round(pairs.values, 6)) <= set(np.round(values, 6))
    assert pairs.values.max() == pytest.approx(27)
    assert len(pairs.values) >= 8
    density = spectra.slq(op, probes=2, steps=40, deflate=pairs)
    assert len(density.atoms) == len(pairs.values)
    assert op.products == 40 + 80


def test_bad_deflation_is_refused():
    with pytest.raises(spectra.InputError, match="-1"):
        spectra.slq(spectra.DiagonalOperator(np.arange(50.0)), steps=5, deflate=-1)


def test_inputs_that_are_orthogonal_already_are_projected_once():
    rng = np.random.default_rng(1)
    inner = spectra.DenseOperator(matrix_with_spectrum(rng.normal(size=40), 2))
    vectors = torch.tensor(rng.normal(size=(40, 5)))
    both, images = (spectra.DeflatedOperator(inner, vectors, inputs=kind) for kind in ("any", "orthogonal"))
    start = both.project(torch.tensor(rng.normal(size=(3, 40))))
    assert torch.allclose(both.multiply_rows(start), images.multiply_rows(start), atol=1e-12)
    with pytest.raises(spectra.InputError, match="inputs must be"):
        spectra.DeflatedOperator(inner, vectors, inputs="some")


@pytest.mark.parametrize("seed", range(8))
def test_the_end_is_covered_after_deflation_with_inexact_vectors(seed):
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    values = 0.005 * rng.normal(size=3000) + 0.001
    values[:40] = np.geomspace(0.3, 27, 40)
    density = spectra.slq(spectra.DiagonalOperator(values), probes=2, steps=60, deflate=10, seed=seed)
    end = density.lambda_min()
    assert end.low <= values.min() <= end.high
    assert end.half_width < 0.02 * abs(values.min())


def test_the_density_without_the_known_zeros():
    values = spectrum_with_outliers(zeros=900)
    density = spectra.slq(spectra.DiagonalOperator(values), probes=3, steps=80, deflate=10, seed=1)
    rest = density.without_known_zeros()
    others = values[values != 0]
    assert rest.dimension == len(others)
    assert rest.zero_share() == 0.0
    share = rest.negative_share()
    assert share.low <= (others < 0).mean() <= share.high
    assert rest.negative_share().value == pytest.approx(density.negative_share().value / (1 - density.zero_share()))
    assert rest.trace().value == pytest.approx(density.trace().value)
    nothing = spectra.slq(spectra.DiagonalOperator(np.zeros(50)), probes=1, steps=5)
    with pytest.raises(spectra.InputError, match="known to be zero"):
        nothing.without_known_zeros()


class DenseTransform:
    """P held in memory."""

    def __init__(self, matrix):
        self.matrix = matrix

    def apply(self, vectors):
        return vectors @ self.matrix.T.to(vectors.dtype)

    def apply_transposed(self, vectors):
        return vectors @ self.matrix.to(vectors.dtype)


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_congruent_operator_is_pt_a_minus_t_p_and_keeps_the_inertia(shift, masked):
    rng = np.random.default_rng(5)
    matrix = torch.as_tensor(matrix_with_spectrum(rng.normal(size=40), 6))
    factor = torch.tensor(rng.normal(size=(40, 40)))
    p = factor @ factor.T + 0.1 * torch.eye(40) if masked else factor
    mask = torch.tensor(rng.random(40) < 0.7) if masked else None
    kept = torch.ones(40, dtype=torch.bool) if mask is None else mask
    matrix = matrix * kept * kept[:, None]
    op = CongruentOperator(spectra.DenseOperator(matrix), DenseTransform(p), shift=shift, mask=mask)
    want = torch.zeros(40, 40, dtype=torch.float64)
    inner, block = (m[kept][:, kept] for m in (matrix - shift * torch.eye(40), p))
    want[torch.outer(kept, kept)] = (block.T @ inner @ block).flatten()
    v = torch.tensor(rng.normal(size=(40, 3)))
    assert torch.allclose(op @ v, want @ v, atol=1e-9)
    assert torch.allclose(op @ v[:, 0], want @ v[:, 0], atol=1e-9)
    found, values = torch.linalg.eigvalsh(want[kept][:, kept]), torch.linalg.eigvalsh(inner)
    assert int((found < 0).sum()) == int((values < 0).sum())


def test_rounding_is_that_of_the_congruent_products():
    """P enlarges a small block of the matrix that is lost in rounding error; the rounding error of T shows it."""
    rng = np.random.default_rng(7)
    values = np.concatenate([rng.normal(size=20), 1e-6 * rng.normal(size=20)])
    matrix = torch.as_tensor(matrix_with_spectrum(values, 8))
    _, vectors = torch.linalg.eigh(matrix)
    p = vectors * torch.linalg.eigvalsh(matrix).abs().rsqrt()
    inner = spectra.DenseOperator(matrix.float())
    op = CongruentOperator(inner, DenseTransform(p))
    assert op.rounding() > 1e3 * inner.rounding()
    before = op.products
    op.rounding()
    assert op.products == before  # measured once
    with pytest.raises(spectra.InputError, match="40"):
        CongruentOperator(inner, DenseTransform(p), mask=torch.ones(7, dtype=torch.bool))
