"""Counted shares against closed forms: probe vectors that see every eigenvalue equally have exact brackets."""

import math

import numpy as np
import pytest
from measures import even_weights, known_eigenvalues, measure_of, only_known, sphere_weights
from scipy.stats import norm

from spectra.estimates.brackets import bracket
from spectra.estimates.shares import _atom_at, share_inside

Z = norm.ppf(0.975)
VALUES = np.repeat([-2.0, -1.0, 1.0, 2.0, 3.0], 200)


def exactly_seen(*, probes=1, **options):
    return measure_of(VALUES, even_weights(len(VALUES), probes=probes), steps=6, **options)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize(("low", "high", "share"), [(-np.inf, 0, 0.4), (-1.5, 2.5, 0.6), (2.5, np.inf, 0.2)])
def test_the_sampling_error_is_that_of_a_share(low, high, share, probes):
    estimate = share_inside(exactly_seen(probes=probes), low, high)
    assert estimate.value == pytest.approx(share, abs=1e-12)
    expected = Z * math.sqrt(2 * share * (1 - share) / (1002 * probes))
    assert estimate.half_width == pytest.approx(expected, rel=1e-6)
    assert estimate.high - estimate.value == pytest.approx(expected, rel=1e-6)


def test_the_sampling_error_is_that_of_random_unit_vectors():
    draws = sphere_weights(1000, probes=4000, seed=0)[:, VALUES < 0].sum(axis=1)
    assert share_inside(exactly_seen(), -np.inf, 0).half_width == pytest.approx(Z * draws.std(), rel=0.04)


def test_all_eigenvalues_are_inside_the_whole_line():
    estimate = share_inside(exactly_seen(), -np.inf, np.inf)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("low", "high", "share"), [(-np.inf, 1.0, 0.4), (-2.0, 1.0, 0.2), (-2.0, np.inf, 0.8)])
def test_eigenvalues_at_a_bound_are_outside(low, high, share):
    estimate = share_inside(exactly_seen(), low, high)
    assert estimate.value == pytest.approx(share, abs=1e-9)
    assert estimate.low <= share <= estimate.high


def test_known_eigenvalues_join_with_their_counts():
    known = known_eigenvalues([-9.0, 0.0, 0.5], counts=[50, 1000, 950])
    estimate = share_inside(exactly_seen(known=known), -np.inf, 0)
    assert estimate.value == pytest.approx((400 + 50) / 3000)
    expected = Z * math.sqrt(2 * 0.24 / 1002) / 3
    assert estimate.half_width == pytest.approx(expected, rel=1e-6)


