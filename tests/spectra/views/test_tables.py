import math

import pytest
import run_folders

from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import Quantity
from spectra.views.tables import estimates_of_rows, estimates_of_run, number, results

ONE, OTHER = Estimate(0.5, 0.25, 0.75), Estimate(0.625, 0.5, 0.875)


def texts(table):
    return [[cell.text for cell in row.cells] for row in table.rows]


def test_rows_are_called_by_their_label_and_every_other_column_is_plain():
    rows = [
        {"bits": 2, "method": "winq", "label": "2-bit WinQ", "perplexity": 12.5, "done": True, "rms_end": ONE},
        {"bits": 4, "method": "other", "rms_end": OTHER},
    ]
    table = results(rows)
    assert table.columns == ["Run", "Bits", "Method", "Perplexity", "Done"]
    assert texts(table) == [["2-bit WinQ", "2", "winq", "12.50", "yes"], ["row 2", "4", "other", "–", "–"]]
    estimates = estimates_of_rows(rows)
    assert estimates.columns == ["2-bit WinQ", "row 2"]
    assert texts(estimates) == [["0.50", "0.62"]]


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


def test_without_labels_there_is_no_column_of_names():
    table = results([{"steps": 5, "note": None}, {"steps": 6}])
    assert table.columns == ["Steps", "Note"]
    assert texts(table) == [["5", "–"], ["6", "–"]]


def test_columns_are_named_by_who_describes_them():
    about = {"rms": Quantity("size", "unit"), "time": Quantity("wall time")}
    rows = [{"time": 3, "rms_end": ONE}]
    assert results(rows, describe=about.__getitem__).columns == ["Wall time"]
    (row,) = estimates_of_rows(rows, describe=about.__getitem__).rows
    assert (row.heading, row.detail, row.stage) == ("Size", "unit", "end")


def test_rows_of_several_modes_say_which():
    rows = [{"label": "a", "mode": "one", "rms_end": ONE}, {"label": "a", "mode": "two", "rms_end": OTHER}]
    assert estimates_of_rows(rows).columns == ["a, one", "a, two"]
    assert estimates_of_rows([row | {"mode": "one"} for row in rows]).columns == ["a", "a"]


def test_records_are_called_in_the_words_of_the_run(tmp_path):
    shown = {"labels": {"after-reset": "after the reset"}, "quantities": {"trace": {"name": "sum", "unit": "J"}}}
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS, presentation=shown)
    table = estimates_of_run(run)
    names = ["step 0, start", "step 10, before reset", "step 10, after the reset", "step 20, end"]
    assert table.columns == names
    assert ("Sum", "J") in [(row.heading, row.detail) for row in table.rows]


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
