import numpy as np
import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.views.choices import Choice, Choices
from spectra.views.curves import curves_of
from spectra.views.style import PALETTE

RESET_STEP = 10


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_folders.study_folder(tmp_path_factory.mktemp("study") / "s", reference=True)


def test_groups_steps_and_modes_are_those_of_the_folders(study):
    choices = Choices(study)
    assert choices.groups == ["1-bit", "2-bit"]
    assert [run.presentation.label for run in choices.runs("2-bit")] == [
        "2-bit baseline",
        "2-bit WinQ",
        "full precision",
    ]
    assert choices.modes("1-bit") == [None]
    assert choices.steps("1-bit", None) == [0, 10, 20]
    assert choices.first() == Choice("1-bit", None, 20)


def test_a_step_shows_the_spectra_measured_at_it_in_the_colours_of_static_figures(study):
    choices = Choices(study)
    shown = choices.shown(Choice("1-bit", None, 20))
    static = curves_of(choices.runs("1-bit"), steps="last")
    assert [one.curve.colour for one in shown] == [curve.colour for curve in static]
    assert [one.curve.style["linestyle"] for one in shown] == [curve.style["linestyle"] for curve in static]
    for one, curve in zip(shown, static, strict=True):
        np.testing.assert_array_equal(one.curve.density.nodes, curve.density.nodes)
    at_reset = choices.shown(Choice("1-bit", None, RESET_STEP))
    names = ["1-bit baseline", "1-bit WinQ", "1-bit WinQ, after the reset", "full precision, step 0"]
    assert [one.name for one in at_reset] == names
    before, after = (one.curve.density.lambda_max().value for one in at_reset[1:3])
    assert before == pytest.approx(0.9 * 8)
    assert after == pytest.approx(1.2 * 8)


def test_a_run_switched_off_leaves_the_others_their_colours(tmp_path):
    runs = [run_folders.run_folder(tmp_path / name, marks=((20, ""),)) for name in "abc"]
    choices = Choices(runs)
    group = choices.groups[0]
    shown = choices.shown(Choice(group, None, 20, frozenset({1})))
    assert [one.name for one in shown] == ["a", "c"]
    assert [one.curve.colour for one in shown] == [PALETTE[0], PALETTE[2]]


def test_a_run_without_the_step_or_the_mode_is_named_and_not_drawn(tmp_path):
    long = run_folders.run_folder(tmp_path / "long", modes=("full", "ste"))
    short = run_folders.run_folder(tmp_path / "short", marks=((0, ""),))
    choices = Choices([long, short])
    group = choices.groups[0]
    assert choices.modes(group) == ["full", "ste"]
    choice = Choice(group, "full", 10)
    assert [one.name for one in choices.shown(choice)] == ["long"]
    assert choices.lacking(choice) == "No spectrum of the mode full at step 10: short"
    assert choices.lacking(Choice(group, "full", 0)) == ""
    assert choices.lacking(Choice(group, "ste", 0)) == "No spectrum of the mode ste at step 0: short"
    assert choices.lacking(Choice(group, "full", 10, frozenset({1}))) == ""


def test_a_choice_that_a_group_lacks_becomes_the_nearest(tmp_path):
    one = run_folders.run_folder(tmp_path / "one", marks=((0, ""), (7, "")))
    choices = Choices(one)
    assert choices.fitted(Choice("", "ste", 100, frozenset({5}))) == Choice("", None, 7)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"plots\.cumulative draws a SpectralDensity"):
        Choices(run_folders.density())
    with pytest.raises(InputError, match="holds no spectrum yet"):
        Choices(run_folders.Run.create(tmp_path / "empty"))
