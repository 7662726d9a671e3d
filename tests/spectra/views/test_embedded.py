import re
from xml.etree import ElementTree

import numpy as np
import pytest
import run_folders

from spectra.views import marks, plots
from spectra.views.embedded import embedded
from spectra.views.style import new_figure


def drawn(draw):
    figure, axes = new_figure()
    draw(axes[0])
    return embedded(figure, "the-name", described='a "b" <c>')


def test_the_element_has_known_tags_alone_and_ids_of_its_own():
    def draw(ax):
        ax.plot([0, 1], [0, 1], label="<script>x</script>")
        ax.fill_between([0, 1], [0, 1], [1, 2], hatch="//", facecolor="none")
        ax.set_title("a < b & c")

    got = drawn(draw)
    root = ElementTree.fromstring(got.svg)
    tags = {element.tag.partition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "path", "use", "defs", "clipPath", "rect", "text", "tspan", "pattern"}
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("the_name-") for name in ids)
    pointed = re.findall(r'(?:url\(|href=")#([^)"]+)', got.svg)
    assert len(pointed) > 3
    assert set(pointed) <= set(ids)
    assert root.attrib["aria-label"] == 'a "b" <c>'
    assert "a < b & c" in [element.text for element in root.iter()]
    assert 'fill="none"' in got.svg  # the ground of a hatch, which is black otherwise


def test_numbers_that_are_read_keep_their_digits():
    """Coordinates are shortened, and a tick at 0.0502 must not become 0.05."""

    def draw(ax):
        ax.plot([0, 1 / 3], [0.05, 0.0502], label="eigenvalue: -0.00327")
        ax.set_yticks([0.05, 0.0502], ["0.0500", "0.0502"])
        ax.legend()

    got = drawn(draw)
    read = [element.text for element in ElementTree.fromstring(got.svg).iter() if element.text]
    assert {"0.0500", "0.0502", "eigenvalue: -0.00327"} <= set(read)
    drawn_at = [element.attrib["d"] for element in ElementTree.fromstring(got.svg).iter() if "d" in element.attrib]
    assert not re.search(r"\d\.\d{3}", " ".join(drawn_at))


def test_readings_stand_where_the_curve_is_drawn(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    got = drawn(lambda ax: plots.trajectory(run, "lambda_max", ax=ax))
    (panel,) = got.panels
    (series,) = panel["series"]
    assert (series["name"], series["axis"], series["cells"]) == ("a", "step ", False)
    lambda_max = run.records[1].estimates["lambda_max"]
    assert series["says"][1] == "{} [{}, {}]".format(*lambda_max.rounded())
    assert series["says"][0].endswith(", start")
    left, _, width, _ = panel["box"]
    root = ElementTree.fromstring(got.svg)
    uses = [element for element in root.iter() if element.tag.endswith("use")]
    inside = [part for part in root.iter() if part.attrib.get("class") == "series"]
    assert {part.attrib["data-series"] for part in inside} == {"0"}
    spots = sorted({float(use.attrib["x"]) for part in inside for use in part.iter() if use in uses} - {0.0})
    np.testing.assert_allclose([left + width * at for at in series["at"]], spots, atol=0.05)


@pytest.mark.parametrize("kind", ["cumulative", "tails", "density", "ridge"])
def test_the_axis_and_the_points_of_a_spectrum_are_those_of_the_figure(kind, tmp_path):
    run = run_folders.run_folder(tmp_path / "a", marks=((0, ""), (10, "")))
    got = drawn(
        lambda ax: (
            getattr(plots, kind)(run, ax=ax, steps=None, scale="symlog") if kind != "tails" else plots.tails(run, ax=ax)
        )
    )
    (panel,) = got.panels
    assert panel["x"]["kind"] == ("log" if kind == "tails" else "symlog")
    assert (panel["y"] is None) == (kind == "ridge")
    for series in panel["series"]:
        assert len(series["at"]) == len(series["says"]) > 5
        assert 0 <= min(series["at"]) < max(series["at"]) <= 1
        assert series["at"] == sorted(series["at"])
    if kind == "cumulative":
        low, high = panel["x"]["ends"]
        first = panel["series"][0]
        threshold, stretch = panel["x"]["threshold"], panel["x"]["stretch"]
        place = low + (high - low) * first["at"][-1]
        value = threshold * 10 ** (place / threshold - stretch)
        assert value == pytest.approx(run.records[0].estimates["lambda_max"].high, rel=1e-2)
        assert first["says"][-1] in ("100–100 % below", "99–100 % below")


def test_the_legend_knows_which_curves_it_names(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    got = drawn(lambda ax: plots.trajectory(study, "rms", ax=ax))
    entries = re.findall(r'class="entry" data-series="(\d)"', got.svg)
    assert sorted(entries) == ["0", "1"]
    names = {series["series"]: series["name"] for series in got.panels[0]["series"]}
    assert names == {0: "2-bit baseline", 1: "2-bit WinQ"}


def test_a_figure_that_notes_nothing_has_no_panels():
    assert drawn(lambda ax: ax.plot([1, 2])).panels == []
    figure, _ = new_figure()
    assert marks.readings_of(figure) == []
