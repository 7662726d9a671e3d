import run_folders

from spectra.cli.tables import aligned, known_digits, quantity_name
from spectra.estimates.estimate import Estimate


def test_columns_are_aligned_and_no_line_ends_in_spaces():
    rows = [("quantity", "value", ""), ("trace", "-1", "a note"), ("rms", "10.25", "")]
    assert aligned(rows, "<><") == ["quantity  value", "trace        -1  a note", "rms       10.25"]


def test_the_tolerance_stands_where_the_number_depends_on_it():
    record = run_folders.record(run_folders.density())
    assert quantity_name("near_zero_share", record) == "near-zero share (|λ| < 0.001)"
    assert quantity_name("trace", record) == "trace"


def test_a_value_has_the_digits_that_its_interval_knows():
    assert known_digits(Estimate(12.3456, 11.0, 13.6)) == "12.3"
    assert known_digits(Estimate(12.3456, 12.3456, 12.3456)) == "12.35"
    assert known_digits(Estimate(12.3456, -3.0, 28.0, False, "wide")) == "12?"
