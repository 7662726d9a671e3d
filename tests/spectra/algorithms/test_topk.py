"""Extreme eigenpairs against numpy.linalg.eigvalsh."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, random_state, same_random_state

import spectra
from spectra.algorithms import topk as topk_module

RNG = np.random.default_rng(0)
SPECTRA = {
    "normal": RNG.normal(size=120),
    "clusters": np.concatenate([RNG.normal(size=100) * 0.01, 3 + 1e-5 * np.arange(6), -2 - 1e-7 * np.arange(5), [9.0]]),
    "double": np.concatenate([np.repeat(np.linspace(-3, 3, 12), 2), RNG.uniform(-1, 1, size=80)]),
    "triple": np.concatenate([np.repeat([-4.0, 5.0, 8.0], 3), RNG.normal(size=90) * 0.1]),
    "seven of each": np.repeat([-1.0, 0.5, 2.0], 40),
    "identity": np.ones(100),
    "zero": np.zeros(90),
    "low rank": np.concatenate([np.zeros(120), [5.0, 5.0, -3.0, 1.0]]),
    "rank one": np.concatenate([np.zeros(99), [2.0]]),
    "both signs alike": np.concatenate([np.linspace(1, 3, 50), -np.linspace(1, 3, 50)]),
    "decades": np.logspace(-6, 1, 100) * np.where(np.arange(100) % 2, 1, -1),
    "small dimension": np.array([3.0, 3.0, -1.0, 0.0, 2.0]),
    "units of a billionth": 1e-9 * RNG.normal(size=100),
}


def wanted(values, k, which):
    values = np.sort(values)
    match which:
        case "LA":
            return values[-k:]
        case "SA":
            return values[:k]
        case "BE":  # the odd one from the top
            return np.concatenate([values[: k // 2], values[len(values) - (k - k // 2) :]])
        case "LM":
            return np.sort(values[np.argsort(np.abs(values), kind="stable")[-k:]])


def check(op, truth, k, which, *, tolerance=1e-6, orthonormality=1e-8, **options):
    pairs = spectra.topk(op, k, which=which, **options)
    values, vectors = np.asarray(pairs.values, dtype=float), torch.as_tensor(pairs.vectors)
    scale = np.abs(truth).max() or 1.0
    assert values.shape == (k,)
    assert tuple(vectors.shape) == (len(truth), k)
    assert np.asarray(pairs.residuals).shape == (k,)
    assert np.asarray(pairs.converged).dtype == bool
    assert np.asarray(pairs.converged).all()
    assert (np.diff(values) >= 0).all()
    want = wanted(truth, k, which)
    if which == "LM":  # of two with the same magnitude either will do
        np.testing.assert_allclose(np.sort(np.abs(values)), np.sort(np.abs(want)), atol=tolerance * scale)
        distance = np.abs(values[:, None] - truth[None, :]).min(1)
        assert distance.max() < tolerance * scale
    else:
        np.testing.assert_allclose(values, want, atol=tolerance * scale)
    for value in np.unique(np.round(values / scale, 4)):  # no ghosts: no more copies than there are eigenvalues
        near = np.sum(np.abs(truth / scale - value) < 2e-4)
        assert np.sum(np.abs(values / scale - value) < 1e-4) <= near
    gram = vectors.double().T @ vectors.double()
    torch.testing.assert_close(gram, torch.eye(k, dtype=gram.dtype), atol=orthonormality, rtol=0)
    return pairs, values, vectors


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
def test_against_the_prescribed_spectrum(name, which):
    truth = SPECTRA[name]
    matrix = matrix_with_spectrum(truth, seed=1)
    exact = np.linalg.eigvalsh(matrix.numpy())
    for k in (1, 4, 7):
        if k <= len(truth):
            check(spectra.DenseOperator(matrix), exact, k, which)


@pytest.mark.parametrize("seed", range(4))
def test_repeats_at_the_ends_of_a_larger_matrix(seed):
    """A single Krylov space holds one copy of a repeated eigenvalue: all copies are wanted, and no more."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.normal(size=400) * 0.3, np.repeat([4.0, -5.0], 2), np.repeat(6.0, 3)])
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=seed))
    check(op, truth, 3, "LA", seed=seed)
    check(op, truth, 5, "LA", seed=seed)
    check(op, truth, 5, "BE", seed=seed)
    check(op, truth, 7, "LM", seed=seed)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_all_eigenpairs_of_a_small_matrix(n):
    truth = np.random.default_rng(n).normal(size=n)
    for which in ("LM", "LA", "SA", "BE"):
        _, values, _ = check(spectra.DenseOperator(matrix_with_spectrum(truth, seed=2)), truth, n, which)
        np.testing.assert_allclose(values, np.sort(truth), atol=1e-9)


def test_vectors_and_residuals_are_true():
    matrix = matrix_with_spectrum(SPECTRA["triple"], seed=3)
    for tol in (1e-3, 1e-10):
        pairs, values, vectors = check(
            spectra.DenseOperator(matrix), SPECTRA["triple"], 6, "BE", tol=tol, tolerance=max(tol, 1e-9)
        )
        true = torch.linalg.norm(matrix @ vectors - vectors * torch.as_tensor(values), dim=0).numpy()
        np.testing.assert_allclose(pairs.residuals, true, rtol=0.01, atol=1e-12)
        assert (true <= 2 * tol * np.abs(values)).all()


