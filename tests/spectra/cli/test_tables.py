import run_folders

from spectra.cli.tables import aligned, quantity_name


def test_columns_are_aligned_and_no_line_ends_in_spaces():
    rows = [("quantity", "value", ""), ("trace", "-1", "a note"), ("rms", "10.25", "")]
    assert aligned(rows, "<><") == ["quantity  value", "trace        -1  a note", "rms       10.25"]


def test_the_tolerance_stands_where_the_number_depends_on_it():
    record = run_folders.record(run_folders.density())
    assert quantity_name("near_zero_share", record) == "near-zero share (|λ| < 0.001)"
    assert quantity_name("trace", record) == "trace"
