"""The ends of a spectrum: their values, and how far each interval extends."""

import numpy as np
import pytest
from measures import even_weights, jacobi_matrix, known_eigenvalues, measure_of, only_known, sphere_weights

from spectra.estimates.ends import ROUNDING_FACTOR, largest_eigenvalue, smallest_eigenvalue
from spectra.estimates.measure import SpectralMeasure

BULK = np.linspace(-1, 1, 300)
OUTLIERS = np.concatenate([np.linspace(-1, 1, 295), [4.0, 5.0, 9.0, -3.0, -6.0]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [5, 10, 30])
@pytest.mark.parametrize("values", [BULK, OUTLIERS], ids=["bulk", "outliers"])
def test_the_intervals_hold_the_ends(values, steps, seed):
    measure = measure_of(values, sphere_weights(300, probes=4, seed=seed), steps=steps)
    largest, smallest = largest_eigenvalue(measure), smallest_eigenvalue(measure)
    assert largest.value <= values.max() + 1e-12
    assert smallest.value >= values.min() - 1e-12
    assert largest.low <= values.max() + 1e-12 <= largest.high + 2e-12
    assert smallest.low - 2e-12 <= values.min() - 1e-12 <= smallest.high


def test_the_interval_extends_by_the_residual_or_the_distance_to_the_median_probe_vector():
    weights = sphere_weights(300, probes=3, seed=0)
    for steps in (3, 8, 14):
        ends, residuals = [], []
        for row in weights:
            alphas, betas = jacobi_matrix(OUTLIERS, row, steps)
            values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
            ends.append(values[-1])
            residuals.append(betas[-1] * abs(vectors[-1, -1]))
        best = int(np.argmax(ends))
        room = max(residuals[best], ends[best] - np.median(ends))
        estimate = largest_eigenvalue(measure_of(OUTLIERS, weights, steps=steps))
        assert estimate.value == pytest.approx(ends[best])
        assert estimate.low == estimate.value
        assert estimate.high - estimate.value == pytest.approx(room, rel=1e-6, abs=1e-12)


def test_an_outlier_seen_by_one_probe_vector_widens_the_interval():
    """Two of three Krylov spaces miss the outlier altogether."""
    weights = sphere_weights(300, probes=3, seed=1)
    weights[:2, OUTLIERS == 9.0] = 0
    estimate = largest_eigenvalue(measure_of(OUTLIERS, weights, steps=60))
    assert estimate.value == pytest.approx(9)
    assert estimate.high == pytest.approx(9 + 4, abs=1e-6)
    assert not estimate.resolved
    assert "topk" in estimate.reason


def test_rounding_and_deflation_widen_both_sides():
    measure = measure_of([-2.0, 3.0], even_weights(2), rounding_error=1e-4)
    estimate = largest_eigenvalue(measure)
    assert estimate.value - estimate.low == pytest.approx(ROUNDING_FACTOR * 1e-4)
    assert estimate.high - estimate.value == pytest.approx(ROUNDING_FACTOR * 1e-4)
    known = known_eigenvalues([-8.0], errors=[0.2])
    shifted = largest_eigenvalue(measure_of([-2.0, 3.0], even_weights(2), known=known))
    assert shifted.value - shifted.low == pytest.approx(0.2**2 / 11)
    assert shifted.high - shifted.value == pytest.approx(0.2**2 / 11)
    mirrored = smallest_eigenvalue(measure_of([2.0, -3.0], even_weights(2), known=known.negated()))
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-3, -shifted.high, -shifted.low))


def test_a_known_eigenvalue_is_within_its_error():
    known = known_eigenvalues([9.0, -7.0, 1.0], errors=[0.3, 0.1, 0.0])
    measure = measure_of([-2.0, 3.0], even_weights(2), known=known)
    largest, smallest = largest_eigenvalue(measure), smallest_eigenvalue(measure)
    assert (largest.value, largest.low, largest.high) == pytest.approx((9.0, 8.7, 9.3))
    assert (smallest.value, smallest.low, smallest.high) == pytest.approx((-7.0, -7.1, -6.9))
    exact = only_known([1.0, 4.0], errors=[0.0, 0.0])
    assert (largest_eigenvalue(exact).low, largest_eigenvalue(exact).high) == (4.0, 4.0)
    assert (smallest_eigenvalue(exact).low, smallest_eigenvalue(exact).high) == (1.0, 1.0)


def test_the_interval_covers_that_of_a_smaller_candidate():
    weights = sphere_weights(300, probes=2, seed=0)
    sampled = largest_eigenvalue(measure_of(BULK, weights, steps=3))
    between = (sampled.value + sampled.high) / 2
    estimate = largest_eigenvalue(measure_of(BULK, weights, steps=3, known=known_eigenvalues([between])))
    assert (estimate.value, estimate.low, estimate.high) == (between, between, sampled.high)


@pytest.mark.parametrize(("error", "resolved"), [(0.45, True), (0.55, False)])
def test_resolved_up_to_five_percent(error, resolved):
    estimate = largest_eigenvalue(only_known([1.0, 10.0], errors=[0.0, error]))
    assert estimate.resolved == resolved
    assert bool(estimate.reason) != resolved


@pytest.mark.parametrize("where", ["known", "sampled"])
def test_an_end_near_zero_is_measured_by_the_other_end(where):
    """An end near zero is resolved to a millionth of the spectrum's size, as 5 % of it could not be reached."""
    values, errors = [-1000.0, 1e-9], [0.0, 5e-4]
    if where == "known":
        measure = only_known(values, errors=errors)
    else:
        sampled = measure_of([values[0], -999.0], even_weights(2))
        measure = SpectralMeasure(sampled.jacobi, 2, known_eigenvalues(values[1:], errors=errors[1:]))
    assert largest_eigenvalue(measure).resolved
    assert not largest_eigenvalue(only_known([-100.0, 1e-9], errors=errors)).resolved


def test_the_smallest_eigenvalue_is_minus_the_largest_of_the_mirror():
    weights = sphere_weights(300, probes=3, seed=2)
    for steps in (4, 9):
        smallest = smallest_eigenvalue(measure_of(OUTLIERS, weights, steps=steps))
        mirrored = largest_eigenvalue(measure_of(-OUTLIERS, weights, steps=steps))
        assert smallest.value == pytest.approx(-mirrored.value)
        assert (smallest.low, smallest.high) == pytest.approx((-mirrored.high, -mirrored.low))
