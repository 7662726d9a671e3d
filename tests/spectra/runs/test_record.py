"""Records as JSON, of this version and of earlier ones."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.estimates.quantities import ESTIMATES, summarize
from spectra.runs.folder import Run
from spectra.runs.jsonlines import JsonLines
from spectra.runs.record import CHECKS, VERSION, VERSION_NUMBER, SpectrumRecord
from spectra.runs.series import available, series
from spectra.runs.settings import MeasurementSettings

FIXTURES = Path(__file__).parents[2] / "fixtures" / "runs"
V1, V2 = FIXTURES / "v1", FIXTURES / "v2"  # written by version 0.1.0, and after checks had a place of their own


def through_json(record):
    return json.loads(json.dumps(record.to_dict(), allow_nan=False))


def test_a_record_comes_back_from_json_as_it_was():
    spectrum = run_folders.density()
    want = run_folders.record(spectrum, step=7, label="before-reset", extras={"flip_rate": 0.25})
    assert want.checks
    assert SpectrumRecord.from_dict(through_json(want)) == want


def test_fields_of_later_versions_are_ignored_and_missing_optional_ones_defaulted():
    fields = run_folders.record(run_folders.density()).to_dict()
    optional = ("label", "extras", "checks", "versions", "wall_time", "lanczos")
    kept = {name: fields[name] for name in fields if name not in optional}
    got = SpectrumRecord.from_dict(kept | {"colour": "green"})
    assert (got.label, got.extras, got.checks, got.versions, got.lanczos) == ("", {}, {}, {}, None)
    assert math.isnan(got.wall_time)


@pytest.mark.parametrize("field", ["dimension", "lanczos_steps", "near_zero_tol"])
def test_a_required_field_that_is_missing_is_named(field):
    fields = run_folders.record(run_folders.density()).to_dict()
    del fields[field]
    with pytest.raises(InputError, match=f"this one has no {field}$"):
        SpectrumRecord.from_dict(fields)


def test_checks_that_stand_among_the_extras_are_moved():
    fields = run_folders.record(run_folders.density(), extras={"flip_rate": 0.25}).to_dict()
    checks = fields.pop("checks")
    assert set(checks) == set(CHECKS)
    fields["extras"] |= checks | {"precision_error": None}
    got = SpectrumRecord.from_dict(fields)
    assert got.extras == {"flip_rate": 0.25}
    assert math.isnan(got.checks["precision_error"])
    assert {name: got.checks[name] for name in CHECKS[:3]} == {name: checks[name] for name in CHECKS[:3]}


def test_where_both_have_a_check_the_checks_are_taken():
    fields = run_folders.record(run_folders.density()).to_dict()
    fields["extras"], fields["checks"] = {"symmetry_gap": 1.0}, {"symmetry_gap": 2.0, "new_check": 3.0}
    got = SpectrumRecord.from_dict(fields)
    assert (got.extras, got.checks) == ({}, {"symmetry_gap": 2.0, "new_check": 3.0})


def test_checks_are_no_quantities_of_the_run_but_can_be_asked_for(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    assert not set(CHECKS) & set(available(run))
    assert series(run, "symmetry_gap").points[0].estimate.value == run_folders.CHECKS["symmetry_gap"]


def test_a_run_of_version_0_1_opens():
    run = Run(V1)
    first, second = run.records
    assert [(r.step, r.label, r.lanczos_steps, r.probes, r.seed) for r in run.records] == [
        (0, "start", 4, 2, 3),
        (0, "after-reset", 4, 2, 3),
    ]
    assert first.extras == {"flip_rate": 0.25, "zero_share": 0.0}
    assert set(first.checks) == set(CHECKS)
    assert first.checks["symmetry_gap"] == 6.429038862824953e-17
    assert [point.again for point in series(run, "rms").points] == [False, True]
    assert run.telemetry == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    settings = MeasurementSettings.from_config(run.config)
    assert settings == MeasurementSettings(probes=2, steps=4, seed=3, deflate=2, near_zero_tol=0.0015)
    assert (run.presentation.label, run.presentation.quantities) == ("v1", {})
    with pytest.raises(InputError, match="is missing"):
        run.density(second)  # its file was left out of the fixture


def test_a_run_of_schema_2_opens():
    run = Run(V2)
    assert run.version == 2
    first, second = run.records
    assert [(r.step, r.label, r.status, r.reason, r.weights) for r in (first, second)] == [
        (0, "start", "ok", "", ""),
        (2, "", "ok", "", ""),
    ]
    assert first.extras == {"flip_rate": 0.25, "zero_share": 0.0}
    assert first.checks["symmetry_gap"] == 2.719498161081508e-17
    assert first.batch_noise["trace"]["batches"] == 10.323717131512211
    assert [point.estimate.value for point in series(run, "rms").points] == [1.1379823147798598, 1.1329001541595007]
    assert run.telemetry[0] == {"step": 0, "loss": 2.0}
    assert math.isnan(run.telemetry[1]["loss"])
    assert run.presentation.label == "2-bit WinQ"
    density = run.density(second)
    assert density.lambda_max().value == pytest.approx(second.estimates["lambda_max"].value, rel=1e-12)
    assert density.rms().value == pytest.approx(second.estimates["rms"].value, rel=1e-12)


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_a_run_of_an_earlier_schema_goes_on(version, tmp_path):
    folder = shutil.copytree(version, tmp_path / "run")
    before = Run(folder).records
    with Run.open_or_create(folder, {**Run(folder).config, "training": False}) as run:
        run_folders.add(run, step=30)
    after = Run(folder).records
    assert after[:-1] == before
    assert after[-1].step == 30
    with pytest.raises(InputError, match="probes: 2 in the folder, 8 asked for"):
        Run.open_or_create(folder, Run(folder).config | {"probes": 8})


def test_records_and_config_name_their_schema(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    assert run.version == VERSION_NUMBER
    for text in ((run.folder / "records.jsonl").read_text().splitlines()[0], (run.folder / "config.json").read_text()):
        assert json.loads(text)[VERSION] == VERSION_NUMBER


def test_a_later_schema_is_refused_in_one_line(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    fields = run_folders.record(run_folders.density()).to_dict() | {VERSION: VERSION_NUMBER + 1}
    JsonLines(run.folder / "records.jsonl").append(fields)
    with pytest.raises(InputError, match=r"record 4: the record was written by a later version .* update") as caught:
        _ = run.records
    assert "\n" not in str(caught.value)
    (run.folder / "config.json").write_text(json.dumps({VERSION: VERSION_NUMBER + 1}))
    with pytest.raises(InputError, match=r"config\.json was written by a later version"):
        _ = run.config


def test_a_failed_record_comes_back_from_json_as_it_was(tmp_path):
    want = SpectrumRecord(
        **{**vars(run_folders.record(run_folders.density())), "estimates": {}, "status": "failed", "reason": "no"}
    )
    got = SpectrumRecord.from_dict(through_json(want))
    assert got == want
    assert not got.is_measured


MALFORMED = {
    "step": ["three", None, 2.5, True],
    "mode": [3, None],
    "loss": ["low", [], {}],
    "estimates": [3, [], {"trace": 3}, {"trace": {"value": "x"}}, {"trace": {"value": [1]}}],
    "extras": [3, "x", []],
    "checks": [["symmetry_gap"]],
    "notes": ["text", 3],
    "lanczos": [3, {}],
    "status": [0, None],
    VERSION: ["three", None, 99],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in MALFORMED for value in MALFORMED[name]])
def test_a_malformed_field_is_refused_in_one_line(name, value):
    fields = run_folders.record(run_folders.density()).to_dict()
    with pytest.raises(InputError) as caught:
        SpectrumRecord.from_dict(fields | {name: value})
    assert "\n" not in str(caught.value)


def test_the_density_of_version_0_1_gives_the_numbers_that_it_wrote():
    run = Run(V1)
    record = run.records[0]
    density = run.density(record)
    assert density.nodes[0].tolist() == [
        -1.098307575939217,
        -0.0015580420935958073,
        0.34221507371015303,
        1.0316164953736067,
        1.1628675779946758,
        2.9534809390697694,
    ]
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-14)
    again = summarize(density, record.near_zero_tol)
    assert set(again) == set(ESTIMATES)
    for name, estimate in record.estimates.items():
        for end in ("value", "low", "high"):
            assert getattr(again[name], end) == pytest.approx(getattr(estimate, end), rel=1e-12, abs=1e-15), name
        assert again[name].resolved <= estimate.resolved, name  # later versions ask for more
