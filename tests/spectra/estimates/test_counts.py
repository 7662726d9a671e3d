"""Counts below a threshold, on a spectrum whose congruent operator is known: T = A / |A|^(1/2), with P = |A|^(-1/4)."""

import numpy as np
import pytest

import spectra
from spectra.estimates.counts import CountBelow
from spectra.estimates.density import SpectralDensity

VALUES = np.concatenate([-np.logspace(-6, 0, 300), np.logspace(-8, 1, 700)])


@pytest.fixture(scope="module")
def density():
    return spectra.slq(spectra.DiagonalOperator(VALUES), probes=2, steps=40)


@pytest.fixture(scope="module")
def count():
    balanced = spectra.slq(spectra.DiagonalOperator(np.sign(VALUES) * np.abs(VALUES) ** 0.1), probes=2, steps=40)
    return CountBelow(0.0, balanced.measure, search_products=7, products=87, float_bits=64)


def test_the_share_is_read_from_the_narrower_of_the_two(density, count):
    both = density.with_count(count)
    assert both.negative_share() == count.share()
    assert both.negative_share().half_width < density.negative_share().half_width
    assert both.negative_share().low <= 0.3 <= both.negative_share().high
    useless = CountBelow(0.0, spectra.slq(spectra.DiagonalOperator(VALUES**3), probes=2, steps=3).measure, 0, 6, 64)
    assert density.with_count(useless).negative_share() == density.negative_share()


def test_everything_else_is_read_from_the_operator_itself(density, count):
    both = density.with_count(count)
    for name in ("trace", "rms", "lambda_max", "lambda_min", "negative_energy_share", "zero_share"):
        assert getattr(both, name)() == getattr(density, name)()
    assert both.near_zero_share(0.1) == density.near_zero_share(0.1)


def test_a_stored_count_comes_back(density, count):
    again = SpectralDensity.from_arrays(density.with_count(count).to_arrays())
    assert again.count.share() == count.share()
    assert again.count.cost() == {"steps": 40, "search_products": 7, "products": 87, "float_bits": 64}
    assert SpectralDensity.from_arrays(density.to_arrays()).count is None
    first = count.to_arrays()
    first["count_below_numbers"] = first["count_below_numbers"][:5]  # as the first files have them
    assert CountBelow.from_arrays(first).float_bits == 32


def test_a_count_of_other_eigenvalues_is_refused(density, count):
    with pytest.raises(spectra.InputError, match="got one below 1 of 1000"):
        density.with_count(CountBelow(1.0, count.measure, 0, 0, 64))
    other = spectra.slq(spectra.DiagonalOperator(VALUES[:900]), probes=2, steps=10)
    with pytest.raises(spectra.InputError, match="a count below 0 of 900 eigenvalues is expected"):
        other.with_count(count)


def test_without_known_zeros_there_are_other_eigenvalues_to_count(count):
    op = spectra.DiagonalOperator(np.append(VALUES[:-1], 0.0))
    density = spectra.slq(op, probes=2, steps=10).with_count(count)
    assert density.without_known_zeros().count is None


def test_an_unresolved_count_says_why(density):
    few = spectra.slq(spectra.DiagonalOperator(np.sign(VALUES) * np.abs(VALUES) ** 0.3), probes=1, steps=12)
    share = density.with_count(CountBelow(0.0, few.measure, 0, 12, 64)).negative_share()
    assert not share.resolved
    assert share.reason.startswith("after a change of variables, 12 Lanczos steps do not say whether")
