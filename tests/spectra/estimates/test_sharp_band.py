"""The band of figures, with a count of the negative eigenvalues after a change of variables."""

import numpy as np
import pytest
import tiny_models
from torch import nn

import spectra
from spectra.backend.errors import InputError
from spectra.estimates.sharp_band import sharp_band


@pytest.fixture(scope="module")
def model():
    return spectra.HessianOperator(
        tiny_models.mlp(inputs=6, hidden=12), tiny_models.regression([20], inputs=6), loss=nn.functional.mse_loss
    )


def test_a_count_below_zero_narrows_the_band_and_it_still_holds_the_curve(model):
    values = np.linalg.eigvalsh(model.to_dense().numpy())
    density = spectra.slq(model, probes=2, steps=12, seed=3)
    found = spectra.count_below(model, half_width=0.05, seed=1)
    assert found is not None
    counted = density.with_count(found[0])
    points = np.linspace(values[0], values[-1], 200)
    plain, sharp = (sharp_band(one, thresholds=points) for one in (density, counted))
    assert sharp.level == 0.95
    for band in (plain, sharp):
        truth = np.searchsorted(values, band.thresholds) / len(values)
        assert np.all((band.low <= truth + 1e-9) & (truth <= band.high + 1e-9))
    (before,), (after,) = (np.subtract(*band.at(np.zeros(1))[::-1]) for band in (plain, sharp))
    assert after < before


def test_a_count_that_the_band_excludes_is_left_out(model):
    density = spectra.slq(model, probes=2, steps=12, seed=3)
    other = spectra.slq(spectra.DiagonalOperator(-np.arange(1.0, density.dimension + 1)), probes=2, steps=40)
    wrong = spectra.CountBelow(0.0, other.measure, 0, 80, 64)
    points = np.zeros(1)
    found, plain = (sharp_band(one, thresholds=points) for one in (density.with_count(wrong), density))
    assert np.array_equal(found.low, plain.low)
    with pytest.raises(InputError, match="a level between 0 and 1"):
        sharp_band(density.with_count(wrong), level=2, thresholds=points)


def test_shares_without_the_known_zeros_are_those_of_the_others():
    values = np.concatenate([np.zeros(30), np.linspace(-1, 2, 20)])
    density = spectra.slq(spectra.DiagonalOperator(values), probes=2, steps=30, seed=0)
    assert density.zero_share() == 0.6
    low, high = sharp_band(density, thresholds=np.array([0.5]), zeros=False).at(np.array([0.5]))
    assert low[0] <= 0.5 <= high[0]
    low, high = sharp_band(density, thresholds=np.array([0.5])).at(np.array([0.5]))
    assert low[0] <= 0.8 <= high[0]
    assert low[0] > 0.6
