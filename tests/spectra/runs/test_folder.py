import dataclasses
import json
import math
import os
import warnings

import numpy as np
import pytest
import run_folders
from safetensors.numpy import load_file, save_file

from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.runs import folder as folder_module
from spectra.runs.failure import Failure
from spectra.runs.folder import Run
from spectra.runs.jsonlines import JsonLines
from spectra.runs.record import SpectrumRecord
from spectra.runs.settings import MeasurementSettings


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strict(text):
    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_in_the_file_and_come_back(tmp_path):
    run = Run.create(tmp_path / "a", {"limit": math.inf})
    unknown = Estimate(math.nan, -math.inf, math.inf, False, "one probe")
    spectrum = run_folders.density()
    made = run_folders.record(spectrum, extras={"custom": math.nan}, trace=unknown)
    run.append(SpectrumRecord(**{**vars(made), "loss": math.nan}))
    run.append_telemetry({"step": 1, "loss": np.float32("inf")})
    for name in ("config.json", "records.jsonl", "telemetry.jsonl"):
        strict((run.folder / name).read_text())
    (got,) = Run(run.folder).records
    assert math.isnan(got.loss)
    assert math.isnan(got.extras["custom"])
    assert math.isnan(got.estimates["trace"].value)
    assert (got.estimates["trace"].low, got.estimates["trace"].high) == (-math.inf, math.inf)
    assert got.estimates["rms"] == made.estimates["rms"]
    assert math.isnan(run.telemetry[0]["loss"])


def test_numpy_numbers_and_paths_are_written_as_plain_ones(tmp_path):
    config = {"bits": np.float64(1.58), "steps": np.int64(3), "path": tmp_path, "shape": (1, 2), "on": np.True_}
    run = Run.create(tmp_path / "a", config)
    assert run.config == {"bits": 1.58, "steps": 3, "path": str(tmp_path), "shape": [1, 2], "on": True}


def test_a_record_without_a_required_field_names_it(tmp_path):
    run = Run.create(tmp_path / "a")
    fields = run_folders.record(run_folders.density()).to_dict()
    del fields["dimension"]
    JsonLines(run.folder / "records.jsonl").append(fields)
    with pytest.raises(InputError, match=r"records\.jsonl, record 1: .* no dimension"):
        _ = run.records


def test_the_density_is_redrawn_from_the_matrices(tmp_path):
    run = Run.create(tmp_path / "a")
    spectrum = run_folders.density()
    written = run.append(run_folders.record(spectrum, step=30, mode="a/b c"), spectrum)
    assert written.lanczos == "lanczos/000000-step-30-a-b-c.safetensors"
    again = Run(run.folder)
    assert again.records == [written]
    got = again.density(again.records[0])
    np.testing.assert_array_equal(got.nodes, spectrum.nodes)
    np.testing.assert_array_equal(got.weights, spectrum.weights)
    assert got.rms() == spectrum.rms()


def test_a_file_that_lacks_the_seed_takes_that_of_the_record(tmp_path):
    run, spectrum = Run.create(tmp_path / "a"), run_folders.density()
    written = run.append(dataclasses.replace(run_folders.record(spectrum), seed=5), spectrum)
    assert run.density(written).seed == spectrum.seed == 0
    arrays = load_file(run.folder / written.lanczos)
    del arrays["seed"]
    save_file(arrays, run.folder / written.lanczos)
    assert run.density(written).seed == 5


