"""No digit that the interval does not know."""

import math

import numpy as np
import pytest

from spectra.estimates.digits import rounded
from spectra.estimates.estimate import Estimate


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((33.8475, 33.8474, 33.8476), ("33.85", "33.84", "33.85")),
        ((33.8475, 33.84, 33.86), ("33.85", "33.84", "33.86")),
        ((33.8475, 31.2, 36.5), ("33.8", "31.2", "36.5")),
        ((33.8475, 31.29, 36.41), ("33.8", "31.2", "36.5")),
        ((33.8475, 28.0, 40.0), ("34", "28", "40")),
        ((33.8475, 28.9, 39.1), ("34", "28", "40")),
        ((-33.8475, -39.1, -28.9), ("-34", "-40", "-28")),
        ((338.475, 200.0, 480.0), ("340", "200", "480")),
        ((338.475, 250.0, 1200.0), ("300", "200", "1200")),  # +-475
        ((1234567.0, 1200000.0, 1300000.0), ("1.23e+06", "1.2e+06", "1.3e+06")),
        ((2.0, -300.0, 304.0), ("2", "-300", "304")),
        ((0.00012345, 0.00012, 0.00013), ("0.000123", "0.00012", "0.00013")),
        ((0.0, -0.3, 0.6), ("0.0", "-0.3", "0.6")),
        ((20.0, 20.0, 20.0), ("20", "20", "20")),
        ((0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2), ("0.3", "0.3", "0.3")),  # 0.30000000000000004
        ((1e-300, -1.0, 1.0), ("1e-300", "-1", "1")),
        ((5.3, -math.inf, math.inf), ("5.3", "-inf", "inf")),
        ((-1e-12, -1e-12, 2e-12), ("-1e-12", "-1e-12", "2e-12")),
    ],
)
def test_digits(numbers, text):
    assert rounded(Estimate(*numbers)) == text


def test_a_sign_where_asked():
    assert rounded(Estimate(2.2, -3.0, 7.0), sign="+")[0] == "+2"


def test_an_interval_as_written_contains_the_interval_as_measured():
    random = np.random.default_rng(0)
    for _ in range(2000):
        low, value, high = np.sort(random.standard_normal(3)) * 10.0 ** random.uniform(-8, 8) + random.normal()
        written = [float(number) for number in rounded(Estimate(value, low, high))]
        rounding = 1e-11 * max(abs(low), abs(high))
        assert written[1] <= low + rounding
        assert written[2] >= high - rounding
        assert written[1] <= written[0] <= written[2]
        added = (written[2] - written[1]) - (high - low)  # under two units of the last digit
        assert added < max(0.29 * (high - low), 2e-3 * max(abs(low), abs(high)))
