"""The table: when a curve reaches a loss, and rows as JSON, Markdown and text."""

import json
import math

import pytest
import run_folders

from qat.study import table
from spectra.estimates.estimate import Estimate

CURVE = ((0, 5.0), (10, 4.0), (20, 3.0), (30, 3.5))


@pytest.mark.parametrize(
    ("loss", "step"), [(6.0, 0), (5.0, 0), (4.5, 5), (4.0, 10), (3.25, 17.5), (3.0, 20), (2.9, None), (math.nan, None)]
)
def test_steps_to_a_loss_are_read_off_straight_lines(loss, step):
    assert table.steps_to(loss, CURVE) == (step if step is None else pytest.approx(step))


def row(bits, method, loss, **more):
    estimate = Estimate(0.5, 0.4, 0.6)
    return {
        "bits": bits,
        "method": method,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "steps": 20,
        "mode": "ste",
        "trace_start": estimate,
        "trace_end": estimate,
        "rms_start": estimate,
        "rms_end": Estimate(0.123456, 0.1, math.inf, False, "why"),
    } | more


def rows():
    given = [row(1.58, "baseline", 3.0), row(1.58, "winq", 2.5), row(2, "baseline", 3.0), row(2, "winq", 3.1)]
    curves = [
        ((0, 4.0), (10, 2.9), (20, 3.0)),
        ((0, 4.0), (20, 2.5)),
        ((0, 4.0), (20, 3.0)),
        ((0, 4.0), (20, 3.1)),
    ]
    return table.with_steps_to_baseline(given, curves)


def test_every_curve_is_held_against_the_last_loss_of_its_baseline():
    steps = [one["steps_to_baseline_loss"] for one in rows()]
    assert steps[0] == pytest.approx(100 / 11)  # the baseline too: it had been there before
    assert steps[1] == pytest.approx(40 / 3)
    assert steps[2] == 20
    assert steps[3] is None


def test_without_a_baseline_there_is_nothing_to_reach():
    (alone,) = table.with_steps_to_baseline([row(2, "winq", 3.0)], [((0, 4.0), (20, 3.0))])
    assert alone["steps_to_baseline_loss"] is None


def test_json_holds_every_number_and_reads_back(tmp_path):
    table.write_table(rows(), tmp_path, heading="A heading.")
    read = json.loads((tmp_path / "table.json").read_text())
    assert [(one["bits"], one["method"]) for one in read] == [(r["bits"], r["method"]) for r in rows()]
    assert read[0]["validation_loss"] == 3.0
    assert read[3]["steps_to_baseline_loss"] is None
    end = Estimate.from_dict(read[0]["rms_end"])
    assert end == Estimate(0.123456, 0.1, math.inf, False, "why")


def test_markdown_has_a_column_for_everything_and_marks_the_unresolved(tmp_path):
    table.write_table(rows(), tmp_path, heading="A heading.")
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("A heading.\n\n| bits | method | validation loss | perplexity | steps | steps to baseline")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.58 | winq | 2.5000 | 12.18 | 20 | 13 |" in text
    assert "| 0.1235? [0.1, inf] |" in text
    assert "| not reached |" in text


def test_a_terminal_gets_aligned_blocks_with_a_row_for_each_run():
    blocks = table.terminal(rows()).split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        heading, *lines = block.splitlines()
        assert len(lines) == 4
        assert max(map(len, [heading, *lines])) <= 130
        column = heading.index("method")
        assert [line[column:].split()[0] for line in lines] == ["baseline", "winq", "baseline", "winq"]
    assert "not reached" in blocks[0]
    assert blocks[1].splitlines()[0].split("  ")[-1].strip() == "trace end"


def test_the_report_reads_words_where_a_loss_was_not_reached():
    assert [one["steps_to_baseline_loss"] for one in table.for_report(rows())] == ["9", "13", "20", "not reached"]


def test_spectral_columns_are_the_first_and_the_last_record_of_each_mode(tmp_path):
    run = run_folders.run_folder(tmp_path / "run", modes=("ste", "latent"))
    columns = table.spectrum_columns(run.records)
    of = {mode: [record for record in run.records if record.mode == mode] for mode in ("ste", "latent")}
    assert columns["rms_start"] == of["ste"][0].estimates["rms"]
    assert columns["rms_end"] == of["ste"][-1].estimates["rms"] != columns["rms_start"]
    assert columns["latent_lambda_max_end"] == of["latent"][-1].estimates["lambda_max"]
    assert len(columns) == 2 * 2 * 9