def test_a_density_that_was_not_kept_is_refused_by_name(tmp_path):
    run = Run.create(tmp_path / "a")
    spectrum = run_folders.density()
    bare = run.append(run_folders.record(spectrum, step=4))
    with pytest.raises(InputError, match=r"step 4 .* without Lanczos matrices"):
        run.density(bare)
    kept = run.append(run_folders.record(spectrum), spectrum)
    path = run.folder / kept.lanczos
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=r"safetensors cannot be read"):
        run.density(kept)
    path.unlink()
    with pytest.raises(InputError, match=r"safetensors is missing"):
        run.density(kept)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_line_cut_short_is_skipped_and_the_next_one_stands_alone(tmp_path, left):
    run = run_folders.run_folder(tmp_path / "a")
    path = run.folder / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][: left if left > 0 else len(lines[2]) - 20])
    again = Run(run.folder)
    with pytest.warns(UserWarning, match=r"records\.jsonl holds a line that is not whole") as warned:
        read = [again.records for _ in range(2)]
    assert [[record.step for record in records] for records in read] == [[0, 10]] * 2
    assert len(warned) == 1
    new = run_folders.add(again, step=30)
    assert [record.step for record in again.records] == [0, 10, 30]
    with pytest.warns(UserWarning, match="not whole"):
        assert [record.step for record in Run(run.folder).records] == [0, 10, 30]
    assert new.lanczos == "lanczos/000003-step-30-full.safetensors"  # the file of the lost record stays
    assert path.read_bytes().startswith(b"".join(lines[:2]))


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    path = run.folder / "records.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = Run(run.folder)
    assert [record.step for record in again.records] == [0, 10, 20]
    run_folders.add(again, step=30)
    assert [record.step for record in again.records] == [0, 10, 20, 30]


def test_the_matrices_are_there_before_the_record(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "a")

    def fail(self, fields):
        assert (run.folder / fields["lanczos"]).is_file()
        raise OSError("no space left")

    monkeypatch.setattr(JsonLines, "append", fail)
    with pytest.raises(OSError, match="no space"):
        run_folders.add(run)
    monkeypatch.undo()
    assert run.records == []
    assert run_folders.add(run).lanczos.startswith("lanczos/000001-")
    assert not list(run.folder.rglob("*.partial"))


def test_reading_again_parses_new_lines_only(tmp_path, monkeypatch):
    writer = run_folders.run_folder(tmp_path / "a")
    reader = Run(writer.folder)
    first = reader.records
    parsed = []
    original = SpectrumRecord.from_dict.__func__
    monkeypatch.setattr(SpectrumRecord, "from_dict", classmethod(lambda cls, f: parsed.append(f) or original(cls, f)))
    run_folders.add(writer, step=30)
    assert [record.step for record in reader.records] == [0, 10, 20, 30]
    assert len(parsed) == 1
    assert reader.records[:3] == first
    reader.records.clear()  # the caller's own list
    assert len(reader.records) == 4


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "a")
    sizes, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size) or original(number))
    run.append_telemetry({"step": 1})
    assert sizes == [(run.folder / "telemetry.jsonl").stat().st_size]


def test_a_run_is_made_once(tmp_path):
    (tmp_path / "empty").mkdir()
    run = Run.create(tmp_path / "empty", {"bits": 2})
    assert Run(run.folder).config == {"bits": 2}
    run_folders.add(run)
    with pytest.raises(InputError, match=r"empty already holds a run: choose another out=, or delete"):
        Run.create(run.folder, {"bits": 4})
    assert run.config == {"bits": 2}
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file"):
        Run.create(tmp_path / "file")


def test_of_two_that_start_at_once_one_gets_the_folder(tmp_path, monkeypatch):
    """The second one looked before the first wrote, and looks again when it has the lock."""
    original, seen = folder_module.WriterLock, []

    def lock_after_another_has_written(folder):
        if not seen:
            seen.append(folder)
            run_folders.add(Run.create(folder, {"who": "first"}))
        return original(folder)

    monkeypatch.setattr(folder_module, "WriterLock", lock_after_another_has_written)
    with pytest.raises(InputError, match="already holds a run"):
        Run.create(tmp_path, {"who": "second"})
    assert Run(tmp_path).config == {"who": "first"}
    assert len(Run(tmp_path).records) == 1


