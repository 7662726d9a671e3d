"""Quantities: defined once, read from a density, and described."""

import math

import numpy as np
import pytest

import spectra
from spectra.estimates.quantities import ESTIMATES, QUANTITIES, Kind, describe, summarize

VALUES = np.array([-2.0, -0.5, 0.0, 0.0, 1e-3, 0.25, 1.0, 4.0])
TRUTH = {
    "negative_share": 2 / 8,
    "lambda_max": 4.0,
    "lambda_min": -2.0,
    "rms": math.sqrt(np.mean(VALUES**2)),
    "frobenius": math.sqrt(np.sum(VALUES**2)),
    "trace": VALUES.sum(),
    "negative_energy_share": 4.25 / np.sum(VALUES**2),
    "negative_magnitude_share": 2.5 / np.sum(np.abs(VALUES)),
    "near_zero_share": 3 / 8,
}


def test_every_quantity_of_a_density_is_read():
    summary = summarize(spectra.SpectralDensity.from_eigenvalues(VALUES), 0.1)
    assert tuple(summary) == ESTIMATES == tuple(TRUTH)
    for key, truth in TRUTH.items():
        assert summary[key].value == pytest.approx(truth, abs=1e-12), key


def test_the_tolerance_for_near_zero_is_passed_on():
    density = spectra.SpectralDensity.from_eigenvalues(VALUES)
    for tol, share in ((1e-4, 2 / 8), (0.3, 4 / 8), (10.0, 1.0)):
        assert summarize(density, tol)["near_zero_share"].value == pytest.approx(share)
    assert summarize(density)["near_zero_share"].value == pytest.approx(3 / 8)


def test_what_a_quantity_is_follows_from_its_values():
    """Properties of the kinds against the quantities of A, of 2 A and of a negative definite matrix."""
    density, doubled, negative = (
        summarize(spectra.SpectralDensity.from_eigenvalues(values), 0.1) for values in (VALUES, 2 * VALUES, VALUES - 5)
    )
    for key in ESTIMATES:
        quantity = describe(key)
        assert quantity.is_share == key.endswith("_share"), key
        assert quantity.is_nonnegative == (negative[key].value >= 0), key
        assert quantity.meaning, key
        if quantity.is_share:
            assert 0 <= density[key].value <= 1
            assert quantity.unit == ""
        else:
            assert doubled[key].value == pytest.approx(2 * density[key].value), key
            assert quantity.unit == "loss per parameter²"
    assert [key for key in ESTIMATES if describe(key).kind is Kind.END] == ["lambda_max", "lambda_min"]


def test_means_over_probe_vectors_are_all_but_ends_and_counts():
    means = {key for key in ESTIMATES if describe(key).is_mean_over_probes}
    assert means == {"trace", "rms", "frobenius", "negative_energy_share", "negative_magnitude_share"}
    assert {key: describe(key).power for key in ESTIMATES if describe(key).power is not None} == {
        "negative_energy_share": 2,
        "negative_magnitude_share": 1,
    }


def test_names_for_axes():
    assert describe("rms").axis == "root-mean-square eigenvalue (loss per parameter²)"
    assert describe("negative_share").axis == "negative share"


def test_a_quantity_that_is_not_known_is_named_by_its_key():
    unknown = describe("flip_rate")
    assert (unknown.name, unknown.unit, unknown.meaning, unknown.kind) == ("flip rate", "", "", Kind.OTHER)
    assert not unknown.is_share
    assert not unknown.is_nonnegative
    assert not unknown.is_mean_over_probes


def test_numbers_of_a_log_are_not_read_from_a_density():
    assert {"loss", "validation_loss", "training_loss", "learning_rate", "gradient_norm"} <= set(QUANTITIES)
    assert all(QUANTITIES[key].read is None for key in QUANTITIES if key not in TRUTH)
