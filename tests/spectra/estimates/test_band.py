"""The band of the cumulative share against known curves, and its level against the distribution of the masses."""

import math

import numpy as np
import pytest
from measures import even_weights, known_eigenvalues, measure_of, only_known, sphere_weights

import spectra
from spectra.backend.errors import InputError
from spectra.estimates.band import DECADES, PER_DECADE, cumulative_band, simultaneous_error
from spectra.estimates.brackets import bracket
from spectra.estimates.estimate import Estimate, certain

VALUES = np.repeat([-2.0, -1.0, 1.0, 2.0, 3.0], 200)


def share_below(values, thresholds):
    return np.searchsorted(np.sort(values), thresholds, side="left") / len(values)


def holds(band, values):
    truth = share_below(values, band.thresholds)
    return bool(np.all((band.low <= truth) & (truth <= band.high)))


@pytest.mark.parametrize("n", [2, 7, 40, 300])
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_masses_stay_within_the_simultaneous_error(n, probes, level):
    """The distribution of the largest error over all thresholds depends on n and k alone, not on the eigenvalues."""
    rng, draws = np.random.default_rng(n), min(4000, 2_000_000 // (n * probes))
    squares = rng.normal(size=(draws, probes, n)) ** 2
    masses = (squares / squares.sum(axis=2, keepdims=True)).mean(axis=1).cumsum(axis=1)
    worst = np.abs(masses - np.arange(1, n + 1) / n).max(axis=1)
    covered = np.mean(worst <= simultaneous_error(n, probes, level))
    assert covered >= level - 3 * math.sqrt(level * (1 - level) / draws)


def test_the_simultaneous_error_is_tight_for_many_eigenvalues():
    """For a thousand eigenvalues the error nearly has the Kolmogorov-Smirnov distribution, known to SciPy."""
    from scipy.special import kolmogi

    assert simultaneous_error(1000, 3, 0.95) == pytest.approx(kolmogi(0.05) / math.sqrt(3 * 1002 / 2), rel=1e-4)
    squares = np.random.default_rng(0).normal(size=(8000, 1000)) ** 2
    masses = (squares / squares.sum(axis=1, keepdims=True)).cumsum(axis=1)
    worst = np.abs(masses - np.arange(1, 1001) / 1000).max(axis=1)
    assert np.quantile(worst, 0.95) == pytest.approx(simultaneous_error(1000, 1, 0.95), rel=0.03)


def test_the_covariance_of_the_masses_is_that_of_a_bridge():
    masses = sphere_weights(20, probes=200_000, seed=3).cumsum(axis=1)
    found = np.cov(masses[:, [4, 9, 14]].T)
    p = np.array([5, 10, 15]) / 20
    bridge = np.minimum(p[:, None], p) * (1 - np.maximum(p[:, None], p)) * 2 / 22
    assert found == pytest.approx(bridge, rel=0.03)


@pytest.mark.parametrize(("probes", "steps"), [(2, 20), (4, 60), (4, 100)])
@pytest.mark.parametrize("seed", range(4))
def test_the_band_holds_the_curve_of_a_known_spectrum(probes, steps, seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([0.01 * rng.standard_t(2.5, size=1200), np.zeros(300), [9.0, 4.0, 1.0, -2.0]])
    density = spectra.slq(spectra.DiagonalOperator(values), probes=probes, steps=steps, seed=seed)
    band = density.band()
    assert holds(band, values)
    assert band.level == 0.95
    assert np.all(np.diff(band.low) >= 0)
    assert np.all(np.diff(band.high) >= 0)
    assert np.all(np.diff(band.thresholds) > 0)
    assert np.all((band.low >= 0) & (band.low <= band.high) & (band.high <= 1))
    anywhere = np.linspace(-12, 12, 1001)
    low, high = band.at(anywhere)
    truth = share_below(values, anywhere)
    assert np.all((low <= truth) & (truth <= high))


def test_is_the_bracket_and_the_simultaneous_error_at_zero():
    values = np.linspace(-1, 2, 5000)
    measure = measure_of(values, sphere_weights(5000, probes=3, seed=1), steps=8)
    brackets = [bracket(alphas, betas, 0.0) for alphas, betas in measure.jacobi.used]
    error = math.sqrt(math.log(2 / 0.1) / (3 * 5002))
    band = cumulative_band(measure, level=0.9)
    (low,), (high,) = band.at(np.zeros(1))
    assert low == pytest.approx(np.mean([one.below for one in brackets]) - error, abs=1e-6)
    assert high == pytest.approx(np.mean([one.below + one.at for one in brackets]) + error, abs=1e-6)


def test_exact_masses_leave_only_the_simultaneous_error():
    band = cumulative_band(measure_of(VALUES, even_weights(1000), steps=6), level=0.95)
    error = math.sqrt(math.log(40) / 1002)
    low, high = band.at(np.array([0.0, 1.5]))
    assert low == pytest.approx([0.4 - error, 0.6 - error])
    assert high == pytest.approx([0.4 + error, 0.6 + error])


def test_known_eigenvalues_enter_exactly():
    """1,000 zeros and an outlier beside 1,000 eigenvalues that are seen: only the latter have an error."""
    known = known_eigenvalues([-9.0, 0.0], counts=[1, 1000])
    band = cumulative_band(measure_of(VALUES, even_weights(1000), steps=6, known=known))
    error = math.sqrt(math.log(40) / 1002) * 1000 / 2001
    low, high = band.at(np.array([-8.9, 0.0, 1e-9]))
    assert high[0] == pytest.approx(1 / 2001 + error)
    assert low[0] == pytest.approx(1 / 2001)
    assert low[1:] == pytest.approx(np.array([401, 1401]) / 2001 - error)
    assert high[1:] == pytest.approx(np.array([401, 1401]) / 2001 + error)


def test_an_exact_spectrum_has_no_width_but_where_an_eigenvalue_has_an_error():
    values = np.array([-1.0, 0.0, 0.0, 2.0, 5.0])
    band = spectra.SpectralDensity.from_eigenvalues(values).band()
    anywhere = np.array([-2.0, -1.0, -0.5, 0.0, 1e-12, 1.0, 2.0, 3.0, 5.0, 9.0])
    low, high = band.at(anywhere)
    assert np.array_equal(high[:-1], share_below(values, anywhere)[:-1])
    assert np.array_equal(low, share_below(values, anywhere))
    low, high = cumulative_band(only_known([-1.0, 1.0], counts=[3, 5], errors=[0.5, 0.0])).at(np.array([-1.6, -1, 0]))
    assert (low.tolist(), high.tolist()) == ([0, 0, 0.375], [0, 0.375, 0.375])


def test_an_error_that_reaches_across_a_threshold_leaves_both_counts_possible():
    known = only_known([-1.0, 1.0], counts=[3, 5], errors=[0.5, 0.0])
    band = cumulative_band(known, known={-1.2: Estimate(0.2, 0.1, 0.3)})
    low, high = band.at(np.array([-1.6, -1.2, -1.1, -0.4]))
    assert (low.tolist(), high.tolist()) == ([0, 0.1, 0.1, 0.375], [0, 0.3, 0.375, 0.375])


def test_thresholds_lie_at_the_same_number_a_decade():
    band = cumulative_band(measure_of(VALUES, even_weights(1000), steps=6))
    sizes = 3.0 * 10.0 ** np.arange(-DECADES, 0.5 / PER_DECADE, 1 / PER_DECADE)
    assert len(sizes) == DECADES * PER_DECADE + 1
    for wanted in (-sizes, sizes, [0.0]):
        nearest = band.thresholds[np.abs(band.thresholds[:, None] - wanted).argmin(axis=0)]
        np.testing.assert_allclose(nearest, wanted, rtol=1e-9)


def test_rounding_moves_eigenvalues_across_a_threshold():
    measure = measure_of(VALUES, even_weights(1000), steps=6, rounding_error=0.3)
    error = math.sqrt(math.log(40) / 1002)
    low, high = cumulative_band(measure).at(np.array([-0.8, -1.2, 0.0]))
    assert low == pytest.approx(np.array([0.2, 0.2, 0.4]) - error)
    assert high == pytest.approx(np.array([0.4, 0.4, 0.4]) + error)


def test_an_interval_known_from_elsewhere_tightens_the_band_on_both_sides():
    values = np.linspace(-1, 2, 3001)
    measure = measure_of(values, sphere_weights(3001, probes=2, seed=5), steps=6)
    plain, cut = cumulative_band(measure), cumulative_band(measure, known={0.0: Estimate(0.333, 0.32, 0.35)})
    assert plain.at(np.zeros(1))[1] - plain.at(np.zeros(1))[0] > 0.1
    assert [float(end[0]) for end in cut.at(np.zeros(1))] == [0.32, 0.35]
    assert np.all(cut.high[cut.thresholds <= 0] <= 0.35)
    assert np.all(cut.low[cut.thresholds >= 0] >= 0.32)
    assert holds(cut, values)
    assert cut.level == pytest.approx(0.9)
    assert cumulative_band(measure, known={0.0: certain(1000 / 3001)}).level == 0.95


def test_an_interval_that_the_band_excludes_is_refused():
    measure = measure_of(VALUES, even_weights(1000), steps=6)
    with pytest.raises(InputError, match=r"share below 0 that meets the band, .* got \[0.7, 0.8\]: measure both"):
        cumulative_band(measure, known={0.0: Estimate(0.75, 0.7, 0.8)})
    with pytest.raises(InputError, match="got \\[nan, nan\\]"):
        cumulative_band(measure, known={0.0: certain(math.nan)})
    with pytest.raises(InputError, match="finite thresholds are expected in known=, got inf"):
        cumulative_band(measure, known={math.inf: certain(1.0)})


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(InputError, match="a level between 0 and 1 is expected"):
        cumulative_band(measure_of(VALUES, even_weights(1000), steps=6), level=level)


def test_the_band_has_the_reason_of_an_unverified_operator():
    from spectra.estimates.origin import Origin

    density = spectra.SpectralDensity.from_eigenvalues(VALUES)
    assert density.band().reason == ""
    assert density.with_origin(Origin(unverified="not symmetric")).band().reason == "not symmetric"
