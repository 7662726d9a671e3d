import io
import sys

import pytest

from spectra.cli import progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_pipe_gets_a_line_now_and_then_with_the_time_left(clock, capsys):
    lines = progress.progress(None, "measuring", "products")
    lines.total = 480
    for _ in range(120):
        clock.now += 0.5
        lines.update()
    lines.set_postfix_str("loss 2.5")
    clock.now += progress.EVERY
    lines.update(120)
    lines.close()
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 60 of 480 products, 00:30, 03:30 left",
        "measuring: 120 of 480 products, 01:00, 03:00 left",
        "measuring: 240 of 480 products, 01:30, 01:30 left, loss 2.5",
    ]


def test_short_work_leaves_no_line(clock, capsys):
    lines = progress.progress(10, "measuring", "products")
    clock.now += progress.EVERY / 2
    lines.update(10)
    lines.close()
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length_has_no_time_left():
    assert progress.ProgressLines(None, "searching", "products").line(61.0) == "searching: 0 products, 01:01"


def test_work_that_grows_beyond_its_total_is_never_less_than_nothing_left():
    lines = progress.ProgressLines(10, "searching", "products")
    lines.n = 20
    assert lines.line(60.0).endswith("00:00 left")


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.progress(4, "measuring", "products")
    bar.update(2)
    bar.refresh()
    bar.close()
    assert "2/4" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[2].strip() == ""
