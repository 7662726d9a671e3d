"""Sums over eigenvalues and their ratios, against closed forms and the measures of random unit vectors."""

import math

import numpy as np
import pytest
from measures import even_weights, known_eigenvalues, measure_of, only_known, sphere_weights
from scipy.stats import norm
from scipy.stats import t as student

import spectra
from spectra.estimates import moments

Z = norm.ppf(0.975)
SYMMETRIC = np.repeat([-3.0, -1.0, 1.0, 3.0], 50)  # whose sum is not skewed


def test_the_interval_of_a_sum_follows_from_the_variance_of_the_eigenvalues():
    """Var(n v . A v) = 2 n^2 Var(lambda) / (n + 2) for v uniform on the sphere."""
    n = len(SYMMETRIC)
    for probes in (1, 5):
        estimate = moments.sum_over_eigenvalues(
            lambda x: x + 2, measure_of(SYMMETRIC, even_weights(n, probes=probes)), relative_rounding_error=0
        )
        assert estimate.value == pytest.approx(2 * n)
        assert estimate.half_width == pytest.approx(Z * math.sqrt(2 * n**2 * 5 / (n + 2) / probes), rel=1e-9)
        assert estimate.high - estimate.value == pytest.approx(estimate.value - estimate.low, rel=1e-6)


def test_the_variance_and_the_skewness_are_those_of_random_unit_vectors():
    """A few large eigenvalues: both against 200,000 draws."""
    values = np.array([5.0, 2.0, -1.0, *([0.1] * 17)])
    draws = 20 * sphere_weights(20, probes=200_000, seed=0) @ values
    mean, error, skewness, _ = moments._mean_over_probes(lambda x: 20 * x, measure_of(values, even_weights(20)))
    assert mean == pytest.approx(values.sum())
    assert error == pytest.approx(draws.std(), rel=0.01)
    assert skewness == pytest.approx(((draws - draws.mean()) ** 3).mean() / draws.std() ** 3, rel=0.05)
    four = moments._mean_over_probes(lambda x: 20 * x, measure_of(values, even_weights(20, probes=4)))
    assert four[1:3] == pytest.approx((error / 2, skewness / 2))


@pytest.mark.parametrize("probes", [1, 4])
def test_a_sum_of_both_signs_uses_students_quantile(probes):
    n = len(SYMMETRIC)
    freedom = probes * n * 5**2 / 41  # mean squared eigenvalue 5, mean fourth power 41
    measure = measure_of(SYMMETRIC, even_weights(n, probes=probes))
    plain, both = (moments.sum_over_eigenvalues(lambda x: x, measure, both_signs=flag) for flag in (False, True))
    assert both.value == plain.value
    assert both.half_width / plain.half_width == pytest.approx(student.ppf(0.975, freedom) / Z, rel=1e-9)


def test_at_least_three_degrees_of_freedom_are_assumed():
    values = np.array([100.0, *([0.0] * 500)])
    measure = measure_of(values, even_weights(501))
    *_, freedom = moments._mean_over_probes(lambda x: x, measure)
    assert freedom == 3.0


def test_known_eigenvalues_are_added_exactly():
    n, known = len(SYMMETRIC), known_eigenvalues([40.0, -7.0, 0.0], counts=[2, 1, 90])
    alone = moments.sum_over_eigenvalues(lambda x: x, measure_of(SYMMETRIC, even_weights(n)))
    both = moments.sum_over_eigenvalues(lambda x: x, measure_of(SYMMETRIC, even_weights(n), known=known))
    assert both.value - alone.value == pytest.approx(73)
    assert both.half_width == pytest.approx(alone.half_width, rel=1e-9)
    certain = moments.sum_over_eigenvalues(np.square, only_known([40.0, -7.0], [2, 1]), relative_rounding_error=0)
    assert (certain.value, certain.low, certain.high) == (3249.0, 3249.0, 3249.0)


def test_the_rounding_error_of_a_sum_is_relative_to_its_terms():
    n, known = len(SYMMETRIC), known_eigenvalues([40.0, -7.0], counts=[2, 1])
    measure = measure_of(SYMMETRIC, even_weights(n), known=known)
    exact, rounded = (
        moments.sum_over_eigenvalues(lambda x: x, measure, relative_rounding_error=error) for error in (0.0, 1e-3)
    )
    size = np.abs(SYMMETRIC).sum() + 87
    assert rounded.high - exact.high == pytest.approx(1e-3 * size)
    assert exact.low - rounded.low == pytest.approx(1e-3 * size)
    alone = moments.sum_over_eigenvalues(lambda x: x, only_known([40.0, -7.0], [2, 1]), relative_rounding_error=1e-3)
    assert alone.half_width == pytest.approx(0.087)


@pytest.mark.parametrize("few", [True, False])
def test_sums_of_both_signs_of_a_few_eigenvalues_have_wider_intervals(few):
    eigenvalues = np.concatenate([[3.0, -2.0, 1.0], np.full(997, 1e-3)]) if few else np.linspace(-1, 1, 1000)
    measure = measure_of(eigenvalues, sphere_weights(1000, probes=4, seed=0))
    plain, wider = (
        moments.sum_over_eigenvalues(lambda x: x, measure, both_signs=both_signs) for both_signs in (False, True)
    )
    assert wider.value == plain.value
    assert wider.half_width == pytest.approx(plain.half_width, rel=1e-2) or few
    assert wider.half_width > 1.1 * plain.half_width or not few


