"""Intervals against the distributions they are made for."""

import math

import numpy as np
import pytest

from spectra.estimates.estimate import sampling_interval, student_interval, student_quantile


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


def test_fewer_degrees_of_freedom_leave_more_room():
    widths = [sampling_interval(0.0, 1.0, 0.0, freedom=freedom).half_width for freedom in (math.inf, 30, 3)]
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(1.96, abs=1e-3)


def test_one_sample_has_no_bounds():
    estimate = student_interval([3.0])
    assert not estimate.resolved
    assert estimate.low == -math.inf
    assert estimate.high == math.inf
