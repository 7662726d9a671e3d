import builtins
import importlib.util
import math
from dataclasses import replace

import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.estimates.quantities import ESTIMATES
from spectra.runs import flat
from spectra.runs.folder import Run


def test_a_frame_has_a_row_for_each_record(tmp_path):
    run = run_folders.run_folder(tmp_path / "run", marks=run_folders.RESETS, modes=("ste", "latent"))
    frame = run.to_pandas()
    assert len(frame) == 8
    assert list(frame["step"]) == [0, 0, 10, 10, 10, 10, 20, 20]
    assert list(frame["mode"].unique()) == ["ste", "latent"]
    for row, record in zip(frame.to_dict("records"), run.records, strict=True):
        for name in ESTIMATES:
            estimate = record.estimates[name]
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (estimate.value, estimate.low, estimate.high)
            assert row[f"{name}_resolved"] is estimate.resolved
        for name in ("label", "loss", "gradient_norm", "seconds", "products", "wall_time", "status"):
            assert row[name] == getattr(record, name)
        assert row["extras.custom"] == 1.0
        assert row["checks.linearity_gap"] == 2e-16
    later = frame[(frame["mode"] == "ste") & frame["rms_resolved"]]
    assert list(later["step"]) == [r.step for r in run.records if r.mode == "ste" and r.estimates["rms"].resolved]


def test_a_study_is_one_frame_with_the_names_of_its_runs(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(1, 2), reference=True)
    frame = study.to_pandas()
    assert list(frame.columns[:2]) == ["run", "step"]
    counts = {single.folder.name: len(single.records) for single in study.runs}
    assert frame.groupby("run").size().to_dict() == counts
    alone = study.runs[0].to_pandas()
    part = frame[frame["run"] == study.runs[0].folder.name].drop(columns="run").dropna(axis="columns", how="all")
    assert part.equals(alone[part.columns])


def test_a_failed_measurement_has_missing_numbers_and_resolves_nothing(tmp_path):
    run = run_folders.run_folder(tmp_path / "run", marks=((0, "start"),))
    (measured,) = run.records
    run.append(replace(measured, step=5, status="failed", reason="no memory", estimates={}, loss=math.nan))
    frame = run.to_pandas()
    assert list(frame["reason"]) == ["", "no memory"]
    assert frame["rms"].isna().tolist() == [False, True]
    assert frame["rms_resolved"].dtype == bool
    assert frame["rms_resolved"].tolist() == [measured.estimates["rms"].resolved, False]
    assert "failed: no memory" in run._repr_html_()


def test_an_empty_run_is_an_empty_frame(tmp_path):
    frame = Run.create(tmp_path / "run").to_pandas()
    assert len(frame) == 0
    assert list(frame.columns) == list(flat.FIRST)


def test_without_pandas_the_extra_is_named(tmp_path, monkeypatch):
    run = run_folders.run_folder(tmp_path / "run", marks=((0, ""),))
    find, load = importlib.util.find_spec, builtins.__import__

    def refuse(name, *rest, **options):
        assert not name.startswith("pandas")
        return load(name, *rest, **options)

    monkeypatch.setattr("spectra.backend.extras.find_spec", lambda name: None if name == "pandas" else find(name))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r'pandas is not installed: pip install "spectra-qat\[pandas\]"'):
        run.to_pandas()


def test_a_notebook_shows_the_last_records_and_says_how_many_there_are(tmp_path):
    run = Run.create(tmp_path / "run")
    record = run_folders.record(run_folders.density())
    for step in range(flat.MOST_SHOWN + 3):
        run.append(replace(record, step=step))
    html = run._repr_html_()
    assert html.count("<tr>") == 1 + flat.MOST_SHOWN
    assert ">22<" in html
    assert ">2<" not in html
    assert f"the last {flat.MOST_SHOWN} of 23 records" in html
    assert str(record.estimates["rms"]) in html
