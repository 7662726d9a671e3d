import dataclasses

import numpy as np
import pytest
import tiny_models

import spectra
from spectra.backend.errors import InputError
from spectra.runs.settings import IN_RECORD, MeasurementSettings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": 0}, "probes and steps must be at least 1, got probes=0, steps=100"),
        ({"steps": 0}, "got probes=2, steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"probes": True}, "probes=True"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"deflate": -1}, "deflate must be a number of eigenvalues, 0 or more, got -1"),
        ({"near_zero_tol": 0.0}, "near_zero_tol must be a positive number, got 0.0"),
        ({"near_zero_tol": float("nan")}, "near_zero_tol must be a positive number, got nan"),
        ({"near_zero_tol": None}, "near_zero_tol must be a positive number, got None"),
        ({"microbatch": 0}, "microbatch must be a number of rows, at least 1, got 0"),
        ({"batch_groups": 1}, "batch_groups must be 0, or at least 2 groups, got 1"),
        ({"batch_groups": -2}, "batch_groups must be 0"),
        ({"count_products": 99}, "count_products must be 0, or at least 100 products, got 99"),
        ({"reorthogonalize": "some"}, "reorthogonalize must be one of auto, full, none, got 'some'"),
        ({"spread": "layers"}, "spread must be one of none, probes, batches, got 'layers'"),
    ],
)
def test_a_value_out_of_its_range_is_refused_in_one_line(options, words):
    with pytest.raises(InputError) as caught:
        MeasurementSettings(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed_and_a_copy_is_checked_again():
    settings = MeasurementSettings(probes=np.int64(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.probes = 0
    with pytest.raises(InputError):
        dataclasses.replace(settings, probes=0)


def test_config_names_are_those_of_earlier_versions():
    config = MeasurementSettings(probes=3, steps=7, seed=5, deflate=0, near_zero_tol=0.25).to_config()
    assert (config["probes"], config["lanczos_steps"], config["probe_seed"]) == (3, 7, 5)
    assert (config["deflated"], config["near_zero_tol"]) == (0, 0.25)
    assert MeasurementSettings().to_config()["deflated"] == 20
    assert not any(value is None for value in MeasurementSettings().to_config().values())


def test_settings_come_back_from_config():
    values = {"probes": 3, "steps": 7, "seed": 5, "deflate": 2, "reorthogonalize": "full", "near_zero_tol": 0.25}
    values |= {"microbatch": 2, "engine": "reverse", "precision": "float32", "spread": "probes", "batch_groups": 3}
    values |= {"count_products": 120}
    assert set(values) == {field.name for field in dataclasses.fields(MeasurementSettings)}
    assert all(values[name] != getattr(MeasurementSettings(), name) for name in values)
    settings = MeasurementSettings(**values)
    assert MeasurementSettings.from_config(settings.to_config() | {"model": "GPT"}) == settings
    assert MeasurementSettings.from_config({}) == MeasurementSettings()
    with pytest.raises(InputError, match="probes=0"):
        MeasurementSettings.from_config({"probes": 0})


@pytest.fixture
def model():
    return tiny_models.mlp()


def test_a_probe_takes_settings_and_keywords_that_differ_from_them(model, tmp_path):
    batches = tiny_models.regression((9,))
    settings = MeasurementSettings(probes=3, steps=6, seed=4, deflate=0, engine="reverse")
    by_settings = spectra.SpectrumProbe(model, batches, settings=settings, out=tmp_path / "run")
    by_keywords = spectra.SpectrumProbe(model, batches, probes=3, steps=6, seed=4, deflate=0, engine="reverse")
    assert by_keywords.settings == settings
    assert by_settings.measure(0)[0].estimates == by_keywords.measure(0)[0].estimates
    assert spectra.SpectrumProbe(model, batches, settings=settings, seed=5).settings == dataclasses.replace(
        settings, seed=5
    )
    assert MeasurementSettings.from_config(spectra.Run(tmp_path / "run").config) == settings


def test_a_record_repeats_what_its_numbers_depend_on(model):
    settings = MeasurementSettings(probes=3, steps=6, seed=4, near_zero_tol=0.25)
    (record,) = spectra.SpectrumProbe(model, tiny_models.regression((9,)), settings=settings).measure(0)
    for name, key in IN_RECORD.items():
        assert getattr(record, key) == getattr(settings, name), name


def test_an_unknown_keyword_is_refused(model):
    with pytest.raises(TypeError, match="lanczos_steps"):
        spectra.SpectrumProbe(model, tiny_models.regression((9,)), lanczos_steps=6)


def test_spreading_needs_ranks(model):
    with pytest.raises(InputError, match="needs several ranks"):
        spectra.SpectrumProbe(model, tiny_models.regression((9,)), spread="probes")