def test_a_known_eigenvalue_whose_error_reaches_across_a_bound_widens_the_interval():
    values, errors = [-1.0, -0.1, 0.1, 1.0], [0.2, 0.2, 0.2, 0.2]
    estimate = share_inside(only_known(values, counts=[10, 3, 5, 82], errors=errors), -np.inf, 0.0)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.13, 0.10, 0.18))
    inside = share_inside(only_known(values, counts=[10, 3, 5, 82], errors=errors), -0.5, 0.15)
    assert (inside.value, inside.low, inside.high) == pytest.approx((0.08, 0.03, 0.08))
    exact_zero = share_inside(only_known([-1.0, 0.0], counts=[1, 9]), -np.inf, 0.0)
    assert (exact_zero.value, exact_zero.low, exact_zero.high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_interval_of_known_eigenvalues_that_is_too_wide_is_unresolved():
    estimate = share_inside(only_known([-0.1, 1.0], counts=[3, 5], errors=[0.2, 0.0]), -np.inf, 0.0)
    assert not estimate.resolved
    assert "rounding" in estimate.reason


@pytest.mark.parametrize(("bound", "shift", "room"), [(-0.9, 0.05, 0), (-0.9, 0.15, 0.2), (-1.1, 0.15, -0.2)])
def test_rounding_moves_the_bound_both_ways(bound, shift, room):
    """An eigenvalue within the rounding error of the bound may lie on its other side."""
    exact, moved = (share_inside(exactly_seen(rounding_error=error), -np.inf, bound) for error in (0.0, shift))
    slack = 0.02  # the sampling error depends on the widest share that is possible
    assert moved.value == pytest.approx(exact.value, abs=1e-9)
    assert exact.low - moved.low == pytest.approx(max(room, 0), abs=slack)
    assert moved.high - exact.high == pytest.approx(max(-room, 0), abs=slack)


def test_deflation_with_inexact_vectors_moves_the_bound_as_rounding_does():
    """A residual r of a deflated eigenvalue theta moves the others near zero by r^2 / theta."""
    for residual, room in ((0.9, 0.0), (1.1, 0.2)):
        known = known_eigenvalues([10.0], errors=[residual])
        estimate = share_inside(exactly_seen(known=known), -np.inf, -0.9)
        assert estimate.value - estimate.low == pytest.approx(room, abs=0.06), residual


def test_the_bracket_is_averaged_over_probe_vectors():
    """Few steps: the interval is the mean of the brackets, and the sampling error on top."""
    values, weights = np.linspace(-1, 1, 5000), sphere_weights(5000, probes=3, seed=1)
    measure = measure_of(values, weights, steps=8)
    brackets = [bracket(alphas, betas, 0.3) for alphas, betas in measure.jacobi.used]
    low, high = np.mean([b.below for b in brackets]), np.mean([b.below + b.at for b in brackets])
    estimate = share_inside(measure, -np.inf, 0.3)
    sampling = Z * math.sqrt(2 * max(low, 0.5) * (1 - max(low, 0.5)) / (5002 * 3))
    assert estimate.low == pytest.approx(low - sampling)
    assert estimate.high == pytest.approx(high + sampling)
    assert low < estimate.value < high
    inside = share_inside(measure, -0.4, 0.3)
    left = [bracket(alphas, betas, -0.4) for alphas, betas in measure.jacobi.used]
    left_low, left_high = np.mean([b.below for b in left]), np.mean([b.below + b.at for b in left])
    widest = min(max(0.5, low - left_high), high - left_low)
    sampling = Z * math.sqrt(2 * widest * (1 - widest) / (5002 * 3))
    assert (inside.low, inside.high) == pytest.approx((low - left_high - sampling, high - left_low + sampling))


def test_the_reason_names_what_makes_the_interval_wide():
    short = share_inside(measure_of(np.linspace(-1, 1, 5000), even_weights(5000), steps=4), -np.inf, 0.3)
    assert not short.resolved
    assert short.reason.startswith("4 Lanczos steps do not say whether")
    few = share_inside(measure_of([-2.0, -1.0, 1.0, 2.0], even_weights(4)), -np.inf, 0)
    assert not few.resolved
    assert few.reason.startswith("the sampling error of 1 probe vectors is +-")


@pytest.mark.parametrize("zeros", [0, 1200])
def test_mass_at_the_bound_is_left_out_of_the_value(zeros):
    """With 1200 zeros among 4000 eigenvalues the middle of the bracket would be .15 too large."""
    values = np.concatenate([np.linspace(-1, 2, 4000 - zeros), np.zeros(zeros)])
    measure = measure_of(values, even_weights(4000), steps=40)
    below, above = share_inside(measure, -np.inf, 0.0), share_inside(measure, 0.0, np.inf)
    assert below.value == pytest.approx(np.mean(values < 0), abs=0.01)
    assert above.value == pytest.approx(np.mean(values > 0), abs=0.01)
    for estimate, truth in ((below, np.mean(values < 0)), (above, np.mean(values > 0))):
        assert estimate.low <= truth <= estimate.high


def test_the_mass_at_the_bound_is_the_limit_of_its_geometric_series():
    """The weight of the Radau node at 0 is 1 / sum_j p_j(0)^2: here 0.1 + 0.8 / 4^k at 1, 2 and 4 Lanczos steps."""
    sums = [1 / (0.1 + 0.8 / 4**k) for k in range(3)]
    last = (sums[2] - sums[1]) / 2
    p = np.sqrt([1.0, sums[0] - 1, sums[1] - sums[0], last, last])
    alphas = -(p[1:] + np.array([0.0, *p[:3]])) / p[:4]  # p_{j+1} = -alpha_j p_j - p_{j-1} at 0
    here = bracket(alphas, np.ones(4), 0.0)
    assert here.at == pytest.approx(0.15)
    assert _atom_at(alphas, np.ones(4), 0.0, here) == pytest.approx(0.1)