@pytest.mark.parametrize("left", ["config", "both", "torn line", "telemetry file"])
def test_a_folder_in_which_nothing_was_recorded_is_no_obstacle(tmp_path, left):
    run = Run.create(tmp_path / "a", {"bits": 2})
    run.close()
    if left == "config":
        (run.folder / "records.jsonl").unlink()
    if left == "torn line":
        (run.folder / "records.jsonl").write_text('{"step": 0, "mo')
    if left == "telemetry file":
        (run.folder / "telemetry.jsonl").touch()
    for make in (Run.create, Run.open_or_create):
        again = make(run.folder, {"bits": 4})
        assert Run(run.folder).config == {"bits": 4}
        again.close()
    with Run.create(run.folder, {"bits": 4}) as again:
        add_quietly(again)
        assert len(again.records) == 1


def add_quietly(run):
    """A record after a torn line, which is reported by a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_folders.add(run)


@pytest.mark.parametrize("recorded", ["spectrum", "telemetry", "spectrum of a run of the study"])
def test_a_folder_in_which_something_was_recorded_is_kept(tmp_path, recorded):
    run = Run.create(tmp_path / "a", {"bits": 2})
    if recorded == "telemetry":
        run.append_telemetry({"step": 0, "loss": 1.0})
    else:
        run_folders.add(run if recorded == "spectrum" else Run.create(run.folder / "inner"))
    run.close()
    with pytest.raises(InputError, match="already holds a run"):
        Run.create(run.folder, {"bits": 4})
    assert Run(run.folder).config == {"bits": 2}


def test_the_config_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for make in (Run.create, Run.open_or_create):
        with pytest.raises(InputError, match=r"already holds a config\.json, which is not that of a run"):
            make(tmp_path, {"bits": 2})
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


SETTINGS = {"probes": 4, "params": ["*mlp*"], "train": {"steps": 30, "seed": 0}, "nothing": None}


def test_a_run_goes_on_with_the_same_settings(tmp_path):
    with Run.open_or_create(tmp_path / "a", SETTINGS) as run:
        run_folders.add(run, step=0)
    same = {**SETTINGS, "presentation": {"label": "mine"}, "facts": {"started": "today"}, "workers": 3}
    with Run.open_or_create(run.folder, same, not_compared=("workers",)) as again:
        assert [record.step for record in again.records] == [0]
        run_folders.add(again, step=10)
    assert [record.step for record in Run(run.folder).records] == [0, 10]
    assert Run(run.folder).config == SETTINGS


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"probes": 8}, "probes: 4 in the folder, 8 asked for"),
        ({"params": None}, r'params: \["\*mlp\*"\] in the folder, none asked for'),
        ({"train": {"steps": 60, "seed": 0}}, r"train\.steps: 30 in the folder, 60 asked for"),
        ({"engine": "reverse"}, "engine: none in the folder, reverse asked for"),
    ],
)
def test_other_settings_are_refused_with_the_difference_named(tmp_path, changed, words):
    with Run.open_or_create(tmp_path / "a", SETTINGS) as run:
        run_folders.add(run, step=0)
    with pytest.raises(InputError, match=words) as caught:
        Run.open_or_create(run.folder, SETTINGS | changed)
    assert "choose another out=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_gone_is_a_difference(tmp_path):
    with Run.open_or_create(tmp_path / "a", SETTINGS) as run:
        run_folders.add(run, step=0)
    with pytest.raises(InputError, match="probes: 4 in the folder, none asked for"):
        Run.open_or_create(run.folder, {name: value for name, value in SETTINGS.items() if name != "probes"})


def failed(step=0):
    return Failure("no memory", "less of it").to_record(MeasurementSettings(), mode="full", step=step)


def test_a_run_that_holds_failures_alone_goes_on_with_other_settings(tmp_path):
    with Run.create(tmp_path, {"probes": 4, "old": 1}) as run:
        run.append(failed())
    with Run.open_or_create(tmp_path, {"probes": 8, "new": 2}) as again:
        assert [record.status for record in again.records] == ["failed"]
        again.append(run_folders.record(run_folders.density()))
    assert Run(tmp_path).config == {"probes": 8, "new": 2}
    with pytest.raises(InputError, match="holds a run with other settings"):
        Run.open_or_create(tmp_path, {"probes": 4, "old": 1})


@pytest.mark.parametrize("kept_by", ["telemetry", "writer"])
def test_failures_of_a_run_that_goes_on_elsewhere_keep_their_settings(tmp_path, kept_by):
    run = Run.create(tmp_path, {"probes": 4})
    run.append(failed())
    if kept_by == "telemetry":
        run.append_telemetry({"step": 1})
        run.close()
    with pytest.raises(InputError, match="probes: 4 in the folder, 8 asked for"):
        Run.open_or_create(tmp_path, {"probes": 8})
    assert Run(tmp_path).config == {"probes": 4}


def test_only_what_is_known_is_compared(tmp_path):
    with Run.create(tmp_path, {"probes": 4, "batches": "abc"}) as run:
        run.append(run_folders.record(run_folders.density()))
    Run.open_or_create(tmp_path, {"probes": 4}, only_compared=["probes"]).close()
    assert Run(tmp_path).config == {"probes": 4, "batches": "abc"}
    with pytest.raises(InputError, match="probes: 4 in the folder, 5 asked for"):
        Run.open_or_create(tmp_path, {"probes": 5}, only_compared=["probes"])


@pytest.mark.parametrize("fault", ["write", "short write", "fsync"])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fault):
    run = run_folders.run_folder(tmp_path / "a")
    before = (run.folder / "records.jsonl").read_bytes()

    def fail(handle, *rest):
        if fault == "short write":
            return write(handle, rest[0][:100])
        raise OSError(28, "No space left on device")

    write = os.write
    monkeypatch.setattr(os, "fsync" if fault == "fsync" else "write", fail)
    with pytest.raises(OSError, match="No space left"):
        run.append(run_folders.record(run_folders.density(), step=30))
    monkeypatch.undo()
    assert (run.folder / "records.jsonl").read_bytes() == before
    run_folders.add(run, step=30)
    assert [record.step for record in Run(run.folder).records] == [0, 10, 20, 30]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_of_matrices_is_there_whole_or_not_at_all(tmp_path, monkeypatch, call):
    run = run_folders.run_folder(tmp_path / "a")
    there = sorted(path.name for path in (run.folder / "lanczos").iterdir())

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        run_folders.add(run, step=30)
    monkeypatch.undo()
    assert sorted(path.name for path in (run.folder / "lanczos").iterdir()) == there
    assert [record.step for record in Run(run.folder).records] == [0, 10, 20]


def test_what_a_killed_writer_left_half_written_is_removed(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    run.close()
    half = [run.folder / "config.json.partial", run.folder / "lanczos" / "000003-step-30-full.safetensors.partial"]
    for path in half:
        path.write_text("half")
    Run(run.folder)  # a reader removes nothing
    assert all(path.exists() for path in half)
    Run.open_or_create(run.folder, {}).close()
    assert not any(path.exists() for path in half)


def test_the_matrices_of_another_folder_are_not_read(tmp_path):
    other = run_folders.run_folder(tmp_path / "other")
    run = Run.create(tmp_path / "a")
    record = dataclasses.replace(other.records[0], lanczos="../other/lanczos/000000-step-0-full.safetensors")
    run.append(record)
    with pytest.raises(InputError, match="inside"):
        run.density(run.records[0])


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        Run(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"expected JSON in .*config\.json"):
        _ = Run(tmp_path).config


def test_the_runs_of_a_study_are_sorted_and_nothing_else_counts(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2, 1.58, 1), reference=True)
    (study.folder / "model").mkdir()
    (study.folder / "model" / "config.json").write_text("{}")  # a checkpoint is no run
    names = [run.folder.name for run in Run(study.folder).runs]
    bits = [f"{width}bit-{method}" for width in ("1", "1.58", "2") for method in ("baseline", "winq")]
    assert names == [*bits, "full-precision"]
    assert Run(study.folder / "1bit-winq").runs == []
    assert study.records == []
