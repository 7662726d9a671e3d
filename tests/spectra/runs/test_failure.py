"""A failure in one line, and its record."""

import math

import pytest
import run_folders
import torch

from spectra.backend.errors import InputError
from spectra.backend.ranks import RankError
from spectra.runs import failure
from spectra.runs.failure import Failure, is_out_of_memory, record_unmade
from spectra.runs.folder import Run
from spectra.runs.settings import MeasurementSettings

KINDS = {
    "mistake": (InputError("expected this,\n got that"), "expected this, got that", ""),
    "device": (
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        "OutOfMemoryError: CUDA out of memory",
        failure.MEMORY,
    ),
    "host": (MemoryError(), "MemoryError", failure.MEMORY),
    "host torch": (RuntimeError("not enough memory: x"), "RuntimeError: not enough memory: x", failure.MEMORY),
    "disk": (OSError(28, "No space"), "OSError: [Errno 28] No space", failure.DISK),
    "ranks": (RankError("rank 1"), "RankError: rank 1", failure.RANKS),
    "other": (KeyError("x"), "KeyError: 'x'", failure.UNKNOWN),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_one_line_with_what_to_do(kind):
    error, reason, remedy = KINDS[kind]
    found = Failure.of(error)
    assert (found.reason, found.remedy) == (reason, remedy)
    assert str(found) == (f"{reason}; {remedy}" if remedy else reason)
    assert Failure.of(error, where="extras=").reason == f"extras= {reason}"
    assert is_out_of_memory(error) == (remedy == failure.MEMORY)


def test_the_record_of_a_failure(tmp_path):
    settings = MeasurementSettings(probes=3, steps=7, seed=5)
    record = Failure("why", "what").to_record(settings, mode="ste", step=4, label="end", seconds=2.0)
    assert (record.status, record.reason, record.remedy, record.is_measured) == ("failed", "why", "what", False)
    assert (record.mode, record.step, record.label, record.seconds) == ("ste", 4, "end", 2.0)
    assert (record.probes, record.lanczos_steps, record.seed) == (3, 7, 5)
    assert math.isnan(record.loss)
    run = Run.create(tmp_path)
    run.append(record)
    assert Run(tmp_path).records[0].reason == "why"


def unmade(out, reason="why", step=0, probes=4, **facts):
    settings = MeasurementSettings(probes=probes)
    record_unmade(out, Failure(reason, ""), settings, facts={"model": "Net", **facts}, modes=["full", "ste"], step=step)


def test_why_there_is_no_probe_is_recorded_once_for_each_mode(tmp_path):
    for _ in range(2):
        unmade(tmp_path / "new")
    unmade(tmp_path / "new", "another")
    records = Run(tmp_path / "new").records
    assert [(r.mode, r.reason) for r in records] == [(m, why) for why in ("why", "another") for m in ("full", "ste")]
    assert Run(tmp_path / "new").config["model"] == "Net"


def test_the_run_of_the_same_training_gets_the_record_and_others_do_not(tmp_path):
    config = {**MeasurementSettings(probes=4).to_config(), "model": "Net", "batches": "abc"}
    with Run.create(tmp_path, config) as run:
        run.append(run_folders.record(run_folders.density()))
    unmade(tmp_path, "other settings", probes=5)
    unmade(tmp_path, "other facts", lr=0.1)
    unmade(tmp_path, "same")
    assert [record.reason for record in Run(tmp_path).records] == ["", "same", "same"]
    assert Run(tmp_path).config == config


def test_a_file_in_the_place_of_the_folder_is_left(tmp_path):
    (tmp_path / "file").write_text("mine")
    unmade(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
