"""Several seeds: a run each, in folders with their names, and their spread by hand."""

import json
from statistics import stdev

import pytest

from qat.study.config import StudyConfig
from qat.study.plan import plan_of, queue
from qat.study.seeds import as_text, in_words, spread_rows
from qat.study.table import markdown, terminal
from qat.training.config import TrainConfig
from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate


def row(seed, loss, steps, *, rms=1.0, resolved=True, method="winq"):
    return {
        "label": f"2-bit WinQ, seed {seed}",
        "bits": 2.0,
        "method": method,
        "seed": seed,
        "validation_loss": loss,
        "perplexity": 10 * loss,
        "steps": 8,
        "steps_to_baseline_loss": steps,
        "mode": "ste",
        "rms_end": Estimate(rms, rms - 0.1, rms + 0.1, resolved, "" if resolved else "why"),
    }


ROWS = [row(0, 2.0, 7.0), row(1, 2.5, None, rms=9.0, resolved=False), row(5, 3.0, 5.0, rms=2.0)]


def test_the_spread_is_mean_range_and_standard_deviation():
    (spread,) = spread_rows(ROWS)
    assert (spread["label"], spread["seeds"]) == ("2-bit WinQ, 3 seeds", [0, 1, 5])
    assert spread["validation_loss"] == {"mean": 2.5, "low": 2.0, "high": 3.0, "sd": stdev([2.0, 2.5, 3.0]), "runs": 3}
    steps = {"mean": 6.0, "low": 5.0, "high": 7.0, "sd": stdev([7.0, 5.0]), "runs": 2}
    assert spread["steps_to_baseline_loss"] == steps
    assert spread["rms_end"]["runs"] == 2  # what is not resolved has no value to take a mean of
    assert spread["rms_end"]["mean"] == 1.5


def test_the_spread_in_words_and_in_tables():
    spread = spread_rows(ROWS)
    (line,) = in_words(spread)
    words = "validation loss 2.5000 on average, from 2.0000 to 3.0000, standard deviation 0.5000"
    assert line == f"2-bit WinQ, 3 seeds: {words}"
    (text,) = as_text(spread)
    assert text["validation_loss"] == "2.5000 (2.0000 to 3.0000)"
    assert text["steps_to_baseline_loss"] == "6 (5 to 7, 2 of 3 runs)"
    assert f"* {line}" in markdown(ROWS, spread=spread)
    assert "bits  method  seed  validation loss" in terminal(ROWS)


def test_one_seed_has_no_spread():
    alone = {name: value for name, value in ROWS[0].items() if name != "seed"}
    assert spread_rows([alone]) == spread_rows(ROWS[:1]) == []
    assert "seed" not in terminal([alone])


def test_runs_of_several_seeds_have_folders_and_labels_of_their_own():
    config = StudyConfig(out="study", bits=(2,), seeds=(3, 1, 3))
    assert (config.seeds, config.train.seed) == ((3, 1), 3)
    plan = plan_of(config)
    assert [run.folder.name for run in plan] == [
        *("full-precision-seed3", "full-precision-seed1", "2bit-baseline-seed3", "2bit-baseline-seed1"),
        *("2bit-winq-seed3", "2bit-winq-seed1"),
    ]
    labels = ["full precision, seed 3", "full precision, seed 1", "2-bit baseline, seed 3"]
    assert [run.label for run in plan[:3]] == labels
    one = StudyConfig(out="study", bits=(2,), seeds=(3,), train=TrainConfig(seed=0))
    assert [run.folder.name for run in plan_of(one)] == ["full-precision", "2bit-baseline", "2bit-winq"]
    assert (one.train.seed, one.seeds) == (3, ())
    assert "seeds" not in one.to_config()
    assert config.to_config()["seeds"] == (3, 1)


def test_runs_with_one_start_are_far_apart_where_several_are_trained_at_once():
    plan = plan_of(StudyConfig(out="study", bits=(1, 2, 4)))
    assert queue(plan, workers=1) == list(range(7))
    assert [plan[index].folder.name for index in queue(plan, workers=2)] == [
        *("1bit-baseline", "2bit-baseline", "4bit-baseline", "1bit-winq", "2bit-winq", "4bit-winq", "full-precision")
    ]


def test_seeds_out_of_range_are_refused():
    with pytest.raises(InputError, match="from 0 to 4294967295, got -1"):
        StudyConfig(out="study", seeds=(0, -1))


def test_the_spread_is_strict_json(tmp_path):
    from qat.study.seeds import write_spread

    write_spread(spread_rows(ROWS), tmp_path)
    assert json.loads((tmp_path / "seeds.json").read_text())[0]["validation_loss"]["mean"] == 2.5
