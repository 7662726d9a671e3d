"""The threshold beyond which signs are known, on known spectra."""

import math
import re

import numpy as np
import pytest
from measures import even_weights, measure_of, only_known

import spectra
from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.estimates.origin import Origin
from spectra.estimates.shares import share_inside
from spectra.estimates.signs import DecidedSigns, _half_widths, decided_signs, with_decided_signs


def heavy_tailed(seed, n=2000):
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    values = 0.003 * rng.standard_t(2.5, size=n) + 6e-4
    values[:8] = [27.0, 9.0, 3.0, 1.0, 0.3, 0.1, -8.0, -1.0]
    return values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("half_width", [0.03, 0.05])
def test_both_shares_are_known_at_the_threshold_and_not_below_it(seed, half_width):
    values = heavy_tailed(seed)
    density = spectra.slq(spectra.DiagonalOperator(values), probes=4, steps=60, seed=seed)
    assert not density.negative_share().resolved
    found = density.decided_signs(half_width)
    assert 0 < found.beyond < 0.1
    assert max(found.below.half_width, found.above.half_width) <= half_width
    assert found.below.low <= np.mean(values < -found.beyond) <= found.below.high
    assert found.above.low <= np.mean(values > found.beyond) <= found.above.high
    nearer = [
        share_inside(density.measure, low, high)
        for low, high in ((-math.inf, -0.7 * found.beyond), (0.7 * found.beyond, math.inf))
    ]
    assert max(share.half_width for share in nearer) > half_width


def test_the_threshold_is_zero_where_both_shares_are_known():
    density = spectra.slq(spectra.DiagonalOperator(np.linspace(-1, 3, 5000)), probes=2, steps=120)
    found = density.decided_signs()
    assert found.beyond == 0
    assert (found.below.value, found.above.value) == pytest.approx((0.25, 0.75), abs=0.02)
    assert found.below == density.negative_share()


def test_errors_of_known_eigenvalues_are_the_threshold():
    """Of 100 eigenvalues 30 may lie on either side of 0; those at .1 +- .2 reach a little beyond .3 in float64."""
    measure = only_known([-1.0, -0.05, 0.1, 2.0], counts=[20, 15, 15, 50], errors=[0.2, 0.2, 0.2, 0.2])
    found = decided_signs(measure)
    assert found.beyond == 0.31
    assert (found.below.low, found.below.high) == pytest.approx((0.2, 0.2))
    assert (found.above.low, found.above.high) == pytest.approx((0.5, 0.5))


def test_there_is_no_threshold_where_too_few_signs_are_known():
    measure = measure_of([-2.0, -1.0, 1.0, 2.0], even_weights(4), steps=2)
    found = decided_signs(measure, half_width=1e-6)
    assert math.isinf(found.beyond) or found.beyond >= 2
    share = share_inside(only_known([-0.1, 0.1], counts=[5, 5], errors=[1.0, 1.0]), -math.inf, 0)
    assert with_decided_signs(share, only_known([-0.1, 0.1], counts=[5, 5], errors=[1.0, 1.0])).reason == share.reason


def test_the_reason_of_an_unresolved_negative_share_says_it():
    values = heavy_tailed(1)
    density = spectra.slq(spectra.DiagonalOperator(values), probes=4, steps=60, seed=1)
    share = density.negative_share()
    found = density.decided_signs()
    words = re.search(
        r"steps, or deflate; beyond \+-(\S+): (\S+) % below, (\S+) % above; the rest undecided$", share.reason
    )
    assert words is not None, share.reason
    assert float(words[1]) == found.beyond
    assert float(words[2]) == pytest.approx(100 * found.below.value, rel=0.05)
    assert float(words[3]) == pytest.approx(100 * found.above.value, rel=0.05)
    plain = share_inside(density.measure, -math.inf, 0)
    assert (share.value, share.low, share.high) == (plain.value, plain.low, plain.high)
    unverified = density.with_origin(Origin(unverified="not symmetric"))
    assert unverified.negative_share().reason == "not symmetric"
    assert unverified.decided_signs().below.reason == "not symmetric"


@pytest.mark.parametrize("half_width", [0.0, -1.0, math.nan])
def test_a_half_width_that_is_not_positive_is_refused(half_width):
    with pytest.raises(InputError, match="the half-width must be positive"):
        spectra.SpectralDensity.from_eigenvalues(np.ones(3)).decided_signs(half_width)


def test_of_zeros_alone_every_sign_is_known():
    found = spectra.SpectralDensity.from_eigenvalues(np.zeros(5)).decided_signs()
    assert (found.beyond, found.below.value, found.above.value) == (0, 0, 0)
    sampled = spectra.slq(spectra.DiagonalOperator(np.zeros(500)), probes=2, steps=5).decided_signs()
    assert (sampled.beyond, sampled.below.value, sampled.above.value) == (0, 0, 0)


@pytest.mark.parametrize("radius", [1.0, 0.5, 7.3])
def test_thresholds_are_numbers_of_two_digits_up_to_the_largest_size(radius):
    measure = only_known([-radius, 0.01 * radius], counts=[50, 50], errors=[0.0, 0.2 * radius])
    found = decided_signs(measure)
    reach = 0.21 * radius  # from which the second eigenvalue, .01 +- .2, is within the bounds
    assert reach <= found.beyond <= 1.1 * reach
    assert float(f"{found.beyond:.1e}") == found.beyond


@pytest.mark.parametrize(
    ("share", "text"), [(0.2, "20 %"), (0.1, "10 %"), (0.0996, "10 %"), (0.0123, "1.2 %"), (1.0, "100 %")]
)
def test_shares_are_written_in_percent_with_two_digits(share, text):
    found = DecidedSigns(0.31, Estimate(share, share, share), Estimate(0.5, 0.4, 0.6))
    assert str(found) == f"beyond +-0.31: {text} below, 50 % above; the rest undecided"


def test_half_widths_at_all_thresholds_are_those_of_the_shares():
    """Of few eigenvalues, which the probe vectors see equally."""
    measure = measure_of(np.repeat([-1.0, 1.0], 5), even_weights(10, probes=2), steps=3)
    share = share_inside(measure, -math.inf, 0.0)
    assert 0.2 < share.half_width < 0.5
    assert _half_widths(measure, np.zeros(1)) == pytest.approx([share.half_width])
