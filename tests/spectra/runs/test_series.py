import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.estimates.quantities import ESTIMATES, describe
from spectra.runs.series import as_runs, available, measured_again, modes, select, series


@pytest.fixture
def run(tmp_path):
    return run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS, modes=("ste", "latent"))


def test_an_estimate_comes_with_its_interval_for_each_record_of_a_mode(run):
    line = series(run, "rms", mode="latent")
    assert line.measured
    assert [(point.step, point.label) for point in line.points] == list(run_folders.RESETS)
    assert [p.estimate for p in line.points] == [r.estimates["rms"] for r in run.records if r.mode == "latent"]


def test_a_second_record_of_a_mode_at_the_same_training_step_is_marked(run):
    for quantity in ("rms", "loss", "custom"):
        assert [point.again for point in series(run, quantity, mode="latent").points] == [False, False, True, False]
    assert not any(point.again for point in series(run, "training_loss").points)
    assert measured_again(run.records) == [False] * 4 + [True] * 2 + [False] * 2
    assert measured_again(select(run, steps=[0, 20])) == [False, False]


def test_the_first_mode_is_taken_unless_another_is_asked_for(run):
    assert modes(run) == ["ste", "latent"]
    assert {record.mode for record in select(run)} == {"ste"}
    with pytest.raises(InputError, match=r"one of the modes ste, latent .* got 'noisy'"):
        select(run, mode="noisy")


def test_steps_are_chosen_by_number_or_as_the_last(run):
    assert [record.label for record in select(run, steps=10)] == ["before-reset", "after-reset"]
    assert [record.step for record in select(run, steps=[20, 0])] == [0, 20]
    assert [record.step for record in select(run, steps="last")] == [20]
    with pytest.raises(InputError, match="no spectrum of step 5: choose among 0, 10, 20"):
        select(run, steps=5)


def test_the_loss_of_the_records_is_not_that_of_the_telemetry(run):
    assert [p.estimate.value for p in series(run, "loss").points] == pytest.approx([2.5, 2.49, 2.49, 2.48])
    logged = series(run, "training_loss")
    assert not logged.measured
    assert [p.estimate.value for p in logged.points] == pytest.approx([3 - step / 10 for step in range(0, 21, 2)])


def test_a_telemetry_key_skips_lines_without_it(run):
    assert [point.step for point in series(run, "validation_loss").points] == [0, 4, 8, 12, 16, 20]
    run.append_telemetry({"step": 21, "validation_loss": float("nan")})
    assert len(series(run, "validation_loss").points) == 6


def test_a_quantity_in_both_is_taken_from_the_longer_series(run):
    run_folders.add(run, step=30, mode="ste", extras={"flip_rate": 0.5})
    assert not series(run, "flip_rate").measured
    run.append_telemetry({"step": 30, "custom": 2.0})
    assert [point.estimate.value for point in series(run, "custom").points] == [1.0] * 4


def test_a_quantity_that_is_not_there_is_answered_with_those_that_are(run):
    with pytest.raises(InputError, match=r"has no 'nope': choose among negative_share, .*training_loss.*custom"):
        series(run, "nope")
    assert set(ESTIMATES) <= set(available(run))
    assert "step" not in available(run)


def test_a_run_without_records_still_has_its_telemetry(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run.append_telemetry({"step": 1, "loss": 2.0})
    assert [point.estimate.value for point in series(run, "loss").points] == [2.0]
    with pytest.raises(InputError, match="holds no spectrum yet"):
        select(run)


def test_a_study_stands_for_its_runs(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    one, other = study.runs
    assert [run.folder for run in as_runs(study)] == [one.folder, other.folder]
    assert [run.folder for run in as_runs([str(one.folder), other])] == [one.folder, other.folder]


def test_names_are_written_out():
    assert describe("rms").axis == "root-mean-square eigenvalue (loss per parameter²)"
    assert describe("some_key").axis == "some key"
