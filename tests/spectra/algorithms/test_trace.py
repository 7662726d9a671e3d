"""Three estimators of a trace against the truth."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, random_state, same_random_state

import spectra

METHODS = ("hutchinson", "hutch++", "xtrace")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["normal", "positive", "decaying", "float32"])
def test_the_interval_covers_the_trace(method, kind):
    """Of forty intervals at 95 % at least 34 hold the truth (fewer has probability .01 for a sound one)."""
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=150),
        "positive": rng.uniform(0, 1, size=150),
        "decaying": 0.7 ** np.arange(150),
        "float32": rng.normal(size=150) + 1,
    }[kind]
    matrix = matrix_with_spectrum(values, seed=1)
    op = spectra.DenseOperator(matrix.float() if kind == "float32" else matrix)
    hits = 0
    for seed in range(40):
        estimate = spectra.trace(op, method=method, probes=30, seed=seed)
        assert isinstance(estimate, spectra.Estimate)
        assert estimate.low <= estimate.value <= estimate.high
        slack = 1e-5 * np.abs(values).sum() if kind == "float32" else 1e-12 * np.abs(values).sum()
        hits += estimate.low - slack <= values.sum() <= estimate.high + slack
    assert hits >= 34, hits


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_is_unbiased(method):
    values = np.random.default_rng(1).standard_t(4, size=80)
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=2))
    estimates = np.array([spectra.trace(op, method=method, probes=12, seed=seed).value for seed in range(150)])
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert error > 0
    assert abs(estimates.mean() - values.sum()) < 3.5 * error


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize(("decay", "gain"), [(0.5, 20), (0.78, 2)])
def test_low_rank_plus_little_is_cheap(method, decay, gain):
    """With the same number of products, far closer than Hutchinson where the spectrum decays fast."""
    values = decay ** np.arange(200.0)
    matrix = matrix_with_spectrum(values, seed=3)

    def errors(method, probes):
        op = spectra.DenseOperator(matrix)
        got = [spectra.trace(op, method=method, probes=probes, seed=seed).value for seed in range(12)]
        return np.sqrt(np.mean((np.array(got) - values.sum()) ** 2)), op.products / 12

    error, products = errors(method, 30)
    plain, plain_products = errors("hutchinson", round(products))
    assert products <= plain_products <= 61
    assert error < plain / gain, (error, plain)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_exact_when_the_rank_is_below_the_sketch(method):
    values = np.concatenate([np.zeros(90), [5.0, -3.0, 1.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=4))
    estimate = spectra.trace(op, method=method, probes=30, seed=0)
    assert estimate.value == pytest.approx(3, abs=1e-8)
    assert estimate.low - 1e-8 <= 3 <= estimate.high + 1e-8


def test_a_few_outliers_make_hutch_three_times_as_narrow():
    """Twenty eigenvalues hold all but a few hundredths of the energy: a Krylov space takes them out."""
    rng = np.random.default_rng(7)
    values = np.concatenate([rng.normal(size=1980) / 44, rng.uniform(0.5, 5, size=20)])
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=8))
    widths = [
        np.median([spectra.trace(op, method=m, probes=120, seed=s).half_width for s in range(5)]) for m in METHODS
    ]
    assert widths[1] < widths[0] / 3
    assert widths[1] < widths[2]


def test_hutch_loses_little_without_outliers():
    """A flat spectrum has no dominant range: Hutch++ notices, and has nearly the interval of plain Hutchinson."""
    values = np.random.default_rng(8).normal(size=1500) + 0.3
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=9))
    plain, better = (
        np.mean([spectra.trace(op, method=method, probes=120, seed=seed).half_width for seed in range(10)])
        for method in ("hutchinson", "hutch++")
    )
    assert better < 1.25 * plain


@pytest.mark.parametrize("copies", [8, 15, 40])
def test_repeated_eigenvalues_do_not_mislead_hutch(copies):
    """A Krylov space holds as many copies of an eigenvalue as its block has vectors; the rest is estimated."""
    values = np.concatenate([np.zeros(500), np.full(copies, 2.0)])
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=10))
    hits = 0
    for seed in range(20):
        op.products = 0
        estimate = spectra.trace(op, method="hutch++", probes=60, seed=seed)
        assert op.products == estimate.products == 60
        hits += estimate.low - 1e-9 <= 2 * copies <= estimate.high + 1e-9
    assert hits >= 17, hits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_operators_smaller_than_the_number_of_probe_vectors(method, n):
    values = np.arange(1.0, n + 1)
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed=5))
    estimate = spectra.trace(op, method=method, probes=30, seed=0)
    assert estimate.low - 1e-9 <= values.sum() <= estimate.high + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_an_exact_trace_has_an_interval_for_its_rounding(seed):
    """Where all products can be afforded the answer is the trace, and its interval still holds the truth, strictly."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, size=int(rng.integers(2, 60)))
    op = spectra.DenseOperator(matrix_with_spectrum(values, seed))
    for estimate in (spectra.trace(op, probes=200, seed=0), spectra.slq(op, probes=2, steps=60, seed=0).trace()):
        assert estimate.low <= values.sum() <= estimate.high
        assert estimate.half_width < 1e-9 * np.abs(values).sum()


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_a_zero_matrix_is_zero(method):
    op = spectra.DenseOperator(torch.zeros(20, 20, dtype=torch.float64))
    assert spectra.trace(op, method=method, probes=9, seed=0).value == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method):
    op = spectra.DenseOperator(matrix_with_spectrum(np.random.default_rng(6).normal(size=50), seed=6))
    before = random_state()
    one, again, other = (spectra.trace(op, method=method, probes=9, seed=seed) for seed in (1, 1, 2))
    assert same_random_state(before, random_state())
    assert one == again
    assert one.value != other.value


def test_hutchinson_counts_its_products():
    op = spectra.DenseOperator(matrix_with_spectrum(np.arange(20.0), seed=7))
    spectra.trace(op, method="hutchinson", probes=11, seed=0)
    assert op.products == 11


@pytest.mark.parametrize("options", [{"method": "guess"}, {"probes": 0}, {"method": "xtrace", "probes": -1}])
def test_bad_options_are_refused(options):
    op = spectra.DenseOperator(torch.eye(5, dtype=torch.float64))
    with pytest.raises(spectra.InputError) as caught:
        spectra.trace(op, **options)
    assert "\n" not in str(caught.value)
