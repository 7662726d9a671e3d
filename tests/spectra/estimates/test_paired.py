"""Paired differences against the variances of random unit vectors and closed forms."""

import math

import numpy as np
import pytest
import torch
from measures import even_weights, jacobi_matrix, known_eigenvalues, sphere_weights, stacked
from scipy.stats import norm
from scipy.stats import t as student

import spectra
from spectra.estimates.estimate import Estimate, sampling_interval
from spectra.estimates.paired import (
    LARGEST_SKEWNESS,
    MeanOverProbes,
    PairedMeans,
    difference_of_intervals,
    independent_difference,
    mean_over_probes,
)

Z = norm.ppf(0.975)
N = 60
BEFORE = np.array([6.0, 4.0, -1.0, *np.linspace(1.0, 2.0, N - 3)])  # whose mean is far from zero
AFTER = np.array([9.0, 5.0, -1.5, *np.linspace(1.1, 2.5, N - 3)])  # in the same order
KEYS = ("trace", "rms", "frobenius", "negative_energy_share", "negative_magnitude_share")


def seen(values, weights, *, steps=N):
    """The density that probe vectors with these weights (probes, n) leave, by default with every eigenvalue in it."""
    jacobi = stacked([jacobi_matrix(values, row, steps) for row in weights], steps)
    return spectra.SpectralDensity(len(values), jacobi.alphas, jacobi.betas, jacobi.lengths)


def mean(density, key):
    return mean_over_probes(density, key, getattr(density, key)())


def paired(before, after, key="trace"):
    return PairedMeans(mean(before, key), mean(after, key))


def influence(values, key, density):
    """What each eigenvalue adds to a quantity when its weight grows, times n, around what the density says of it."""
    squares, sizes = values**2, np.abs(values)
    if key == "trace":
        return N * values
    if key in ("rms", "frobenius"):
        size = density.frobenius().value * (math.sqrt(N) if key == "rms" else 1)
        return N * squares / (2 * size)
    whole = squares if key == "negative_energy_share" else sizes
    power = 2 if key == "negative_energy_share" else 1
    mean_of_whole = np.mean([rule.weights @ np.abs(rule.nodes) ** power for rule in density.measure.rules])
    return whole * ((values < 0) - getattr(density, key)().value) / mean_of_whole


@pytest.mark.parametrize("key", KEYS)
def test_values_of_probe_vectors_are_the_quantity_to_first_order(key):
    """Moving weight by a little from one eigenvalue to another changes the quantity as it changes the value."""
    weights, step = sphere_weights(N, probes=1, seed=0), 1e-6
    density = seen(BEFORE, weights)
    moved = weights + step * (sphere_weights(N, probes=1, seed=1) - weights)
    slope = (getattr(seen(BEFORE, moved), key)().value - getattr(density, key)().value) / step
    direction = (moved - weights)[0] / step
    assert influence(BEFORE, key, density) @ direction == pytest.approx(slope, rel=1e-4)
    found = mean(density, key)
    assert found.values == pytest.approx(weights @ influence(BEFORE, key, density), abs=1e-9)


