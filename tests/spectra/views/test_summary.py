import pytest
import run_folders
import torch

from spectra.algorithms.slq import slq
from spectra.estimates.changes import compare
from spectra.operators.explicit import DiagonalOperator
from spectra.views.summary import summary


def parts(runs):
    return {part.heading: part.sentences for part in summary(runs)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_folders.study_folder(tmp_path_factory.mktemp("study") / "s", bits=(2,), reference=True)


def test_changes_along_each_run_are_those_of_its_first_and_last_spectrum(study):
    baseline = study.runs[0]
    first, last = baseline.density(baseline.records[0]), baseline.density(baseline.records[-1])
    change = compare(first, last, near_zero_tol=run_folders.TOLERANCE)["lambda_max"]
    ratio = 100 * (1 - change.ratio.value)
    assert ratio == pytest.approx(20, abs=0.1)  # the helper scales the spectrum by 1 - step / 100
    baseline_line, winq_line = parts(study.runs)["Along the training"]
    assert baseline_line.startswith("2-bit baseline, from step 0 to step 20: ")
    assert f"the largest eigenvalue {change.verdict}".replace(" % [", "\u00a0%\u00a0[") in baseline_line
    assert "the smallest eigenvalue became less negative by" in baseline_line
    assert winq_line.startswith("2-bit WinQ, ")


def test_runs_of_a_group_are_compared_at_the_end_and_no_difference_is_said_so(study):
    loss, difference = parts(study.runs)["Between runs, at the end"]
    values, _, why = loss.partition(". ")
    assert values == "Validation loss: 2-bit baseline 1.100 and 2-bit WinQ 1.100"
    assert why == "These are single trainings, so they have no interval."
    assert difference.startswith("2-bit WinQ against 2-bit baseline: No measurable difference in ")
    assert "not the same" not in difference  # the probe vectors were


def test_a_difference_is_in_the_words_of_a_difference(tmp_path):
    runs = []
    for name, scale in (("a", 1.0), ("b", 3.0)):
        run = run_folders.Run.create(tmp_path / name, {"presentation": {"group": "both"}})
        run_folders.add(run, scale=scale)
        runs.append(run)
    (sentence,) = parts(runs)["Between runs, at the end"]
    assert sentence.startswith("b against a: ")
    assert "the largest eigenvalue is higher by 200\u00a0%" in sentence
    assert "the smallest eigenvalue is more negative by 200\u00a0%" in sentence
    assert "rose" not in sentence


def test_what_is_unresolved_is_said_with_its_interval_and_by_run(study):
    lines = parts(study.runs[:2])["Not resolved"]
    (near_zero,) = [line for line in lines if line.startswith("Near-zero share")]
    assert near_zero.startswith("Near-zero share of every run: ")
    assert "Near-zero share of 2-bit baseline: " in "".join(parts([study.runs[0]])["Not resolved"])
    assert near_zero.endswith("it lies between 0.10 and 0.80.")


def test_the_caveat_names_what_the_runs_share(tmp_path):
    runs = []
    for name, rate in (("a", 0.1), ("b", 0.1)):
        run = run_folders.Run.create(tmp_path / name, {"learning_rate": rate, "schedule": "cosine", "seed": name})
        run_folders.add(run)
        runs.append(run)
    *_, caveat = parts(runs)["What the intervals do not hold"]
    assert caveat == (
        "Which method wins can depend on learning rate, schedule and seed. "
        "These runs have learning rate 0.1 and schedule cosine."
    )
    assert "method" not in " ".join(parts(runs[:1])["What the intervals do not hold"])


def test_the_caveat_is_silent_on_when_a_probe_measured_and_on_checkpoints(tmp_path):
    made = {"probe": {"schedule": {"every": 200}}, "measured": {"checkpoint": "model", "seed": 0}}
    for name, config in made.items():
        runs = [run_folders.Run.create(tmp_path / f"{name}-{i}", config) for i in range(2)]
        for run in runs:
            run_folders.add(run)
        first, *more = parts(runs)["What the intervals do not hold"]
        assert first.startswith("The intervals hold for these weights")
        wins = ["Which method wins can depend on learning rate, schedule and seed."]
        assert more == (wins if name == "probe" else [])


def test_spectra_of_different_parameters_are_left_out(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run_folders.add(run)
    small = slq(DiagonalOperator(torch.arange(9.0)), probes=2, steps=5)
    run.append(run_folders.record(small, step=4), small)
    assert "Along the training" not in parts([run])


def test_one_record_has_no_change_to_tell(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run_folders.add(run)
    assert set(parts([run])) <= {"Not resolved", "What the intervals do not hold"}


def test_runs_that_differ_in_their_seed_have_a_mean_and_a_range_and_are_compared_seed_by_seed(tmp_path):
    runs = []
    for method, loss in (("baseline", 2.0), ("winq", 1.0)):
        for seed in (0, 1):
            shown = {"label": f"{method}, seed {seed}", "group": "2-bit"}
            run = run_folders.Run.create(tmp_path / f"{method}-{seed}", {"seed": seed, "presentation": shown})
            run_folders.add(run)
            run.append_telemetry({"step": 0, "validation_loss": loss + seed / 2})
            runs.append(run)
    loss, *pairs = parts(runs)["Between runs, at the end"]
    assert loss == (
        "Validation loss: baseline 2.250 on average over 2 seeds, from 2 to 2.500 and "
        "winq 1.250 on average over 2 seeds, from 1 to 1.500."
    )
    compared = [pair.partition(":")[0] for pair in pairs]
    assert compared == [f"winq, seed {seed} against baseline, seed {seed}" for seed in (0, 1)]
