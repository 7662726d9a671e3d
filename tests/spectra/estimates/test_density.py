"""What is read from the quadrature rules: shares, moments, ends, smoothed densities, and their intervals."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum

import spectra

SPECTRUM = np.sort(np.concatenate([np.random.default_rng(0).normal(size=40) * 0.1, [3.0, 3.0, -2.0, 9.0]]))
TRUTH = {
    "negative_share": np.mean(SPECTRUM < 0),
    "negative_energy_share": np.sum(SPECTRUM[SPECTRUM < 0] ** 2) / np.sum(SPECTRUM**2),
    "negative_magnitude_share": -np.sum(SPECTRUM[SPECTRUM < 0]) / np.sum(np.abs(SPECTRUM)),
    "rms": np.sqrt(np.mean(SPECTRUM**2)),
    "trace": SPECTRUM.sum(),
    "frobenius": np.linalg.norm(SPECTRUM),
    "lambda_max": SPECTRUM.max(),
    "lambda_min": SPECTRUM.min(),
}
SHARES = ("negative_share", "negative_energy_share", "negative_magnitude_share")


@pytest.fixture(scope="module")
def exact():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRUM, seed=1))
    return spectra.slq(op, probes=3, steps=len(SPECTRUM), seed=0)


@pytest.fixture(scope="module")
def partial():
    spectrum = np.concatenate([np.random.default_rng(1).standard_t(3, size=400) * 0.1, [5.0, 9.0, -3.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=2))
    return spectra.slq(op, probes=6, steps=30, seed=0)


@pytest.mark.parametrize("name", TRUTH)
def test_exact_at_full_length(exact, name):
    estimate = getattr(exact, name)()
    assert isinstance(estimate, spectra.Estimate)
    assert estimate.value == pytest.approx(TRUTH[name], abs=1e-8)
    assert estimate.low - 1e-8 <= TRUTH[name] <= estimate.high + 1e-8
    assert estimate.half_width < 1e-8
    assert estimate.resolved


@pytest.mark.parametrize("tol", [1e-3, 0.05, 0.1, 1.0, 5.0, 100.0])
def test_near_zero_share_at_full_length(exact, tol):
    estimate = exact.near_zero_share(tol)
    assert estimate.value == pytest.approx(np.mean(np.abs(SPECTRUM) < tol), abs=1e-8)
    assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize(("a", "b"), [(-0.1, 0.1), (0.05, 4.0), (-5.0, -1.0), (20.0, 30.0), (-np.inf, np.inf)])
def test_share_between_at_full_length(exact, a, b):
    assert exact.share_between(a, b).value == pytest.approx(np.mean([a < value < b for value in SPECTRUM]), abs=1e-8)


@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_a_share(partial, name):
    estimate = getattr(partial, name)()
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_shares_between_thresholds_are_shares(partial):
    for a, b in [(-1.0, 1.0), (-0.01, 0.01), (0.0, np.inf), (-np.inf, 0.0), (50.0, 60.0), (-1e-9, 1e-9)]:
        estimate = partial.share_between(a, b)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    for tol in (1e-6, 1e-3, 0.1, 100.0):
        estimate = partial.near_zero_share(tol)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_every_estimate_lies_in_its_own_interval(partial):
    for name in TRUTH:
        estimate = getattr(partial, name)()
        assert np.isfinite([estimate.value, estimate.low, estimate.high]).all()
        assert estimate.low <= estimate.value <= estimate.high, name
        assert isinstance(estimate.resolved, bool), name
        assert all(isinstance(number, float) for number in (estimate.value, estimate.low, estimate.high)), name


def test_near_zero_share_grows_with_the_tolerance(partial):
    shares = [partial.near_zero_share(tol).value for tol in np.logspace(-4, 2, 25)]
    assert (np.diff(shares) >= -1e-12).all()
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("steps", [12, 60])
def test_a_definite_matrix_has_no_other_side(steps):
    spectrum = np.random.default_rng(3).uniform(1, 2, size=60)
    for sign, share in ((1, 0.0), (-1, 1.0)):
        op = spectra.DenseOperator(matrix_with_spectrum(sign * spectrum, seed=3))
        density = spectra.slq(op, probes=3, steps=steps, seed=0)
        for name in SHARES:
            estimate = getattr(density, name)()
            assert estimate.value == pytest.approx(share, abs=1e-9), name
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1, name
        assert density.near_zero_share(0.5).value == pytest.approx(0, abs=1e-9)


def test_a_bulk_that_no_rule_of_this_length_resolves_is_not_called_resolved():
    """Outliers at 1000 and a skewed bulk within .01 of zero: 20 steps see the bulk as one or two nodes."""
    rng = np.random.default_rng(4)
    values = np.concatenate([0.01 * (rng.gamma(1.0, size=3000) - 0.4), rng.uniform(10, 1000, size=30)])
    density = spectra.slq(spectra.DiagonalOperator(torch.tensor(values)), probes=4, steps=20, seed=0)
    estimate = density.near_zero_share(1e-4)
    truth = np.mean(np.abs(values) < 1e-4)
    assert not estimate.resolved or estimate.low <= truth <= estimate.high
    if not estimate.resolved:
        assert estimate.reason


def test_ends_of_the_spectrum_with_few_steps(partial):
    assert partial.lambda_max().value == pytest.approx(9, abs=1e-6)
    assert partial.lambda_min().value == pytest.approx(-3, abs=1e-4)


def test_the_density_integrates_to_one_and_is_not_negative(partial):
    grid = np.linspace(-30, 40, 40_001)
    for bandwidth in (None, 0.02, 0.5):
        density = partial.density(grid, bandwidth) if bandwidth else partial.density(grid)
        assert density.shape == grid.shape
        assert (density >= 0).all()
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3), bandwidth


def test_the_density_of_a_normal_bulk_has_its_shape():
    """The density of 4,000 quantiles of N(0, 1) at a bandwidth h is near the N(0, 1 + h^2) density."""
    from scipy.stats import norm

    values = norm.ppf((np.arange(4000) + 0.5) / 4000)
    density = spectra.slq(spectra.DiagonalOperator(torch.tensor(values)), probes=8, steps=40, seed=0)
    grid = np.linspace(-2, 2, 41)
    want = norm.pdf(grid, scale=np.sqrt(1 + 0.4**2))
    np.testing.assert_allclose(density.density(grid, 0.4), want, atol=0.05)


def test_a_wider_bandwidth_is_smoother(partial):
    grid = np.linspace(-4, 10, 5001)
    roughness = [np.abs(np.diff(partial.density(grid, bandwidth))).sum() for bandwidth in (0.05, 0.2, 0.8)]
    assert roughness[0] > roughness[1] > roughness[2]


@pytest.mark.parametrize("which", ["exact", "partial"])
def test_the_cumulative_curve(which, request):
    density = request.getfixturevalue(which)
    grid = np.linspace(-20, 30, 4001)
    curve = density.cumulative(grid)
    assert curve.shape == grid.shape
    assert (curve >= 0).all()
    assert (curve <= 1).all()
    assert (np.diff(curve) >= -1e-12).all()
    assert curve[0] == pytest.approx(0, abs=1e-9)
    assert curve[-1] == pytest.approx(1, abs=1e-9)


def test_the_cumulative_curve_of_a_known_bulk():
    values = np.linspace(-1, 3, 2000)
    density = spectra.slq(spectra.DiagonalOperator(torch.tensor(values)), probes=10, steps=40, seed=0)
    grid = np.linspace(-0.9, 2.9, 50)
    np.testing.assert_allclose(density.cumulative(grid), (grid + 1) / 4, atol=0.04)


def test_trace_and_frobenius_agree_with_the_first_moments(partial):
    first = partial.dimension * np.sum(partial.weights * partial.nodes, axis=1)
    assert partial.trace().value == pytest.approx(first.mean(), rel=1e-10)
    second = partial.dimension * np.sum(partial.weights * partial.nodes**2, axis=1)
    assert partial.frobenius().value == pytest.approx(np.sqrt(second.mean()), rel=1e-10)
    assert partial.rms().value == pytest.approx(partial.frobenius().value / np.sqrt(partial.dimension), rel=1e-10)


@pytest.mark.parametrize("operator", ["dense", "diagonal"])
@pytest.mark.parametrize("probes", [6, 20])
def test_the_interval_of_the_trace_covers_it(operator, probes):
    """A 95 % interval misses one time in twenty: 180 to 199 hits of 200 seeds allow for chance and rough tails."""
    values = np.random.default_rng(5).normal(size=500 if operator == "diagonal" else 150) + 0.3
    if operator == "dense":
        op = spectra.DenseOperator(matrix_with_spectrum(values, seed=5))
    else:
        op = spectra.DiagonalOperator(torch.tensor(values))
    hits = {"trace": 0, "frobenius": 0}
    truth = {"trace": values.sum(), "frobenius": np.linalg.norm(values)}
    for seed in range(200):
        density = spectra.slq(op, probes=probes, steps=3, seed=seed)
        for name in hits:
            estimate = getattr(density, name)()
            hits[name] += estimate.low <= truth[name] <= estimate.high
    assert all(180 <= count <= 199 for count in hits.values()), hits


def test_arrays_there_and_back(partial):
    arrays = partial.to_arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    back = spectra.SpectralDensity.from_arrays(arrays)
    for name in ("nodes", "weights", "alphas", "betas", "lengths"):
        assert np.array_equal(getattr(back, name), getattr(partial, name)), name
    assert back.dimension == partial.dimension
    grid = np.linspace(-4, 10, 101)
    assert np.array_equal(back.density(grid), partial.density(grid))
    for name in TRUTH:
        assert getattr(back, name)() == getattr(partial, name)()
    assert back.near_zero_share(0.1) == partial.near_zero_share(0.1)


def test_arrays_of_an_exact_density_there_and_back(exact):
    back = spectra.SpectralDensity.from_arrays(exact.to_arrays())
    for name, truth in TRUTH.items():
        assert getattr(back, name)() == getattr(exact, name)()
        assert getattr(back, name)().value == pytest.approx(truth, abs=1e-8)


def test_a_density_is_frozen(partial):
    with pytest.raises(dataclasses.FrozenInstanceError):
        partial.dimension = 3


def test_estimates_print_with_their_interval(partial):
    estimate = partial.trace()
    assert float(estimate) == estimate.value
    assert str(estimate).count("[") == 1
    assert spectra.Estimate.from_dict(estimate.to_dict()) == estimate
    assert estimate.half_width == pytest.approx((estimate.high - estimate.low) / 2)


def test_the_keys_of_the_arrays_are_those_of_older_files(partial):
    names = {"alphas", "betas", "lengths", "atoms", "counts", "atom_residuals", "dimension", "exact", "noise", "seed"}
    arrays = partial.to_arrays()
    assert set(arrays) == names
    assert arrays["noise"].tolist() == [partial.rounding_error]
    del arrays["seed"]
    assert spectra.SpectralDensity.from_arrays(arrays).seed is None


def test_a_density_keeps_what_it_is_made_of():
    alphas, betas = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    density = spectra.SpectralDensity(
        10,
        alphas,
        betas,
        np.array([2, 1]),
        np.array([-4.0, 0.0]),
        np.array([1.0, 5.0]),
        np.array([0.1, 0.0]),
        rounding_error=0.25,
        exact=False,
        seed=7,
    )
    assert (density.dimension, density.rounding_error, density.exact, density.seed) == (10, 0.25, False, 7)
    assert density.measure.sampled_dimension == 4
    assert (density.alphas.tolist(), density.betas.tolist()) == (alphas.tolist(), betas.tolist())
    assert density.lengths.tolist() == [2, 1]
    assert (density.atoms.tolist(), density.counts.tolist()) == ([-4.0, 0.0], [1.0, 5.0])
    assert density.atom_residuals.tolist() == [0.1, 0.0]
    low, high = 1.5 - np.sqrt(0.5), 1.5 + np.sqrt(0.5)  # eigenvalues of [[1, .5], [.5, 2]]
    np.testing.assert_allclose(density.nodes, [[-4, 0, low, high], [-4, 0, 3, 3]])
    np.testing.assert_allclose(density.weights[1], [0.1, 0.5, 0.4, 0])
    np.testing.assert_allclose(density.weights.sum(axis=1), 1)
    assert density.trace().value == pytest.approx(4 * (1 + 3) / 2 - 4)
    plain = spectra.SpectralDensity(2, alphas, betas, np.array([2, 1]))
    assert (len(plain.atoms), plain.rounding_error, plain.exact, plain.seed) == (0, 0.0, False, None)


def test_known_eigenvalues_are_exact_except_for_rounding():
    density = spectra.SpectralDensity.from_eigenvalues(
        np.array([3.0, -1.0, 0.0]), probes=2, steps=5, rounding_error=0.1
    )
    assert density.exact
    assert density.nodes.shape == density.weights.shape == (2, 5)
    np.testing.assert_allclose(density.nodes[1], [-1, 0, 3, 3, 3])
    np.testing.assert_allclose(density.weights[1], [1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert density.atom_residuals.tolist() == [0.1, 0.0, 0.1]
    assert (density.lambda_max().low, density.lambda_max().high) == pytest.approx((2.9, 3.1))
    assert density.trace().half_width == pytest.approx(0.1 / 3 * 4)  # .1 relative to 3, of the sizes 3 + 1
    np.testing.assert_allclose(density.cumulative([-2, -1, -0.5, 0, 3]), [0, 1 / 6, 1 / 3, 1 / 2, 5 / 6])


def test_without_known_zeros_the_others_are_the_whole():
    values = np.array([-1.0, 0.0, 0.0, 0.0, 2.0])
    density = spectra.SpectralDensity.from_eigenvalues(values, rounding_error=1e-3)
    rest = density.without_known_zeros()
    assert density.zero_share() == 0.6
    assert (rest.dimension, rest.zero_share(), rest.exact) == (2, 0.0, True)
    assert rest.atoms.tolist() == [-1.0, 2.0]
    assert rest.negative_share().value == 0.5
    assert rest.rounding_error == density.rounding_error


def test_a_relative_tolerance_is_that_of_the_largest_size(partial):
    assert partial.near_zero_share(0.1, relative=True) == partial.near_zero_share(0.1 * np.abs(partial.nodes).max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.near_zero_share(0.0), "tolerance must be positive"),
        (lambda d: d.share_between(1.0, 1.0), "low < high"),
        (lambda d: d.density([0.0]), "increasing points"),
        (lambda d: d.density([0.0, 1.0, 1.0]), "increasing points"),
        (lambda d: d.density([0.0, 1.0], bandwidth=0.0), "bandwidth must be positive"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(partial, call, message):
    with pytest.raises(spectra.InputError, match=message):
        call(partial)


def test_a_notebook_shows_every_quantity_that_needs_no_tolerance():
    from spectra.estimates.density import SHOWN
    from spectra.estimates.quantities import ESTIMATES

    assert set(SHOWN) == set(ESTIMATES) - {"near_zero_share"}
    html = spectra.SpectralDensity.from_eigenvalues(np.array([-1.0, 1.0, 3.0, 5.0]))._repr_html_()
    cells = [row.split("</td>")[:2] for row in html.split("<tr>")[2:]]
    read = {name.rpartition(">")[2]: value.rpartition(">")[2] for name, value in cells}
    assert read["negative_share()"] == "0.25"
    assert (read["trace()"], read["lambda_min()"], read["frobenius()"]) == ("8", "-1", "6")
    assert "4 eigenvalues: all known" in html