@pytest.mark.parametrize("key", KEYS)
def test_the_spectrum_behind_a_quantity_is_centred(key):
    """With even weights it is the influence of each eigenvalue, less the mean."""
    density = seen(BEFORE, even_weights(N, probes=2))
    expected = influence(BEFORE, key, density)
    found = mean(density, key)
    for values, counts in zip(found.eigenvalues, found.counts, strict=True):
        assert counts == pytest.approx(np.ones(N), rel=1e-6)
        np.testing.assert_allclose(np.sort(values), np.sort(expected - expected.mean()) / N, atol=1e-9)
    unequal = mean(seen(BEFORE, sphere_weights(N, probes=5, seed=2)), key)
    rows = list(zip(unequal.counts, unequal.eigenvalues, strict=True))
    assert abs(np.mean([c @ x for c, x in rows])) < 1e-10 * np.mean([c @ np.abs(x) for c, x in rows])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_the_smallest_standard_error_is_that_of_common_eigenvectors(key, factor):
    """Var(v . D v) = 2 Var(d) / (n + 2) for the eigenvalues d of D; those of before and after are taken in order."""
    before, after = (seen(values, even_weights(N, probes=3)) for values in (BEFORE, AFTER))
    d = np.sort(influence(AFTER, key, after)) - factor * np.sort(influence(BEFORE, key, before))
    error, skewness = paired(before, after, key).error_with_common_eigenvectors(factor)
    assert error == pytest.approx(math.sqrt(2 * d.var() / (N + 2) / 3), rel=1e-6)
    third = 8 * ((d - d.mean()) ** 3).mean() / ((N + 2) * (N + 4)) / (2 * d.var() / (N + 2)) ** 1.5
    third = min(max(third, -math.sqrt(8)), math.sqrt(8))
    assert skewness == pytest.approx(third / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_the_standard_error_of_a_paired_difference(factor):
    """The same eigenvectors before and after: against 200,000 random unit vectors, with no formula between."""
    drawn = N * sphere_weights(N, probes=200_000, seed=3) @ (AFTER - factor * BEFORE)
    weights = sphere_weights(N, probes=600, seed=4)
    found = paired(seen(BEFORE, weights), seen(AFTER, weights))
    expected = drawn.std() / math.sqrt(600)
    assert found.error_with_common_eigenvectors(factor)[0] == pytest.approx(expected, rel=0.06)
    assert found.error_from_correlation(factor) == pytest.approx(expected, rel=0.1)


def test_the_standard_error_of_unrelated_eigenvectors():
    """Var(n v . D v) = 2 n^2 Var(eigenvalues of D) / (n + 2) with D the difference of the matrices."""
    print("seed = 3")
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(N, N)))[0]
    before, after = np.diag(BEFORE), (q * AFTER) @ q.T
    a, b = (spectra.slq(spectra.DenseOperator(torch.tensor(m)), probes=600, steps=30) for m in (before, after))
    found = paired(a, b)
    for factor in (0.7, 1.0):
        expected = math.sqrt(2 * N**2 * np.linalg.eigvalsh(after - factor * before).var() / (N + 2) / 600)
        assert found.error_from_correlation(factor) == pytest.approx(expected, rel=0.1)
        assert found.error_with_common_eigenvectors(factor)[0] < 0.8 * expected


def test_a_shift_of_every_eigenvalue_is_known_exactly():
    """v . (A + c) v = v . A v + c: the difference does not vary, however large the mean is."""
    weights = sphere_weights(N, probes=4, seed=5)
    found = paired(seen(BEFORE, weights), seen(BEFORE + 100, weights))
    assert found.error_with_common_eigenvectors(1.0)[0] < 1e-6
    assert found.error_from_correlation(1.0) < 1e-4
    low, high = found.limits(1.0)
    assert low == pytest.approx(100 * N, abs=1e-3)
    assert high == pytest.approx(100 * N, abs=1e-3)


def by_hand(values, eigenvalues, counts, *, interval=1000.0, dimension=10, truncation=0.0, rounding_error=0.0):
    value = float(np.mean(values))
    return MeanOverProbes(
        Estimate(value, value - interval, value + interval),
        np.array(values, dtype=float),
        [np.array(eigenvalues, dtype=float)] * len(values),
        [np.array(counts, dtype=float)] * len(values),
        dimension,
        truncation,
        rounding_error,
    )


def test_spectra_are_coupled_by_quantiles():
    """Ten eigenvalues each: -3 (four times) and 2, beside -5 (twice), 0 (six times) and 5 (twice)."""
    found = PairedMeans(by_hand([1, 2], [2, -3], [6, 4]), by_hand([1, 2], [0, -5, 5], [6, 2, 2]))
    differences = np.repeat([-2.0, 3.0, -2.0, 3.0], [2, 2, 4, 2])  # -5 + 3, 0 + 3, 0 - 2, 5 - 2
    error, skewness = found.error_with_common_eigenvectors(1.0)
    variance = 2 * 10 / 12 * (differences**2).sum()
    assert error == pytest.approx(math.sqrt(variance / 2))
    third = 8 * 100 / (12 * 14) * (differences**3).sum()
    assert skewness == pytest.approx(third / variance**1.5 / math.sqrt(2))


