"""Operators that are known outright: dense, diagonal, and means of them."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from oracles import matrix_with_spectrum, normal

import spectra

N = 9
MATRIX = matrix_with_spectrum(np.linspace(-1, 3, N), seed=0)
DIAGONAL = normal(N, seed=1)
OTHER = matrix_with_spectrum(np.linspace(0, 1, N), seed=2)
CASES = {
    "dense": (lambda: spectra.DenseOperator(MATRIX), MATRIX),
    "diagonal": (lambda: spectra.DiagonalOperator(DIAGONAL), torch.diag(DIAGONAL)),
    "mean": (
        lambda: spectra.MeanOperator([spectra.DenseOperator(MATRIX), spectra.DenseOperator(OTHER)]),
        (MATRIX + OTHER) / 2,
    ),
    "mean of one": (lambda: spectra.MeanOperator([spectra.DenseOperator(MATRIX)]), MATRIX),
}


@pytest.fixture(params=CASES)
def case(request):
    make, matrix = CASES[request.param]
    return make(), matrix


def test_attributes(case):
    op, _ = case
    assert tuple(op.shape) == (N, N)
    assert op.dtype == torch.float64
    assert torch.device(op.device).type == "cpu"


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 4)])
def test_products(case, shape):
    op, matrix = case
    v = normal(*shape, seed=3)
    product = op @ v
    assert isinstance(product, torch.Tensor)
    assert product.shape == v.shape
    torch.testing.assert_close(product, matrix @ v, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(N,), (N, 4)])
def test_numpy_in_numpy_out(case, shape):
    op, matrix = case
    v = normal(*shape, seed=3).numpy()
    product = op @ v
    assert isinstance(product, np.ndarray)
    np.testing.assert_allclose(product, matrix.numpy() @ v, rtol=1e-13, atol=1e-13)


def test_a_product_is_not_a_view_of_its_input(case):
    op, matrix = case
    v = normal(N, seed=3)
    kept = v.clone()
    (op @ v).zero_()
    assert torch.equal(v, kept)
    torch.testing.assert_close(op @ v, matrix @ v, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(N + 1,), (N - 1, 2), ()])
def test_a_vector_of_another_size_is_refused(case, shape):
    op, _ = case
    with pytest.raises(spectra.InputError, match=str(N)):
        op @ torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["dense", "diagonal"])
def test_products_are_counted_by_column(name):
    op = CASES[name][0]()
    assert op.products == 0
    op @ normal(N, seed=3)
    op @ normal(N, 4, seed=3)
    assert op.products == 5


def test_scipy_solves_with_it(case):
    op, matrix = case
    as_scipy = op.to_scipy()
    assert isinstance(as_scipy, scipy.sparse.linalg.LinearOperator)
    assert as_scipy.shape == (N, N)
    assert as_scipy.dtype == np.float64
    np.testing.assert_allclose(as_scipy @ np.ones(N), matrix.numpy().sum(1), atol=1e-12)
    values = scipy.sparse.linalg.eigsh(as_scipy, k=2, which="LA", return_eigenvectors=False, v0=np.ones(N))
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix.numpy())[-2:], atol=1e-10)


def test_symmetry_gap(case):
    op, _ = case
    assert 0 <= op.symmetry_gap() < 1e-12


def test_float32_stays_float32():
    op = spectra.DenseOperator(MATRIX.float())
    assert op.dtype == torch.float32
    product = op @ normal(N, seed=3, dtype=torch.float32)
    assert product.dtype == torch.float32


def test_numpy_makes_an_operator_too():
    v = normal(N, seed=3)
    torch.testing.assert_close(spectra.DenseOperator(MATRIX.numpy()) @ v, MATRIX @ v)
    torch.testing.assert_close(spectra.DiagonalOperator(DIAGONAL.numpy()) @ v, DIAGONAL * v)


@pytest.mark.parametrize(
    "make",
    [
        lambda: spectra.DenseOperator(torch.zeros(2, 3)),
        lambda: spectra.DenseOperator(torch.zeros(3)),
        lambda: spectra.DiagonalOperator(torch.zeros(2, 2)),
        lambda: spectra.DenseOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        lambda: spectra.DenseOperator(torch.full((2, 2), torch.nan)),
        lambda: spectra.DiagonalOperator(torch.tensor([1.0, torch.inf])),
        lambda: spectra.MeanOperator([]),
        lambda: spectra.MeanOperator([spectra.DenseOperator(MATRIX), spectra.DiagonalOperator(torch.ones(N + 1))]),
    ],
    ids=["not square", "not a matrix", "not a vector", "not symmetric", "nan", "infinite", "mean of none", "two sizes"],
)
def test_what_makes_no_operator_is_refused(make):
    with pytest.raises(spectra.InputError) as caught:
        make()
    assert "\n" not in str(caught.value)


class Rounded(spectra.DiagonalOperator):
    """Products rounded to three digits, and a measured rounding, as an operator of unknown arithmetic has."""

    rounding = spectra.LinearOperator.rounding

    def _multiply_rows(self, vectors):
        images = self.values * vectors
        scale = 1e-3 * images.abs().max()
        return (images / scale).round() * scale


def test_what_the_arithmetic_loses_is_measured():
    values = normal(400, seed=3)
    exact, rounded = spectra.DiagonalOperator(values), Rounded(values)
    assert exact.linearity_gap() < 1e-15
    assert 1e-4 < rounded.linearity_gap() < 1e-2
    assert rounded.rounding() == 2 * rounded.linearity_gap()
    assert (
        spectra.slq(rounded, probes=1, steps=5).rounding_error
        > 1e6 * spectra.slq(exact, probes=1, steps=5).rounding_error
    )
    mean = spectra.MeanOperator([exact, rounded])
    assert mean.rounding() == rounded.rounding()


def test_a_product_that_is_not_finite_is_blamed_on_the_vector_or_the_operator():
    op = spectra.DiagonalOperator(torch.full((4,), 1e200, dtype=torch.float64))
    with pytest.raises(spectra.NonFiniteError, match="the vector is not finite itself"):
        op @ torch.tensor([1.0, float("nan"), 0.0, 0.0])
    with pytest.raises(spectra.NonFiniteError, match="the vector is finite"):
        op @ torch.full((4,), 1e200, dtype=torch.float64)
    for wrapped in (spectra.MeanOperator([op, op]), spectra.DeflatedOperator(op, torch.eye(4, 1, dtype=torch.float64))):
        with pytest.raises(spectra.NonFiniteError, match="the vector is finite"):
            wrapped @ torch.full((4,), 1e200, dtype=torch.float64)


def test_rows_are_columns_of_a_product():
    op = spectra.DenseOperator(MATRIX)
    vectors = normal(3, N, seed=5)
    assert torch.allclose(op.multiply_rows(vectors), (op @ vectors.T).T)
    assert op.products == 6


def test_the_diagonal_is_exact_from_as_many_products_as_rows(case):
    op, matrix = case
    for products in (None, N, N + 5):
        found = op.diagonal(products=products)
        np.testing.assert_allclose(found.value, matrix.diagonal(), atol=1e-13)
        assert np.array_equal(found.low, found.high)
    with pytest.raises(spectra.InputError, match=r"two products or more.*products=1"):
        op.diagonal(products=1)


def test_the_diagonal_from_few_products_lies_in_its_intervals():
    """Of 4,000 entries 95 %; their standard error is that of sum_{j != i} A_ij^2 over k."""
    n, k = 400, 6
    matrix = matrix_with_spectrum(np.random.default_rng(0).normal(size=n), seed=5)
    op, held = spectra.DenseOperator(matrix), []
    for seed in range(10):
        found = op.diagonal(products=k, seed=seed)
        held.append((found.low <= matrix.diagonal().numpy()) & (matrix.diagonal().numpy() <= found.high))
    print(f"coverage {np.mean(held):.3f}")
    assert 0.93 < np.mean(held) < 0.97
    assert op.products == 10 * k
    errors = (matrix.square().sum(0) - matrix.diagonal().square()).sqrt().numpy() / np.sqrt(k)
    assert np.mean(((found.value - matrix.diagonal().numpy()) / errors) ** 2) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("run", [spectra.slq, lambda op: spectra.topk(op, 1), spectra.trace, spectra.resolve])
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (torch.nn.Linear(2, 2), r"got a Linear: .* HessianOperator\(model, batches\)"),
        (torch.eye(3), r"got a Tensor: .* DenseOperator\(matrix\)"),
        (np.eye(3), r"got a ndarray: .* DenseOperator\(matrix\)"),
        (None, "got a NoneType: such as"),
    ],
)
def test_what_is_no_operator_is_refused_with_how_to_make_one(run, given, advice):
    with pytest.raises(spectra.InputError, match=advice):
        run(given)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda op: spectra.slq(op, probes=2.5), "probes"),
        (lambda op: spectra.slq(op, steps=None), "steps"),
        (lambda op: spectra.slq(op, seed="a"), "seed"),
        (lambda op: spectra.topk(op, 1.5), "k"),
        (lambda op: spectra.trace(op, probes="10"), "probes"),
        (lambda op: spectra.resolve(op, budget=1e3), "budget"),
        (lambda op: spectra.lanczos(op, torch.ones(3, dtype=op.dtype), 2.0), "steps"),
    ],
)
def test_numbers_that_are_not_whole_are_refused_by_name(run, name):
    op = spectra.DiagonalOperator(np.array([1.0, 2.0, 4.0]))
    with pytest.raises(spectra.InputError, match=f"^{name} must be a whole number, got "):
        run(op)