def test_residuals_of_a_run_that_was_cut_short_are_true_too():
    truth = np.concatenate([np.linspace(0.9, 1, 5000), [1.0005]])
    op = spectra.DiagonalOperator(torch.as_tensor(truth))
    pairs = spectra.topk(op, 5, which="LA", tol=1e-12, max_products=60)
    converged, residuals = np.asarray(pairs.converged), np.asarray(pairs.residuals)
    assert not converged.all()
    vectors, values = torch.as_tensor(pairs.vectors), torch.as_tensor(np.asarray(pairs.values, dtype=float))
    true = torch.linalg.norm(torch.as_tensor(truth)[:, None] * vectors - vectors * values, dim=0).numpy()
    np.testing.assert_allclose(residuals, true, rtol=0.01, atol=1e-12)
    assert (residuals[~converged] > 1e-12).all()


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("name", ["normal", "triple", "low rank", "identity"])
def test_float32(name, which):
    truth = SPECTRA[name]
    op = spectra.DenseOperator(matrix_with_spectrum(truth, seed=4).float())
    check(op, truth, 4, which, tol=1e-4, tolerance=1e-4, orthonormality=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outliers_of_a_large_diagonal(dtype):
    rng = np.random.default_rng(5)
    truth = 0.001 * rng.standard_t(3, size=20_000)
    truth[:6] = [10.0, 10.0, 7.0, -4.0, 3.0, -2.5]
    truth = torch.as_tensor(truth).to(dtype).double().numpy()
    op = spectra.DiagonalOperator(torch.as_tensor(truth).to(dtype))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    for which, k in (("LM", 5), ("LA", 3), ("SA", 2), ("BE", 4)):
        check(op, truth, k, which, tolerance=tolerance, orthonormality=5e-5)
    assert op.products < 4000


def test_products_are_counted():
    op = spectra.DenseOperator(matrix_with_spectrum(np.random.default_rng(6).normal(size=200), seed=6))
    pairs = spectra.topk(op, 2, which="LA")
    assert pairs.products == op.products > 2


def test_the_seed_decides_and_nothing_global_moves():
    op = spectra.DenseOperator(matrix_with_spectrum(np.random.default_rng(7).normal(size=200), seed=7))
    before = random_state()
    one, again = (spectra.topk(op, 3, seed=1) for _ in range(2))
    assert same_random_state(before, random_state())
    assert np.array_equal(one.values, again.values)
    assert np.array_equal(one.vectors, again.vectors)


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (81, {}),
        (0, {"which": "LA"}),
        (-1, {"which": "SA"}),
        (2, {"which": "XX"}),
        (2, {"tol": 0.0}),
        (2, {"tol": float("nan")}),
        (2, {"basis": 3}),
    ],
)
def test_bad_requests_are_refused_in_one_line(k, options):
    op = spectra.DiagonalOperator(np.arange(80.0))
    assert spectra.topk(op, 2, basis=4).converged.all()
    with pytest.raises(spectra.InputError) as caught:
        spectra.topk(op, k, **options)
    assert "\n" not in str(caught.value)


def test_guesses_of_eigenvectors_save_most_of_the_products():
    """The sum of the three wanted eigenvectors, with 1 % of a random vector, beside a random vector alone."""
    truth = np.concatenate([np.random.default_rng(0).uniform(-1, 1, size=2997), [1.1, 1.2, 1.3]])
    op = spectra.DiagonalOperator(truth)
    guesses = torch.eye(3000, dtype=torch.float64)[:, -3:]
    cold, warm = (spectra.topk(op, 3, which="LA", tol=1e-2, verify=False, start=s) for s in (None, guesses))
    for pairs in (cold, warm):
        assert pairs.converged.all()
        np.testing.assert_allclose(pairs.values, [1.1, 1.2, 1.3], rtol=1e-3)
    assert warm.products <= 10
    assert cold.products > 20


def test_the_look_for_missed_pairs_keeps_to_the_number_of_products():
    op = spectra.DiagonalOperator(np.concatenate([np.linspace(-1, 1, 5000), [9.0]]))
    alone = spectra.topk(op, 1, verify=False).products
    for more in (1, 2):
        pairs = spectra.topk(op, 1, max_products=alone + more)
        assert pairs.products <= alone + more
    assert spectra.topk(op, 1).products > alone + 2


def test_a_notebook_shows_the_pairs():
    html = spectra.topk(spectra.DiagonalOperator(np.array([-7.25, *np.linspace(0, 1, 200), 5.5])), 2)._repr_html_()
    assert [html.count(text) for text in ("-7.25<", "5.5<", ">yes<", ">no<")] == [1, 1, 2, 0]
    assert "a matrix with 202 rows" in html


def test_float32_with_eigenvalues_that_fall_off_fast():
    """One pass of Gram-Schmidt at every step lost orthogonality here, and the search ended in a dense matrix."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(600, 600, dtype=torch.float64, generator=generator))
    values = 50 * 0.85 ** torch.arange(600, dtype=torch.float64)
    op = spectra.DenseOperator(((q * values) @ q.T).float())
    pairs = spectra.topk(op, 20, which="LM", tol=1e-3, verify=False)
    assert pairs.products < 100
    np.testing.assert_allclose(pairs.values[::-1], values[:20], rtol=1e-4)


def test_both_ends_are_searched_for_repeats():
    """A Krylov space of one start vector holds one copy of a repeated eigenvalue."""
    truth = np.array([-5.0, -5.0, -3.0, *np.linspace(0, 0.1, 200), 7.0, 8.0])
    pairs = spectra.topk(spectra.DiagonalOperator(truth), 4, which="BE")
    np.testing.assert_allclose(pairs.values, wanted(truth, 4, "BE"), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "bounds"), [([7.0], (-np.inf, 7.0)), ([1.0, 7.0], (1.0, 7.0)), ([6.0, -4.0, 7.0, -5.0], (-4.0, 6.0))]
)
def test_more_extreme_than_both_ends_is_what_lies_outside_the_gap_between_them(values, bounds):
    assert topk_module._bounds(np.array(values), "BE") == bounds
