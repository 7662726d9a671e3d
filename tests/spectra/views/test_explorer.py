"""The model behind the widget, without a browser: controls are set, traces and words are read."""

import numpy as np
import pytest
import run_folders

pytest.importorskip("plotly")
pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")

from spectra.backend.errors import InputError
from spectra.views.choices import Choices
from spectra.views.explorer import TRACES, Explorer


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_folders.study_folder(tmp_path_factory.mktemp("study") / "s", reference=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run_folders.run_folder(tmp_path_factory.mktemp("run") / "a_$x$", modes=("full", "ste"))


def explorer(runs):
    return Explorer(Choices(runs), level=0.95)


def drawn(view):
    """The traces of each spectrum."""
    return [view.figure.data[first : first + TRACES] for first in range(0, len(view.figure.data), TRACES)]


def test_the_band_on_screen_is_that_of_the_stored_matrices(single):
    view = explorer(single)
    ((lower, upper, middle, said),) = drawn(view)
    points = view.axis.values(np.asarray(lower.x))
    band = single.density(single.records[-2]).band(0.95, thresholds=view.bands[0].points, tails=True)
    assert single.records[-2].mode == "full"
    assert single.records[-2].step == 20
    low, high = band.at(view.bands[0].points)
    np.testing.assert_allclose(points, view.bands[0].points, rtol=1e-12)
    np.testing.assert_array_equal(lower.y, low)
    np.testing.assert_array_equal(upper.y, high)
    assert upper.fill == "tonexty"
    narrow = high - low <= 0.1
    assert narrow.any()
    assert not narrow.all()
    assert np.array_equal(np.isfinite(np.asarray(middle.y, dtype=float)), narrow)
    assert [("not resolved" in words) for words in said.text] == (~narrow).tolist()


def test_a_slider_changes_the_traces_and_the_numbers(study):
    view = explorer(study)
    assert [len(drawn(view)), view.controls["step"].value] == [3, 20]
    before = [np.array(trace.x) for trace in view.figure.data], view.figure.layout.title.text
    view.controls["step"].value = 0
    after = [np.array(trace.x) for trace in view.figure.data], view.figure.layout.title.text
    assert view.figure.layout.title.text.startswith("Step 0<br>")
    assert before[1] != after[1]
    shares = np.array([trace.y for trace in drawn(view)[0][:2]])
    low, high = view.shown[0].curve.density.band(thresholds=view.bands[0].points, tails=True).at(view.bands[0].points)
    np.testing.assert_array_equal(shares, [low, high])
    assert view.shown[0].curve.density.lambda_max().value == pytest.approx(8.0)
    view.controls["group"].value = "2-bit"
    assert "2-bit baseline: negative share 0." in view.figure.layout.title.text
    assert view.choice.step == 0
    view.controls["step"].value = 10  # with a second spectrum after the reset
    assert len(drawn(view)) == 4
    assert drawn(view)[2][2].line.dash != drawn(view)[1][2].line.dash


def test_the_title_has_the_negative_share_of_the_record_and_says_why_it_is_not_resolved(single):
    view = explorer(single)
    share = view.shown[0].negative_share
    assert share == single.records[-2].estimates["negative_share"]
    assert not share.resolved
    assert view.figure.layout.title.text == f"Step 20, Hessian mode full: negative share {share}"
    assert f"not resolved: {share.reason[:20]}" in view._remarks.value


def test_a_zoom_in_the_figure_computes_the_band_anew_between_its_ends(single):
    view = explorer(single)
    wide = view.bands[0]
    ends = view.axis.positions(np.array([-0.02, 0.02])).tolist()
    view.figure.plotly_relayout({"xaxis.range": ends})  # what the browser sends
    near = view.bands[0]
    inside = [np.count_nonzero(np.abs(band.points) <= 0.02) for band in (wide, near)]
    assert inside[1] >= 400 > inside[0]
    at = np.array([-0.01, 0.0, 0.01])
    truth = [np.mean(0.8 * run_folders.eigenvalues() < value) for value in at]
    low, high = (np.interp(at, near.points, side) for side in (near.low, near.high))
    assert np.all(low <= truth)
    assert np.all(truth <= high)
    np.testing.assert_allclose(view.figure.layout.xaxis.range, ends)
    names = [float(name.replace("−", "-")) for name in view.figure.layout.xaxis.ticktext]
    assert len(names) >= 3
    assert max(map(abs, names)) <= 0.02
    view.controls["step"].value = 10  # keeps the range
    assert view.axis.seen == pytest.approx((-0.02, 0.02))
    view.figure.plotly_relayout({"xaxis.autorange": True})  # a double click
    assert view.axis.seen == view.axis.whole


def test_scales(single):
    view = explorer(single)
    view.zoom(0.5, 2.0)
    view.controls["scale"].value = "linear"
    assert view.axis.seen == view.axis.whole
    np.testing.assert_array_equal(drawn(view)[0][0].x, view.bands[0].points)
    assert view.figure.layout.shapes[0].visible
    view.controls["scale"].value = "log"
    assert np.all(view.bands[0].points > 0)
    assert not view.figure.layout.shapes[0].visible
    np.testing.assert_allclose(drawn(view)[0][0].x, np.log10(view.bands[0].points))
    view.controls["share_scale"].value = "log"
    assert view.figure.layout.yaxis.type == "log"
    assert np.asarray(drawn(view)[0][0].y).min() > 0
    with pytest.raises(InputError, match="positive eigenvalues"):
        view.zoom(-1.0, 1.0)


def test_runs_and_modes_are_switched(study, single):
    view = explorer(study)
    colours = [trace[2].line.color for trace in drawn(view)]
    assert colours == ["#d55e00", "#d55e00", "#000000"]
    view.controls["run 1"].value = False
    assert [trace[2].line.color for trace in drawn(view)] == colours[1:]
    assert "baseline" not in view.figure.layout.title.text
    for name in ("run 2", "run 3"):
        view.controls[name].value = False
    assert not view.figure.data
    assert "No spectrum is switched on" in view._remarks.value
    view = explorer(single)
    assert view.controls["mode"].options == (("full", "full"), ("ste", "ste"))
    view.controls["mode"].value = "ste"
    assert "Hessian mode ste" in view.figure.layout.title.text
    assert not [name for name in view.controls if name.startswith("run")]


def test_controls_without_a_choice_are_not_displayed(tmp_path):
    view = explorer(run_folders.run_folder(tmp_path / "one", marks=((5, ""),)))
    assert [view.controls[name].layout.display for name in ("group", "step", "mode")] == ["none"] * 3


def test_names_are_shown_as_they_are(tmp_path):
    shown = {"label": "<b>$x$</b> & y"}
    runs = [
        run_folders.run_folder(tmp_path / name, marks=((5, ""),), presentation=shown | {"group": "g"}) for name in "ab"
    ]
    view = explorer(runs)
    assert drawn(view)[0][2].name == "&lt;b&gt;&#36;x&#36;&lt;/b&gt; &amp; y"
    assert "&lt;b&gt;" in view.figure.layout.title.text
    assert "$" not in view.figure.layout.title.text


def test_a_notebook_keeps_a_picture_for_viewers_without_a_kernel(study):
    bundle = explorer(study)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")