def test_dimensions_that_only_one_spectrum_samples_are_at_its_mean():
    found = PairedMeans(by_hand([1, 2], [3, -1], [2, 6], dimension=8), by_hand([1, 2], [4, -1], [2, 8]))
    differences = np.repeat([1.0, -1.0, 0.0], [2, 2, 6])  # 3 and 4; the two at 0 beside -1; -1 and -1
    assert found.error_with_common_eigenvectors(1.0)[0] == pytest.approx(math.sqrt(2 * 10 / 12 * 4 / 2))
    assert (differences**2).sum() == 4


def test_the_skewness_is_that_of_one_eigenvalue_at_most():
    found = PairedMeans(by_hand([1, 2], [0, 0], [5, 5]), by_hand([1, 2], [100, 0], [0.01, 9.99]))
    assert found.error_with_common_eigenvectors(1.0)[1] == pytest.approx(LARGEST_SKEWNESS / math.sqrt(2))
    negative = PairedMeans(by_hand([1, 2], [0, 0], [5, 5]), by_hand([1, 2], [-100, 0], [0.01, 9.99]))
    assert negative.error_with_common_eigenvectors(1.0)[1] == pytest.approx(-LARGEST_SKEWNESS / math.sqrt(2))


def test_the_interval_is_the_widest_of_three():
    """Each of the three in turn: pairs that vary much, spectra that differ much, and few pairs that vary by chance."""
    steady, small, large = [0.0, 0.0], [1, -1], [50, -50]
    x, y = by_hand([10, 12, 14, 20], small, [5, 5]), by_hand([20, 26, 24, 12], small, [5, 5])
    students = student.ppf(0.975, 3) * np.std([10, 14, 10, -8], ddof=1) / 2
    low, high = PairedMeans(x, y).limits(1.0)
    assert (low, high) == pytest.approx((6.5 - students, 6.5 + students))

    x, y = by_hand([1.0, 1.1, 0.9, 1.0], steady, [5, 5]), by_hand([2.0, 2.1, 1.9, 2.0], large, [5, 5])
    error = math.sqrt(2 * 10 / 12 * 10 * 2500 / 4)
    expected = sampling_interval(1.0, error, 0.0)
    assert PairedMeans(x, y).limits(1.0) == pytest.approx((expected.low, expected.high))

    # the spectra are the same, and the pairs are not correlated: neither of the first two has room
    x, y = by_hand([1, -1, 1, -1], large, [5, 5]), by_hand([1, -1, -1, 1], large, [5, 5])
    half = Z * math.sqrt(2) * error
    assert PairedMeans(x, y).limits(1.0) == pytest.approx((-half, half))


def test_negative_correlation_makes_a_difference_vary_more():
    large = [50, -50]
    error = math.sqrt(2 * 10 / 12 * 10 * 2500 / 4)
    for values, expected in (([1, -1, 1, -1], 1.0), ([-1, 1, -1, 1], 3.0), ([1, 1, -1, -1], math.sqrt(5))):
        found = PairedMeans(by_hand([1, -1, 1, -1], large, [5, 5]), by_hand(values, large, [5, 5]))
        assert found.error_from_correlation(2.0) == pytest.approx(expected * error), values
    constant = PairedMeans(by_hand([1, 1, 1, 1], large, [5, 5]), by_hand([1, -1, 1, -1], large, [5, 5]))
    assert constant.error_from_correlation(1.0) == pytest.approx(math.sqrt(2) * error)


