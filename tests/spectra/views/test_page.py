import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import run_folders

from spectra import report
from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.views.embedded import EmbeddedFigure


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def without_figures(monkeypatch):
    """For what is about the words and tables alone: drawing takes seconds."""
    for name in ("density_pictures", "trajectory_pictures"):
        monkeypatch.setattr(report, name, lambda run: [])


def page(path):
    return Page(path.read_text(encoding="utf-8"))


def study_rows(study):
    rows = []
    for run in [run for run in study.runs if not run.presentation.reference]:
        first, last = run.records[0], run.records[-1]
        row = {"label": run.presentation.label, "bits": run.config["bits"], "method": run.config["method"]}
        row |= {"perplexity": 12.5, "steps_to_loss": None}
        for moment, record in (("start", first), ("end", last)):
            row |= {f"{name}_{moment}": estimate.to_dict() for name, estimate in record.estimates.items()}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run and its report, with figures."""
    run = run_folders.run_folder(tmp_path_factory.mktemp("written") / "a", note="a <b> & c")
    return run, report.write(run)


def test_the_page_needs_nothing_else_and_is_well_formed(written):
    run, path = written
    assert path == run.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    got = Page(text)
    assert got.open == []
    assert len(got.all("svg")) == len(got.all("figure")) > 5
    assert not got.all("link")
    assert not got.all("img")
    assert not re.search(r"url\((?!#)|@import|src=\"|href=\"(?!#)|https?://(?!www.w3.org/2000/svg)", text)
    assert "a &lt;b&gt; &amp; c" in text  # what the run holds is text, never markup
    ids = [attributes["id"] for _, attributes in got.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert len(text) < 1_000_000


def test_every_figure_has_words_for_who_cannot_see_it(written):
    run, path = written
    got = page(path)
    texts = [attributes["aria-label"] for attributes in got.all("svg")]
    assert len(set(texts)) == len(texts)
    first, last = (run.records[at].estimates["lambda_max"].value for at in (0, -1))
    assert any(f"a from {first:.3g} to {last:.3g}" in text for text in texts)
    assert {attributes.get("scope") for attributes in got.all("th")} <= {"col", "row"}


def test_estimates_stand_with_their_intervals_and_unresolved_ones_with_their_reason(tmp_path, without_figures):
    run = run_folders.run_folder(tmp_path / "a")
    got = page(report.write(run))
    rms = run.records[1].estimates["rms"]
    value, low, high = rms.rounded()
    assert value in got.text
    assert f"[{low}, {high}]" in got.text or rms.low == rms.high
    assert got.text.count("○ 0.40 [0.10, 0.80]") == 3
    titles = [attributes["title"] for attributes in got.all("span") if "title" in attributes]
    assert titles.count(f"unresolved: {run_folders.UNRESOLVED.reason}") == 3
    assert f"3 of them, for example: {run_folders.UNRESOLVED.reason}" in got.text


def test_a_study_shows_its_table_by_row_and_its_estimates_at_start_and_end(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study")
    rows = study_rows(study)
    from_rows = report.write(study.folder, table=rows, title="Bits & methods")
    want = from_rows.read_text()
    (study.folder / "table.json").write_text(json.dumps(rows))
    assert report.write(study, title="Bits & methods").read_text() == want  # the same, and the same again
    got = Page(want)
    assert got.text.startswith("Bits & methods")
    assert "Run Bits Method Perplexity Steps to loss" in got.text
    assert "1-bit baseline 1 baseline 12.50 –" in got.text
    assert "2-bit WinQ 2 winq 12.50 –" in got.text
    assert "nested.alpha 0.4" in got.text
    for stage in ("start", "end"):
        share = Estimate.from_dict(rows[0][f"negative_share_{stage}"])
        value, low, high = share.rounded()
        mark = "" if share.resolved else "○ "
        assert f"1-bit baseline, {stage} {mark}{value} [{low}, {high}]" in got.text
    largest = Estimate.from_dict(rows[0]["lambda_max_start"]).value
    orders = [float(cell["data-order"]) for cell in got.all("td") if cell.get("data-name") == "Largest eigenvalue"]
    assert orders[0] == largest
    assert len(orders) == 8


def test_the_spectrum_that_the_others_are_compared_with_leads_the_table(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,), reference=True)
    got = page(report.write(study, table=study_rows(study)[:2]))
    value, low, high = study.runs[-1].records[0].estimates["rms"].rounded()
    numbers = got.text.partition("At the start and the end of training")[2]
    first = numbers.index("full precision, full, start")
    assert first < numbers.index("2-bit baseline, start")
    assert f"{value} [{low}, {high}]" in numbers[first:] or low == high
    rows = [*study_rows(study)[:2], {"label": "full precision", "rms_start": Estimate(0.5, 0.25, 0.75)}]
    again = page(report.write(study, table=rows)).text
    assert again.count("full precision, start") == 1  # a study's own row for it is the only one


def test_several_runs_and_studies_stand_side_by_side(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    run = run_folders.run_folder(tmp_path / "alone")
    path = report.write([study, run.folder], out=tmp_path / "new" / "both")
    assert path == tmp_path / "new" / "both" / "report.html"
    got = page(path)
    assert got.text.startswith("Hessian spectra: study and alone")
    assert "10 in 3 runs" in got.text
    for name in ("2-bit baseline", "2-bit WinQ", "alone"):
        assert f"{name}, step 20, end" in got.text
    with pytest.raises(InputError, match="got 2: name out"):
        report.write([study, run])


def test_estimates_of_a_table_may_be_objects(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    rows = [{"bits": 2, "method": "winq", "rms_end": Estimate(0.5, 0.25, 0.75, False, "because")}]
    got = page(report.write(study, table=rows))
    assert "○ 0.50 [0.25, 0.75]" in got.text
    assert "1 of them: because" in got.text


def test_images_are_saved_beside_the_report_if_asked_for(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run_folders.add(run)
    report.write(run)
    assert not (run.folder / "figures").exists()
    report.write(run, images=True)
    path, *others = sorted((run.folder / "figures").iterdir(), key=lambda path: path.name != "density.png")
    assert {other.name for other in others} == {"cumulative.png", "tails.png"}
    assert path.name == "density.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_images_have_the_names_of_the_figures_and_those_are_names_of_files(tmp_path):
    study = run_folders.Run.create(tmp_path / "study")
    for name, group in (("a", "../x y"), ("b", "..//x y"), ("c", "<last>")):
        run = run_folders.run_folder(study.folder / name, marks=((0, ""),), presentation={"group": group})
        for step in range(2):
            run.append_telemetry({"step": step, "eval/<loss>": 1.0 + step})
    report.write(study, images=True)
    names = {path.name.removesuffix(".png") for path in (study.folder / "figures").iterdir()}
    assert {"density-x-y", "density-x-y-2", "density-last", "density-last-2", "trajectory-eval-loss"} <= names
    assert names == set(report.figures(study))


def test_what_a_run_says_of_itself_is_text_and_never_markup(tmp_path):
    def attack(place):
        return f"<script>{place}</script>"

    run = run_folders.Run.create(
        tmp_path / "a",
        {
            attack("setting"): attack("value"),
            "presentation": {
                "label": attack("name"),
                "group": attack("group"),
                "modes": {attack("mode"): attack("meaning")},
                "quantities": {
                    "rms": {"name": attack("quantity"), "unit": attack("unit"), "meaning": attack("sense")},
                    "rate": {"name": attack("rate"), "meaning": attack("rate meaning")},
                },
                "labels": {"start": attack("label")},
            },
        },
    )
    for step in (0, 5):
        spectrum = run_folders.density()
        record = run_folders.record(spectrum, step=step, mode=attack("mode"), label="start")
        reason = Estimate(0.4, 0.1, 0.8, False, attack("reason"))
        record = replace(record, notes=[attack("note")], device=attack("device"), versions={attack("v"): attack("w")})
        run.append(replace(record, estimates=record.estimates | {"negative_share": reason}), spectrum)
        run.append_telemetry({"step": step, "rate": 0.5 + step})
    table = [{attack("key"): attack("cell"), "label": attack("row"), "rms_end": Estimate(0.5, 0.25, 0.75)}]
    for rows in (None, table):
        text = report.write(run, title=attack("title"), table=rows).read_text(encoding="utf-8")
        got = Page(text)
        kinds = [attributes.get("type") for attributes in got.all("script")]
        assert kinds == ["application/json"] * (len(kinds) - 1) + [None]
        assert got.open == []
        said = got.text + " ".join(attributes["aria-label"] for attributes in got.all("svg"))
        places = ["title", "setting", "value", "name", "mode", "meaning", "quantity", "unit", "sense", "rate"]
        places += ["rate meaning", "note", "device", "v", "w"]
        places += ["label", "reason"] if rows is None else ["Key", "cell", "row"]
        for place in places:
            assert attack(place).lower() in said.lower(), place


def test_estimates_of_further_modes_are_named(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    one, other = Estimate(0.5, 0.25, 0.75), Estimate(0.625, 0.5, 0.875)
    rows = [{"label": "2-bit WinQ", "latent_negative_energy_share_end": one, "negative_energy_share_end": other}]
    got = page(report.write(study, table=rows))
    numbers = got.text.partition("At the start and the end of training")[2]
    assert "2-bit WinQ, end 0.62 [0.50, 0.88] 2-bit WinQ, latent, end 0.50 [0.25, 0.75]" in numbers


def test_every_mode_gets_its_figures_and_its_meaning(tmp_path, without_figures):
    shown = {"modes": {"latent": "the Hessian at the latent weights"}}
    run = run_folders.run_folder(tmp_path / "a", modes=("full", "latent", "other"), presentation=shown)
    names = set(report.figures(run))
    assert {"density-full", "density-latent", "trajectory-rms-full", "trajectory-rms-latent"} <= names
    assert "trajectory-flip_rate" in names
    got = page(report.write(run))
    assert "step 10, latent" in got.text
    assert "latent the Hessian at the latent weights" in got.text
    assert "full the Hessian of the loss in the model's own weights" in got.text
    assert "other a Hessian that the caller supplied" in got.text


def test_how_a_run_is_shown_is_no_setting(tmp_path, without_figures):
    run = run_folders.run_folder(tmp_path / "a", rate=0.25, presentation={"label": "the name", "color": "#123456"})
    got = page(report.write(run))
    assert "rate 0.25" in got.text
    assert "the name" in got.text
    assert "presentation" not in got.text
    assert "#123456" not in got.text


def test_one_record_is_a_report_without_trajectories(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run_folders.add(run)
    assert set(report.figures(run)) == {"cumulative", "tails", "density"}
    assert "Over training" not in page(report.write(run)).text


def test_a_run_that_ended_early_is_reported_with_the_others(tmp_path, without_figures):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    run_folders.Run.create(study.folder / "4bit-baseline", {"bits": 4, "method": "baseline"})
    assert "7 in 3 runs" in page(report.write(study)).text
    assert "density-4bit" not in report.figures(study)


def test_nothing_measured_is_refused(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    with pytest.raises(InputError, match="holds no spectrum to report on"):
        report.write(run)
    with pytest.raises(InputError, match="there is no folder"):
        report.write(tmp_path / "missing")


def test_a_damaged_table_is_named(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    for content in ("{", '{"a": 1}', "[1]"):
        (run.folder / "table.json").write_text(content)
        with pytest.raises(InputError, match=r"expected a list of rows in .*table\.json"):
            report.write(run)


def test_an_unfinished_study_says_so_in_words_and_in_its_figures(tmp_path, monkeypatch):
    drawn = []
    plain = EmbeddedFigure("<svg></svg>", [])
    monkeypatch.setattr(report, "embedded", lambda figure, name, **options: drawn.append(figure) or plain)
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    said = page(report.write(study)).text
    assert "Unfinished:" not in said
    assert "incomplete" not in said.lower()
    titles = [ax.get_title(loc=where) for figure in drawn for ax in figure.axes for where in ("left", "right")]
    assert not any("finished" in title for title in titles)
    config = study.folder / "2bit-winq" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"planned_records": 9}))
    drawn.clear()
    got = page(report.write(study))
    said = "study Incomplete. Unfinished: 1 of 2 runs are finished. What is shown is what there is so far."
    assert said in got.text
    assert report.write(study, table=study_rows(study)).read_text().count(">incomplete<") == 1  # the run that is
    for figure in drawn:
        titles = [ax.get_title(loc=where) for ax in figure.axes for where in ("left", "right")]
        assert "unfinished: 1 of 2 runs are finished" in titles or (
            "2-bit WinQ\nunfinished: 4 of 9 spectra are measured" in titles and "2-bit baseline" in titles
        )
    assert len(drawn) > 10


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, without_figures, monkeypatch):
    run = run_folders.run_folder(tmp_path / "a")
    path = report.write(run, title="before")
    before = path.read_bytes()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(run, title="after")
    assert path.read_bytes() == before
    assert not list(run.folder.rglob("*.partial"))


def test_names_that_no_encoding_has_are_shown_all_the_same(tmp_path):
    shown = {"label": "a\ud800b\x00", "quantities": {"rms": {"name": "r\udce9ms"}}}
    run = run_folders.run_folder(tmp_path / "x\udce9", presentation=shown, checkpoint="y\udce9")
    assert "a?b" in page(report.write(run, images=True)).text
