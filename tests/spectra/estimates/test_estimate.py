"""Intervals against the distributions they are made for."""

import math

import numpy as np
import pytest
import scipy.stats

from spectra.estimates.estimate import (
    Estimate,
    certain,
    judged_by_size,
    negated,
    sampling_interval,
    scaled,
    square_root,
    student_interval,
    student_quantile,
    unresolved,
    with_margin,
)


@pytest.mark.parametrize(("freedom", "expected"), [(math.inf, 1.960), (9, 2.262), (1, 12.706), (0.2, 12.706)])
def test_students_quantile(freedom, expected):
    assert student_quantile(freedom) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("probes", [4, 10, 60])
def test_the_interval_of_a_skewed_mean_covers(probes):
    """Means of chi-squared numbers, whose variance 2 and skewness sqrt(8) are known."""
    samples = np.random.default_rng(probes).chisquare(1, size=(4000, probes))
    held = 0
    for row in samples:
        estimate = sampling_interval(row.mean(), math.sqrt(2 / probes), math.sqrt(8 / probes))
        held += estimate.low <= 1 <= estimate.high
    assert 0.94 < held / len(samples) < 0.99
    student = [student_interval(row) for row in samples]
    assert np.mean([e.low <= 1 <= e.high for e in student]) < held / len(samples)


def test_fewer_degrees_of_freedom_widen_the_interval():
    widths = [sampling_interval(0.0, 1.0, 0.0, freedom=freedom).half_width for freedom in (math.inf, 30, 3)]
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(1.96, abs=1e-3)


def test_one_sample_has_no_bounds():
    estimate = student_interval([3.0])
    assert not estimate.resolved
    assert estimate.low == -math.inf
    assert estimate.high == math.inf


def test_what_is_unresolved_says_so_in_text():
    assert str(ESTIMATE) == "4.0 [1.0, 9.0] (unresolved)"
    assert str(Estimate(1 / 3, 0.25, 0.5)) == "0.33 [0.25, 0.50]"
    assert float(ESTIMATE) == 4.0


def test_two_samples_have_an_interval():
    estimate = student_interval([1.0, 3.0])
    assert estimate.resolved
    assert estimate.half_width == pytest.approx(12.7062, rel=1e-4)  # t_1 times sqrt(2) / sqrt(2)


def test_students_interval_is_that_of_scipy():
    samples = [3.0, 5.0, 4.0, 9.0]
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(samples), scale=scipy.stats.sem(samples))
    estimate = student_interval(samples)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((5.25, low, high))


@pytest.mark.parametrize("skewness", [0.8, -0.8])
def test_halls_interval_reaches_further_on_one_side(skewness):
    """Both sides of g(z) = (3 / s) ((1 + s (z - s / 6))^(1/3) - 1) by hand."""
    z = 1.959964
    g = [3 / skewness * (np.cbrt(1 + skewness * (q - skewness / 6)) - 1) for q in (z, -z)]
    estimate = sampling_interval(10.0, 2.0, skewness)
    assert estimate.low == pytest.approx(min(10 - 2 * z, 10 - 2 * g[0]), abs=1e-5)
    assert estimate.high == pytest.approx(max(10 + 2 * z, 10 - 2 * g[1]), abs=1e-5)
    assert (estimate.high - 10 > 10 - estimate.low + 0.1) == (skewness > 0)


ESTIMATE = Estimate(4.0, 1.0, 9.0, False, "why", 12)


def test_a_margin_is_added_on_both_sides_and_cut():
    assert with_margin(ESTIMATE, 0.5) == Estimate(4.0, 0.5, 9.5, False, "why", 12)
    assert with_margin(ESTIMATE, 2.0, lower=0.0, upper=10.0) == Estimate(4.0, 0.0, 10.0, False, "why", 12)


def test_functions_of_an_estimate_act_on_value_and_ends():
    assert square_root(ESTIMATE) == Estimate(2.0, 1.0, 3.0, False, "why")
    assert square_root(Estimate(0.25, 0.04, 0.64)) == Estimate(0.5, 0.2, 0.8)
    assert square_root(Estimate(-1.0, -2.0, 4.0)) == Estimate(0.0, 0.0, 2.0)
    assert scaled(ESTIMATE, 2.0) == Estimate(8.0, 2.0, 18.0, False, "why")
    assert negated(ESTIMATE) == Estimate(-4.0, -9.0, -1.0, False, "why")
    assert certain(3.0, rounding=0.5) == Estimate(3.0, 2.5, 3.5)


def test_dictionaries_there_and_back():
    assert Estimate.from_dict(ESTIMATE.to_dict()) == ESTIMATE
    unbounded = Estimate.from_dict(Estimate(math.nan, -math.inf, math.inf).to_dict())
    assert math.isnan(unbounded.value)
    assert (unbounded.low, unbounded.high) == (-math.inf, math.inf)
    assert Estimate(math.nan, -math.inf, math.inf).to_dict()["low"] is None


def test_a_sum_whose_interval_holds_zero_has_no_known_sign():
    wide = judged_by_size(Estimate(1.0, -0.1, 2.1))
    assert (wide.value, wide.low, wide.high) == (1.0, -0.1, 2.1)
    assert not wide.resolved
    assert "holds zero" in wide.reason
    assert not judged_by_size(Estimate(1.0, 0.0, 1.2)).resolved
    assert judged_by_size(Estimate(0.0, 0.0, 0.0)).resolved
    assert judged_by_size(Estimate(1e-9, -1e-9, 2e-9), scale=1.0).resolved  # the terms cancel: a known zero
    assert not judged_by_size(Estimate(1e-9, -1e-9, 2e-9), scale=1e-4).resolved


def test_a_sum_whose_interval_is_longer_than_half_of_it_is_unresolved():
    for sign in (1, -1):
        ends = sorted((sign * 0.74, sign * 1.25))
        wide = judged_by_size(Estimate(sign * 1.0, *ends))
        assert wide.reason == "the interval spans 51 % of the value: use more probe vectors"
        ends = sorted((sign * 0.76, sign * 1.25))
        assert judged_by_size(Estimate(sign * 1.0, *ends)) == Estimate(sign * 1.0, *ends)
    other = Estimate(1.0, -9.0, 9.0, False, "one probe")
    assert judged_by_size(other) is other
    assert unresolved(other, "") is other


def test_a_notebook_shows_the_interval_and_why_it_is_unresolved():
    assert "[1.50, 2.50]" in Estimate(2.0, 1.5, 2.5)._repr_html_()
    assert "unresolved" not in Estimate(2.0, 1.5, 2.5)._repr_html_()
    assert "unresolved: use more" in Estimate(2.0, 1.5, 2.5, False, "use more")._repr_html_()


def test_products_are_zero_where_they_are_not_known():
    assert Estimate(2.0, 1.5, 2.5).products == 0
    assert certain(2.0).products == 0