def test_truncation_and_rounding_widen_the_interval():
    def limits(factor, **of_each):
        x = by_hand([10, 12, 14, 20], [1, -1], [5, 5], **{k: v[0] for k, v in of_each.items()})
        y = by_hand([20, 26, 24, 12], [1, -1], [5, 5], **{k: v[1] for k, v in of_each.items()})
        return np.array(PairedMeans(x, y).limits(factor))

    plain = limits(2.0)
    np.testing.assert_allclose(limits(2.0, truncation=(1.0, 5.0)) - plain, [-3, 3])
    np.testing.assert_allclose(limits(2.0, truncation=(3.0, 5.0)) - plain, [-1, 1])
    np.testing.assert_allclose(limits(2.0, rounding_error=(0.1, 0.5)) - plain, [-0.7, 0.7])
    np.testing.assert_allclose(limits(2.0, interval=(1.0, 2.0)), [20.5 - 28 - 4, 20.5 - 28 + 4])


def test_ratio_limits_add_the_known_variance_away_from_the_ratio():
    """At the measured ratio both ways agree; away from it the multiple of `before` has a variance that is known."""
    x, y = by_hand([10, 12, 14, 20], [1, -1], [5, 5]), by_hand([30, 35, 43, 60], [2, -2], [5, 5])
    found, ratio = PairedMeans(x, y), 42 / 14
    assert found.ratio_limits(ratio) == pytest.approx(found.limits(ratio))
    students = student.ppf(0.975, 3) * np.std([0, -1, 1, 0], ddof=1) / 2
    error = math.sqrt(2 * 10 / 12 * 10 / 4)
    pairs_error = Z * found.error_from_correlation(ratio)
    for factor in (2.0, 2.5):
        half = math.hypot(max(students, pairs_error), Z * (factor - ratio) * error)
        low, high = found.ratio_limits(factor)
        assert (low, high) == pytest.approx((42 - 14 * factor - half, 42 - 14 * factor + half))


@pytest.mark.parametrize("key", ["negative_energy_share", "negative_magnitude_share"])
def test_truncation_is_what_half_the_steps_would_have_changed(key):
    values = np.random.default_rng(4).normal(size=300) + 0.3
    weights = sphere_weights(300, probes=3, seed=6)
    whole, half = (seen(values, weights, steps=steps) for steps in (14, 7))
    change = getattr(whole, key)().value - getattr(half, key)().value
    assert abs(change) > 1e-4
    assert mean(whole, key).truncation == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize("key", ["trace", "rms", "frobenius"])
def test_polynomials_are_not_truncated(key):
    assert mean(seen(BEFORE, even_weights(N), steps=7), key).truncation == 0.0


def test_the_rounding_error_counts_all_eigenvalues():
    density = seen(BEFORE, sphere_weights(N, probes=4, seed=7))
    known = known_eigenvalues([-100.0, 7.0], counts=[2, 3])
    whole = spectra.SpectralDensity(
        N + 5, density.alphas, density.betas, density.lengths, known.values, known.counts, known.errors, 1e-3
    )
    size = np.mean([N * rule.weights @ np.abs(rule.nodes) for rule in whole.measure.rules]) + 200 + 21
    found = mean(whole, "trace")
    assert found.rounding_error == pytest.approx(1e-3 / 100 * size)
    assert found.dimension == N


def test_the_difference_of_two_intervals():
    before, after = Estimate(2.0, 1.5, 4.0), Estimate(10.0, 9.0, 10.5)
    assert difference_of_intervals(before, after, 2.0) == (9.0 - 8.0, 10.5 - 3.0)


def test_independent_intervals_add_in_quadrature_on_each_side():
    before, after = Estimate(2.0, 0.5, 4.0), Estimate(10.0, 7.0, 18.0)
    low, high = independent_difference(before, after, 2.0)
    assert (low, high) == pytest.approx((6 - math.hypot(3, 4), 6 + math.hypot(8, 3)))


def test_independent_intervals_of_normal_estimates_are_the_usual_ones():
    before, after = (Estimate(m, m - Z * s, m + Z * s) for m, s in ((1.0, 3.0), (5.0, 4.0)))
    low, high = independent_difference(before, after, 1.0)
    assert (low, high) == pytest.approx((4 - 5 * Z, 4 + 5 * Z))
