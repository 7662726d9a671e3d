import math

import pytest
import run_folders

from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import Quantity
from spectra.views import tables
from spectra.views.tables import Column, estimates_of_rows, estimates_of_runs, results
from spectra.views.wording import number

ONE, OTHER = Estimate(0.5, 0.25, 0.75), Estimate(0.625, 0.5, 0.875)


def texts(table):
    return [[cell.text for cell in row.cells] for row in table.rows]


def headings(table):
    return [row.heading for row in table.rows]


def test_rows_are_called_by_their_label_and_every_other_column_is_plain():
    rows = [
        {"bits": 2, "method": "winq", "label": "2-bit WinQ", "perplexity": 12.5, "done": True, "rms_end": ONE},
        {"bits": 4, "method": "other", "rms_end": OTHER},
    ]
    table = results(rows)
    assert [column.name for column in table.columns] == ["Run", "Bits", "Method", "Perplexity", "Done"]
    assert headings(table) == ["2-bit WinQ", "row 2"]
    assert texts(table) == [["2", "winq", "12.50", "yes"], ["4", "other", "–", "–"]]
    assert [[cell.order for cell in row.cells] for row in table.rows] == [[2, None, 12.5, None], [4, None, None, None]]
    estimates = estimates_of_rows(rows)
    assert headings(estimates) == ["2-bit WinQ, end", "row 2, end"]
    assert texts(estimates) == [["0.50"], ["0.62"]]
    assert [row.cells[0].order for row in estimates.rows] == [0.5, 0.625]


def test_training_steps_are_whole_where_a_curve_was_interpolated():
    rows = [
        {"label": "a", "steps": 128, "steps_to_baseline_loss": 89.32},
        {"label": "b", "steps_to_baseline_loss": None},
    ]
    assert texts(results(rows)) == [["128", "89"], ["–", "–"]]


def test_quantities_stand_across_and_stages_and_modes_below_each_other():
    rows = [
        {"label": "a", "mode": "ste", "rms_start": ONE, "rms_end": OTHER, "trace_end": ONE, "latent_rms_end": OTHER},
        {"label": "b", "mode": "ste", "rms_end": ONE, "frobenius_end": ONE},
    ]
    table = estimates_of_rows(rows)
    assert [column.name for column in table.columns] == ["Run", "Root-mean-square eigenvalue", "Trace"]
    assert headings(table) == ["a, ste, start", "a, ste, end", "a, latent, end", "b, ste, end"]
    assert texts(table) == [["0.50", "–"], ["0.62", "0.50"], ["0.62", "–"], ["0.50", "–"]]


@pytest.mark.parametrize(
    ("estimate", "text", "interval"),
    [
        (Estimate(0.5, 0.2541, 0.7519), "0.50", "[0.25, 0.76]"),
        (Estimate(-2.345e-7, -2.5e-7, -2.1e-7), "−2.34·10⁻⁷", "[−2.5·10⁻⁷, −2.1·10⁻⁷]"),
        (Estimate(12345.0, 9876.0, 15432.0), "12,300", "[9,800, 15,500]"),
        (Estimate(2.5, -math.inf, math.inf), "2.5", "[−∞, ∞]"),
        (Estimate(2.5, 2.5, 2.5), "2.500", ""),
        (Estimate(math.nan, -math.inf, math.inf), "not finite", "[−∞, ∞]"),
    ],
)
def test_an_estimate_has_the_digits_of_its_interval(estimate, text, interval):
    ((cell,),) = [row.cells for row in estimates_of_rows([{"rms_end": estimate}]).rows]
    assert (cell.text, cell.interval) == (text, interval)


def test_without_labels_rows_have_numbers():
    table = results([{"steps": 5, "note": None}, {"steps": 6}])
    assert [column.name for column in table.columns] == ["Run", "Steps", "Note"]
    assert headings(table) == ["row 1", "row 2"]
    assert texts(table) == [["5", "–"], ["6", "–"]]


def test_columns_are_named_by_who_describes_them():
    about = {"rms": Quantity("size", "unit"), "time": Quantity("wall time")}
    rows = [{"time": 3, "rms_end": ONE}]
    assert results(rows, describe=about.__getitem__).columns == [Column("Run"), Column("Wall time")]
    assert estimates_of_rows(rows, describe=about.__getitem__).columns == [Column("Run"), Column("Size", "unit")]


def test_rows_of_several_modes_say_which():
    rows = [{"label": "a", "mode": "one", "rms_end": ONE}, {"label": "a", "mode": "two", "rms_end": OTHER}]
    assert headings(estimates_of_rows(rows)) == ["a, one, end", "a, two, end"]
    assert headings(estimates_of_rows([row | {"mode": "one"} for row in rows])) == ["a, end", "a, end"]


def test_records_are_called_in_the_words_of_the_run(tmp_path):
    shown = {"labels": {"after-reset": "after the reset"}, "quantities": {"trace": {"name": "sum", "unit": "J"}}}
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS, presentation=shown)
    table = estimates_of_runs([run], describe=run.presentation.describe)
    assert headings(table) == ["step 0, start", "step 10, before reset", "step 10, after the reset", "step 20, end"]
    assert Column("Sum", "J") in table.columns
    assert table.columns[0] == Column("Training step")
    assert {len(row.cells) + 1 for row in table.rows} == {len(table.columns)}


def test_many_records_are_thinned_and_those_of_several_runs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_RECORDS", 4)
    many = run_folders.run_folder(tmp_path / "a", marks=[(step, "") for step in range(7)])
    few = run_folders.run_folder(tmp_path / "b", marks=[(3, "")])
    found = headings(estimates_of_runs([many, few]))
    assert found == ["a, step 0", "a, step 2", "a, step 4", "a, step 6", "b, step 3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-2.0, "−2"),
        (123456, "123,456"),
        (0.43214, "0.4321"),
        (4.15, "4.150"),
        (4567.8, "4,568"),
        (-1.2344e-7, "−1.234·10⁻⁷"),
        (2.5e12, "2.500·10¹²"),
        (float("nan"), "not finite"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text
