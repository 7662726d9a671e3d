import json

import pytest
import run_folders

from spectra.estimates.quantities import describe
from spectra.runs.folder import Run
from spectra.runs.presentation import Presentation

WRITTEN = {
    "label": "2-bit WinQ",
    "group": "2-bit",
    "color": "#0072B2",
    "line": "dashed",
    "reference": True,
    "modes": {"ste": "through the straight-through gradient"},
    "quantities": {
        "flip_rate": {"name": "flip rate", "unit": "%", "meaning": "share of the codes that changed"},
        "rms": {"name": "typical eigenvalue"},
    },
    "labels": {"after-reset": "after the reset"},
}


def shown(tmp_path, entries):
    return Run.create(tmp_path / "a-run", {"presentation": entries}).presentation


def test_what_the_config_says_is_read(tmp_path):
    got = shown(tmp_path, WRITTEN)
    plain = ("label", "group", "color", "line", "reference", "modes", "labels")
    assert {name: getattr(got, name) for name in plain} == {name: WRITTEN[name] for name in plain}
    flips = got.describe("flip_rate")
    assert (flips.name, flips.unit, flips.meaning) == ("flip rate", "%", "share of the codes that changed")


def test_a_quantity_is_described_by_the_run_then_by_spectra_then_by_its_key(tmp_path):
    got = shown(tmp_path, WRITTEN)
    assert got.describe("rms").name == "typical eigenvalue"
    assert got.describe("trace") == describe("trace")
    assert got.describe("some_key").name == "some key"
    assert Presentation.of(Run.create(tmp_path / "b")).describe("rms") == describe("rms")


def test_a_run_that_says_nothing_is_called_like_its_folder(tmp_path, monkeypatch):
    Run.create(tmp_path / "a-run")
    want = Presentation(label="a-run", group="a-run")
    assert Run(tmp_path / "a-run").presentation == want
    monkeypatch.chdir(tmp_path / "a-run")
    assert Run(".").presentation == want
    (tmp_path / "a-run" / "config.json").unlink()
    assert Run(".").presentation == want


@pytest.mark.parametrize("entries", [None, 3, "text", [], [1], {}, {"other": 1}])
def test_what_is_no_presentation_takes_all_defaults(tmp_path, entries):
    assert shown(tmp_path, entries) == Presentation(label="a-run", group="a-run")


@pytest.mark.parametrize("value", [None, 3, "", "  ", [], ["a", 2], {"a": 1}, {"a": {"name": 3}}, {"a": ["b"]}])
@pytest.mark.parametrize("key", WRITTEN)
def test_a_malformed_entry_takes_its_default_and_spoils_no_other(tmp_path, key, value):
    got = shown(tmp_path, WRITTEN | {key: value})
    want = shown(tmp_path / "default", {name: entry for name, entry in WRITTEN.items() if name != key})
    assert got == want


def test_of_quantities_only_the_malformed_are_left_out(tmp_path):
    entries = {"a": {"name": "first", "unit": 3}, "b": {"unit": "m"}, "c": "words", "d": {"name": " second "}}
    got = shown(tmp_path, {"quantities": entries})
    assert {key: (q.name, q.unit, q.meaning) for key, q in got.quantities.items()} == {
        "a": ("first", "", ""),
        "d": ("second", "", ""),
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("solid", "solid"),
        ("-.", "-."),
        ([0, [4, 2]], (0, (4, 2))),
        ([1.5, [4, 2, 1, 2]], (1.5, (4, 2, 1, 2))),
        ([4, 2], (0, (4, 2))),
        ("wavy", None),
        ([0, []], None),
        ([0, [0, 0]], None),
        ([0, [-1, 2]], None),
        ([0, ["a", 2]], None),
        ([None, [4, 2]], None),
        ([True, [4, 2]], None),
    ],
)
def test_a_line_is_one_that_matplotlib_draws(tmp_path, written, read):
    got = shown(tmp_path, {"line": written}).line
    assert got == read
    if got is not None:
        lines = pytest.importorskip("matplotlib.lines")
        lines.Line2D([], [], linestyle=got)


@pytest.mark.parametrize(
    ("written", "known"),
    [("#0072B2", True), ("#07b", True), ("black", True), ("C1", True), ("#12", False), ("#0072BX", False)],
)
def test_a_color_is_one_that_matplotlib_knows(tmp_path, written, known):
    colors = pytest.importorskip("matplotlib.colors")
    assert colors.is_color_like(written) == known
    assert shown(tmp_path, {"color": written}).color == (written if known else None)


def test_numbers_that_json_alone_can_write_are_refused(tmp_path):
    run = Run.create(tmp_path / "a-run")
    text = json.dumps({"presentation": {"line": [0, [float("inf"), 1]], "label": "kept"}})
    (run.folder / "config.json").write_text(text)
    assert (run.presentation.line, run.presentation.label) == (None, "kept")


def test_the_runs_of_a_study_say_how_they_are_shown(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,), reference=True)
    got = {run.folder.name: (run.presentation.label, run.presentation.reference) for run in study.runs}
    assert got == {
        "2bit-baseline": ("2-bit baseline", False),
        "2bit-winq": ("2-bit WinQ", False),
        "full-precision": ("full precision", True),
    }
