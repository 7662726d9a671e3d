import re

import numpy as np
import run_folders

from spectra.estimates.density import SpectralDensity
from spectra.views.bands_on_screen import band_on_screen

POINTS = np.array([-1.6, -0.01, 0.0, 0.005, 0.5, 4.0, 9.0])


def test_the_band_holds_the_true_shares_and_is_that_of_the_density():
    density = run_folders.density(probes=8, steps=60)
    band = band_on_screen(density, POINTS, level=0.95)
    truth = [np.mean(run_folders.eigenvalues() < point) for point in POINTS]
    assert np.all(band.low <= truth)
    assert np.all(truth <= band.high)
    low, high = density.band(0.95, thresholds=POINTS, tails=True).at(POINTS)
    np.testing.assert_array_equal(band.low, low)
    np.testing.assert_array_equal(band.high, high)


def test_a_share_that_is_not_resolved_has_no_line_and_no_value():
    density = run_folders.density(probes=3, steps=10)
    band = band_on_screen(density, POINTS, level=0.95)
    wide = band.high - band.low > 0.1
    assert wide.any()
    assert not wide.all()
    assert np.array_equal(np.isnan(band.middle), wide)
    for words, unresolved in zip(band.words(), wide, strict=True):
        assert ("not resolved" in words) == unresolved
        assert bool(re.search(r"below: between [\d.]+ and [\d.]+, not", words)) == unresolved


def test_words_of_a_spectrum_that_is_known():
    values = np.array([-1.0, 1.0, 3.0, 5.0])
    band = band_on_screen(SpectralDensity.from_eigenvalues(values), np.array([0.0, 1.0, 4.0]), level=0.95)
    assert band.words()[0].startswith("λ = 0<br>share below: 0.25")
    assert [words.split("<br>")[2] for words in band.words()] == [
        "eigenvalues from here on: 3 of 4",
        "eigenvalues from here on: 3 of 4",
        "eigenvalues from here on: 1 of 4",
    ]
