"""What a run or a study lacks of what its config.json plans."""

import pytest
import run_folders

from spectra.runs.folder import Run
from spectra.runs.planned import unfinished


def run_with(folder, records, **config):
    run = Run.create(folder, config)
    for step in range(records):
        run_folders.add(run, step=step)
    run.close()
    return run


@pytest.mark.parametrize(("records", "words"), [(0, "0 of 2 spectra are measured"), (2, ""), (3, "")])
def test_a_run_lacks_records(records, words, tmp_path):
    assert unfinished(run_with(tmp_path / "a", records, planned_records=2)) == words


def test_a_failed_measurement_is_no_spectrum(tmp_path):
    from dataclasses import replace

    run = run_with(tmp_path / "a", 1, planned_records=2)
    run.append(replace(run.records[0], status="failed", reason="no memory", estimates={}))
    assert unfinished(run) == "1 of 2 spectra are measured"


def test_a_study_lacks_runs_and_their_records(tmp_path):
    study = Run.create(tmp_path / "study", {"planned_runs": ["a", "b", "c"]})
    assert unfinished(study) == "0 of 3 runs are finished"
    run_with(study.folder / "a", 1, planned_records=1)
    half = run_with(study.folder / "b", 1, planned_records=2)
    run_with(study.folder / "not-planned", 0)
    assert unfinished(study) == "1 of 3 runs are finished"
    run_folders.add(half, step=5)
    assert unfinished(study) == "2 of 3 runs are finished"
    run_with(study.folder / "c", 1)
    assert unfinished(study) == ""


def test_runs_in_a_folder_that_plans_nothing(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    assert unfinished(study) == ""
    run_with(study.folder / "3bit", 0)  # not measured, and nobody said that it would be
    assert unfinished(study) == ""
    run_with(study.folder / "4bit", 1, planned_records=4)
    assert unfinished(study) == "3 of 4 runs are finished"


@pytest.mark.parametrize("planned", ["5", None, [], {}, 5.0, -1])
def test_what_is_no_plan_is_none(planned, tmp_path):
    assert unfinished(run_with(tmp_path / "a", 1, planned_records=planned)) == ""
    assert unfinished(run_with(tmp_path / "b", 1, planned_runs=planned)) == ""
    assert unfinished(run_with(tmp_path / "c", 1, planned_runs=[planned, 1])) == ""
