"""The number of eigenvalues beyond a threshold against the distribution of the masses and against known spectra."""

import math

import numpy as np
import pytest
from measures import even_weights, measure_of

import spectra
from spectra.estimates.band import TAIL_PART, cumulative_band
from spectra.estimates.tail_counts import tail_bounds


@pytest.mark.parametrize(("n", "probes"), [(5, 2), (100, 1), (1000, 4)])
def test_all_numbers_at_both_ends_lie_in_their_bounds_with_the_probability(n, probes):
    """The masses of the j smallest and of the j largest eigenvalues have the same distribution for all spectra."""
    failure, draws = 0.3, 400
    bounds, rng, failed = tail_bounds(n, probes, failure), np.random.default_rng(n), 0
    numbers = np.arange(n + 1)
    for _ in range(draws):
        squares = rng.normal(size=(probes, n)) ** 2
        masses = np.append(0, (squares / squares.sum(axis=1, keepdims=True)).mean(axis=0).cumsum())
        for mass in (masses, 1 - masses[::-1]):
            fewest, most = bounds.count(mass, mass)
            if np.any((fewest > numbers) | (most < numbers)):
                failed += 1
                break
    assert failed / draws <= failure + 3 * math.sqrt(failure * (1 - failure) / draws)
    assert failed / draws < 0.9 * failure or n > 1000  # a union bound, so not tight


def test_the_bounds_are_those_of_chernoff():
    bounds = tail_bounds(10_000, 3, 0.01)
    assert bounds.counts[0] == 1
    assert bounds.counts[-1] == 10_000
    for side in (bounds.least, bounds.most):
        x = side[:40] * 10_000 / bounds.counts[:40]
        tails = np.exp(-3 * bounds.counts[:40] / 2 * (x - 1 - np.log(x)))
        assert tails == pytest.approx(0.01 / 4 / len(bounds.counts), rel=1e-4)
    assert np.all(bounds.least < bounds.counts / 10_000)
    assert np.all(bounds.most > bounds.counts / 10_000)


def test_no_mass_means_no_eigenvalue_and_some_mass_at_least_one():
    fewest, most = tail_bounds(1000, 2, 0.01).count(np.array([0.0, 1e-9, 1.0]), np.array([0.0, 1e-9, 1.0]))
    assert fewest[:2].tolist() == [0, 1]
    assert most[0] == 0
    assert most[2] == 1000


def test_few_eigenvalues_have_a_relative_error_where_the_plain_band_has_an_absolute_one():
    rng = np.random.default_rng(0)
    values = np.sort(np.concatenate([rng.normal(size=20_000), np.linspace(20, 50, 12)]))
    density = spectra.slq(spectra.DiagonalOperator(values), probes=6, steps=60, seed=0)
    t, n = np.array([10.0]), len(values)
    plain, sharp = (density.band(tails=tails).at(t) for tails in (False, True))
    assert n * (1 - plain[0][0]) > 100
    assert n * (1 - plain[1][0]) == pytest.approx(0, abs=1e-6)
    assert 3 < n * (1 - sharp[1][0]) <= 12 <= n * (1 - sharp[0][0]) < 40


@pytest.mark.parametrize("seed", range(4))
def test_the_band_with_sharp_tails_holds_a_known_curve(seed):
    rng = np.random.default_rng(seed)
    values = np.sort(np.concatenate([0.01 * rng.standard_t(2.5, size=3000), np.zeros(1000), [9.0, 4.0, 1.0, -2.0]]))
    density = spectra.slq(spectra.DiagonalOperator(values), probes=2, steps=20, seed=seed)
    extra = np.linspace(-3, 10, 300)
    band = density.band(thresholds=extra, tails=True)
    assert set(extra) <= set(band.thresholds)
    truth = np.searchsorted(values, band.thresholds) / len(values)
    assert np.all((band.low <= truth + 1e-12) & (truth <= band.high + 1e-12))
    assert np.all(np.diff(band.low) >= 0)
    assert np.all(band.low <= band.high)
    assert band.level == 0.95


def test_the_middle_of_the_band_pays_a_tenth_of_the_probability():
    values = np.repeat([-2.0, -1.0, 1.0, 2.0, 3.0], 200)
    low, high = cumulative_band(measure_of(values, even_weights(1000), steps=6), tails=True).at(np.array([0.0]))
    error = math.sqrt(math.log(2 / (0.05 * (1 - TAIL_PART))) / 1002)
    assert (low[0], high[0]) == (pytest.approx(0.4 - error), pytest.approx(0.4 + error))
