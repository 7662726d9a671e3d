"""Three estimators of a trace against the truth."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, random_state, same_random_state

import spectra
from spectra.algorithms import trace as traces
from spectra.backend.random_vectors import gaussian, probe_vector
from spectra.estimates.estimate import sampling_interval, student_interval

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


def test_hutchinson_takes_the_larger_of_two_deviations():
    """That of the samples, and that which ||A v||^2 shows of the eigenvalues' variance."""
    rng = np.random.default_rng(9)
    for values in (rng.normal(size=60), np.append(rng.normal(size=60), [40.0, -30.0])):
        op = spectra.DenseOperator(matrix_with_spectrum(values, seed=11))
        n, larger = len(values), []
        for seed in range(12):
            vectors = torch.stack([probe_vector(op, seed=seed, index=i) for i in range(5)])
            samples = n * ((vectors @ op.matrix) * vectors).sum(1).numpy()
            variance = float((vectors @ op.matrix).square().sum(1).mean()) - (samples.mean() / n) ** 2
            deviations = n * np.sqrt(2 * variance / (n + 2)), samples.std(ddof=1)
            centred = samples - samples.mean()
            skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
            want = sampling_interval(samples.mean(), max(deviations) / np.sqrt(5), skewness / np.sqrt(5), freedom=4)
            found = spectra.trace(op, probes=5, seed=seed)
            assert (found.value, found.low, found.high) == pytest.approx((want.value, want.low, want.high))
            larger.append(int(np.argmax(deviations)))
        assert set(larger) == {0, 1}
    alone, vector = spectra.trace(op, probes=1, seed=3), probe_vector(op, seed=3, index=0)
    form, square = float(vector @ op.matrix @ vector), float((op.matrix @ vector).square().sum())
    half = 1.959964 * n * np.sqrt(2 * (square - form**2) / (n + 2))
    assert (alone.low, alone.high) == pytest.approx((n * form - half, n * form + half))


@pytest.mark.parametrize("probes", [8, 13])
def test_xtrace_leaves_each_test_vector_out_in_turn(probes):
    """By the definition, with a range of its own for each of them."""
    n, count = 40, probes // 2
    matrix = matrix_with_spectrum(0.8 ** np.arange(n) * np.where(np.arange(n) % 3, 1, -1), seed=12)
    op = spectra.DenseOperator(matrix)
    tests = torch.stack([gaussian(op, seed=2, index=i, stream="sketch") for i in range(count)])
    samples = []
    for i in range(count):
        others = torch.cat([tests[:i], tests[i + 1 :]]) @ matrix
        basis = torch.linalg.qr(others.T)[0]
        rest = torch.eye(n, dtype=torch.float64) - basis @ basis.T
        left = rest @ tests[i]
        remainder = (n - count + 1) * (left @ matrix @ left) / (left @ left)
        samples.append(float(torch.trace(basis.T @ matrix @ basis) + remainder))
    want = student_interval(samples)
    found = spectra.trace(op, method="xtrace", probes=probes, seed=2)
    assert found.value == pytest.approx(want.value, rel=1e-9)
    assert found.half_width == pytest.approx(1.5 * want.half_width, rel=1e-9)
    assert found.products == op.products == 2 * count


@pytest.mark.parametrize("decay", [1.0, 0.99, 0.9, 0.6])
@pytest.mark.parametrize("probes", [12, 30, 60, 130])
def test_the_range_of_hutch_grows_while_a_block_takes_more_energy_than_products(decay, probes):
    """Its energy 2 ||A Q^T||_F^2 - ||Q A Q^T||_F^2 block by block, from Q as a whole."""
    n = 300
    matrix = matrix_with_spectrum(decay ** np.arange(n), seed=13)
    basis, captured = traces._dominant_range(spectra.DenseOperator(matrix), probes, 1)
    block = {12: 1, 30: 2, 60: 5, 130: 10}[probes]
    assert len(basis) % block == 0
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-10, rtol=0)
    assert captured == pytest.approx(float(torch.trace(basis @ matrix @ basis.T)), rel=1e-9)

    def energy(size):
        q = basis[:size]
        return float(2 * (q @ matrix).square().sum() - (q @ matrix @ q.T).square().sum())

    whole = n * float((basis[:block] @ matrix).square().sum()) / block

    def goes_on(size):
        gain = energy(size) - energy(size - block)
        return 0.5 * gain * (probes - size) > block * max(whole - energy(size), 0.0)

    assert len(basis) >= 2 * block  # the first block is random, so the second is always taken
    sizes = range(2 * block, len(basis), block)
    assert all(goes_on(size) for size in sizes)
    assert len(basis) + block > probes // 2 or not goes_on(len(basis))
    if decay == 1.0:
        assert len(basis) == 2 * block
    if decay == 0.6:
        assert len(basis) > 2 * block


def test_a_block_that_lacks_rows_is_completed_with_random_ones():
    op = spectra.DiagonalOperator(np.arange(20.0))
    rows = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    basis, block = rows[:3], rows[3:]
    assert torch.equal(traces._complete_block(op, block, basis, 2, 0), block)
    completed = traces._complete_block(op, block, basis, 4, 0)
    assert completed.shape == (4, 20)
    everything = torch.cat([basis, completed])
    torch.testing.assert_close(everything @ everything.T, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((completed @ block.T).square().sum(), torch.tensor(2.0, dtype=torch.float64))


def test_products_are_taken_in_blocks_that_fit_in_memory(monkeypatch):
    op = spectra.DenseOperator(matrix_with_spectrum(np.arange(30.0), seed=14))
    vectors = torch.randn(11, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for block_size in (1, 4, 50):
        monkeypatch.setattr(traces, "probe_block_size", lambda op, steps, deflated, size=block_size: size)
        torch.testing.assert_close(traces._multiply(op, vectors), vectors @ op.matrix)


def test_hutchinsons_samples_have_the_mean_and_the_interval_of_the_trace():
    op = spectra.DiagonalOperator(np.append(np.linspace(0, 1, 500), [30.0, 20.0]))
    samples, estimate = traces.hutchinson_samples(op, probes=35, seed=3)
    assert estimate == spectra.trace(op, probes=35, seed=3)
    assert len(samples) == 35
    assert samples.mean() == pytest.approx(estimate.value, rel=1e-12)
    exact, certain = traces.hutchinson_samples(op, probes=502)
    assert exact.tolist() == [certain.value]
    assert certain.value == pytest.approx(300, rel=1e-9)


def test_hutchinsons_samples_end_where_the_interval_is_narrow_enough():
    op = spectra.DiagonalOperator(np.linspace(0.5, 1.5, 4000))
    samples, estimate = traces.hutchinson_samples(op, probes=1000, tol=0.01)
    assert len(samples) in (10, 20, 40)
    assert estimate.products == len(samples)
    assert estimate.half_width <= 0.01 * estimate.value
    with pytest.raises(spectra.InputError, match="at least one product"):
        traces.hutchinson_samples(op, probes=0)