def test_ratios_of_a_few_eigenvalues_are_covered():
    """Twelve outliers make up the energy, as after deflating some of them."""
    values = np.concatenate([np.geomspace(0.3, 3, 12) * np.where(np.arange(12) % 4 == 3, -1, 1), np.full(800, 5e-3)])
    truth = (values[values < 0] ** 2).sum() / (values**2).sum()
    held = 0
    for seed in range(400):
        measure = measure_of(values, sphere_weights(len(values), probes=4, seed=seed))
        ratio = moments.ratio_of_sums(moments.negative_power(2), moments.absolute_power(2), measure)
        held += ratio.low <= truth <= ratio.high
    print("covered", held)
    assert held >= 0.93 * 400


def test_a_ratio_ends_where_the_difference_may_be_zero():
    measure = measure_of(SYMMETRIC, sphere_weights(len(SYMMETRIC), probes=3, seed=1), known=known_eigenvalues([-2.0]))
    part, whole = moments.negative_power(1), moments.absolute_power(1)
    ratio = moments.ratio_of_sums(part, whole, measure)
    assert ratio.value == moments.ratio_value(part, whole, measure)
    assert 0 < ratio.low < ratio.value < ratio.high < 1

    def difference(r):
        return moments.sum_over_eigenvalues(lambda x: part(x) - r * whole(x), measure, both_signs=True)

    assert difference(ratio.low).low == pytest.approx(0, abs=1e-9)
    assert difference(ratio.high).high == pytest.approx(0, abs=1e-9)


def test_a_ratio_of_nothing_is_unresolved():
    estimate = moments.ratio_of_sums(moments.negative_power(2), np.square, only_known([0.0, 0.0]))
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert not estimate.resolved
    assert "zero" in estimate.reason


def test_a_ratio_of_known_eigenvalues_is_exact():
    estimate = moments.ratio_of_sums(moments.negative_power(2), np.square, only_known([-1.0, 2.0], [4, 1]))
    assert estimate.value == 0.5
    assert 0 < estimate.half_width < 1e-11


@pytest.mark.parametrize("power", [1, 2])
def test_the_interval_of_a_negative_part_covers_what_more_steps_change(power):
    values = np.random.default_rng(3).normal(size=400) + 0.5
    weights = sphere_weights(400, probes=6, seed=2)
    part, whole = moments.negative_power(power), moments.absolute_power(power)
    quarter, half, full = (
        moments.ratio_value(part, whole, measure_of(values, weights, steps=steps)) for steps in (3, 6, 12)
    )
    last, before = abs(full - half), abs(half - quarter)
    ratio = np.clip(last / before, 1 / 8, 1 / 2)
    margin = last * (ratio + ratio**2 / (1 - ratio))  # last * (ratio + ratio^2 + ratio^3 + ...)
    measure = measure_of(values, weights, steps=12)
    plain, estimate = moments.ratio_of_sums(part, whole, measure), moments.negative_part_share(measure, power)
    assert margin > 1e-6
    assert estimate.value == plain.value == pytest.approx(full)
    assert estimate.high - plain.high == pytest.approx(margin, rel=1e-6)
    assert plain.low - estimate.low == pytest.approx(margin, rel=1e-6)
    truth = whole(values[values < 0]).sum() / whole(values).sum()
    assert estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ((0.5, 0.3, 0.2), 0.1),  # changes halve: as much again is left
        ((0.5, 0.3, 0.25), 0.05 / 3),  # changes shrink by 4
        ((0.5, 0.3, 0.299), 0.001 / 7),  # by 200, taken for 8
        ((0.5, 0.4, 0.1), 0.3),  # changes grow: taken for halving
        ((0.3, 0.3, 0.2), 0.1),
        ((0.3, 0.3, 0.3), 0.0),
    ],
)
def test_the_distance_to_the_limit_of_a_sequence(sequence, expected):
    assert moments._distance_to_limit(*sequence) == pytest.approx(expected)


def test_bisection_ends_outside_the_edge():
    edge = moments.bisect_to_edge(lambda x: x <= 0.3, 0.1, 1.0)
    assert 0.3 < edge < 0.3 + 1e-12
    assert moments.bisect_to_edge(lambda x: x >= 0.3, 0.9, 0.0) == pytest.approx(0.3)
    assert moments.bisect_to_edge(lambda x: True, 0.1, 1.0) == 1.0


def test_a_ratio_is_resolved_to_each_side():
    """If the share is small by chance, its standard error is small too; only the upper side shows it."""
    values = np.concatenate([np.geomspace(1, 10, 30), -np.geomspace(1, 6, 12), np.linspace(-0.1, 0.1, 900)])
    lopsided = 0
    for seed in range(40):
        share = spectra.slq(spectra.DiagonalOperator(values), probes=10, steps=60, seed=seed).negative_energy_share()
        above = share.high - share.value
        assert share.resolved == (max(above, share.value - share.low) <= 0.05)
        lopsided += share.half_width <= 0.05 < above
    print("seeds = 0 to 39, lopsided", lopsided)
    assert lopsided
