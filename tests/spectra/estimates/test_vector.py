"""Student's interval of each entry of a vector, against the sample variance and over many draws."""

import numpy as np
import pytest
from scipy.stats import t as student

from spectra.estimates.estimate import student_interval
from spectra.estimates.vector import VectorEstimate, vector_interval


def test_each_entry_gets_the_interval_that_its_samples_get_alone():
    samples = np.random.default_rng(0).normal(size=(7, 5)) * [1, 2, 3, 4, 5] + 10
    found = vector_interval(samples.sum(0), (samples**2).sum(0), 7)
    half = student.ppf(0.975, 6) * samples.std(0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(found.value, samples.mean(0))
    np.testing.assert_allclose(found.high - found.value, half, rtol=1e-9)
    np.testing.assert_allclose(found.value - found.low, half, rtol=1e-9)
    for entry, column in enumerate(samples.T):
        alone = student_interval(column)
        assert (found.low[entry], found.high[entry]) == pytest.approx((alone.low, alone.high))
    assert len(found) == 5
    wider = vector_interval(samples.sum(0), (samples**2).sum(0), 7, confidence=0.99)
    assert (wider.high - wider.low > 1.3 * (found.high - found.low)).all()


def test_samples_that_are_alike_leave_no_interval():
    found = vector_interval(np.array([0.3]) * 3, np.array([0.09]) * 3, 3)
    assert found.low[0] == pytest.approx(0.3, abs=1e-7)
    assert found.high[0] >= found.low[0]


def test_a_reason_makes_it_unresolved():
    ends = np.zeros(2)
    assert VectorEstimate(ends, ends, ends).resolved
    assert not VectorEstimate(ends, ends, ends, reason="products are wrong").resolved
