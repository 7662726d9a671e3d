"""Numbers are written with the digits that their interval knows, and intervals contain the measured ones."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.estimates.digits import rounded


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((33.8475, 33.8474, 33.8476), ("33.85", "33.84", "33.85")),
        ((33.8475, 33.84, 33.86), ("33.85", "33.84", "33.86")),
        ((33.8475, 31.2, 36.5), ("33.8", "31.2", "36.5")),
        ((33.8475, 31.29, 36.41), ("33.8", "31.2", "36.5")),
        ((33.8475, 28.0, 40.0), ("33.8", "28.0", "40.0")),
        ((33.8475, 28.92, 39.11), ("33.8", "28.9", "39.2")),
        ((-33.8475, -39.11, -28.92), ("-33.8", "-39.2", "-28.9")),
        ((338.475, 200.0, 480.0), ("340", "200", "480")),
        ((338.475, 251.0, 1199.0), ("340", "250", "1200")),  # +-475
        ((1234567.0, 1200000.0, 1300000.0), ("1.235e+06", "1.2e+06", "1.3e+06")),
        ((2.0, -300.0, 304.0), ("2", "-300", "310")),
        ((0.00012345, 0.00012, 0.00013), ("0.0001234", "0.00012", "0.00013")),
        ((0.0, -0.3, 0.6), ("0.00", "-0.30", "0.60")),
        ((20.0, 20.0, 20.0), ("20", "20", "20")),
        ((0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2), ("0.3", "0.3", "0.3")),  # 0.30000000000000004
        ((1e-300, -1.0, 1.0), ("1e-300", "-1.0", "1.0")),
        ((0.0012, -53.21, 53.24), ("0.001", "-54", "54")),
        ((5.3, -math.inf, math.inf), ("5.3", "-inf", "inf")),
        ((-1e-12, -1e-12, 2e-12), ("-1e-12", "-1e-12", "2e-12")),
    ],
)
def test_digits(numbers, text):
    assert rounded(*numbers) == text


def test_a_sign_where_asked():
    assert rounded(2.2, -3.0, 7.0, sign="+")[0] == "+2.2"


FLOATS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


@settings(max_examples=1000, derandomize=True, database=None, deadline=None)
@given(st.tuples(FLOATS, FLOATS, FLOATS).map(sorted), st.floats(-20, 1))
def test_an_interval_as_written_contains_the_interval_as_measured(numbers, length):
    low, value, high = numbers
    if abs(high - low) < 1e90:  # intervals far shorter than the number as well
        low, high = value - abs(value) * 10.0**length, value + abs(value) * 10.0**length
    written = [float(number) for number in rounded(value, low, high)]
    assert written[1] <= low + 1e-11 * abs(low)
    assert written[2] >= high - 1e-11 * abs(high)
    assert written[1] <= written[0] <= written[2]


def test_an_interval_as_written_is_hardly_longer():
    """By under two units of the last digit: a tenth of an interval, or of the fourth digit."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        low, value, high = np.sort(random.standard_normal(3)) * 10.0 ** random.uniform(-8, 8) + random.normal()
        written = [float(number) for number in rounded(value, low, high)]
        added = (written[2] - written[1]) - (high - low)
        assert added < max(0.1 * (high - low), 2e-3 * max(abs(low), abs(high)))
