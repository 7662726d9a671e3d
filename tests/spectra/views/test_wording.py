from dataclasses import replace

import run_folders

from spectra.views.wording import axis_name, describe, listed, mode_meaning, tolerance


def test_a_quantity_is_named_by_the_first_run_that_describes_it(tmp_path):
    shown = [{}, {"quantities": {"rms": {"name": "size", "unit": "m"}}}, {"quantities": {"rms": {"name": "other"}}}]
    runs = [run_folders.Run.create(tmp_path / str(at), {"presentation": entry}) for at, entry in enumerate(shown)]
    assert describe(runs, "rms").axis == "size (m)"
    assert describe(runs[:1], "rms").name == "root-mean-square eigenvalue"
    assert describe(runs, "my_key").name == "my key"


def test_a_mode_is_explained_by_the_first_run_that_does(tmp_path):
    runs = [
        run_folders.Run.create(tmp_path / "a"),
        run_folders.Run.create(tmp_path / "b", {"presentation": {"modes": {"m": "M"}}}),
    ]
    assert mode_meaning(runs, "m") == "M"
    assert mode_meaning(runs[:1], "m") == "a Hessian that the caller supplied"
    assert mode_meaning(runs, "full") == "the Hessian of the loss in the model's own weights"


def test_every_tolerance_of_the_runs_is_named(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    record = run_folders.record(run_folders.density())
    for size in (0.01, 0.001, 0.01):
        run.append(replace(record, near_zero_tol=size))
    assert tolerance([run]) == "0.001 or 0.01"
    assert axis_name([run], "near_zero_share") == "near-zero share (|λ| < 0.001 or 0.01)"
    assert axis_name([run], "trace") == "trace (loss per parameter²)"


def test_lists():
    assert [listed(items) for items in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
