"""What the page's script does in Chromium: sorting, values where the pointer is, hiding curves, zooming."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import run_folders

from spectra.views import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# What a reader does, and what the page then holds. It is put into a copy of the page without its policy, by which a
# browser runs the page's own script alone.
READER = """
const seen = {};
const [results, estimates] = document.querySelectorAll("table.sortable");
const order = (cell) => cell.dataset.order ?? cell.textContent.trim();
const column = (table, at) => [...table.tBodies[0].rows].map((row) => order(row.cells[at]));
const sort = (table, at) => table.querySelectorAll("thead button")[at].click();
sort(results, 1); seen.ascending = column(results, 1);
sort(results, 1); seen.descending = column(results, 1);
seen.marked = results.querySelectorAll("thead th")[1].getAttribute("aria-sort");
sort(results, 0); seen.names = column(results, 0);
const figure = document.querySelector('[data-figure="trajectory_lambda_max"]');
figure.setPointerCapture = Element.prototype.setPointerCapture = () => {};
const cover = figure.querySelector(".cover");
function pointer(type, x, y) {
  const box = cover.getBoundingClientRect();
  const place = { clientX: box.left + x * box.width, clientY: box.top + (1 - y) * box.height };
  cover.dispatchEvent(new PointerEvent(type, { ...place, bubbles: true, pointerType: "mouse" }));
}
const tip = () => [...figure.querySelectorAll(".tip > *")].map((part) => part.textContent);
pointer("pointermove", 0.5, 0.5); seen.middle = tip();
seen.entries = [...figure.querySelectorAll(".entry")].map((entry) => entry.textContent.trim());
figure.querySelector(".entry").dispatchEvent(new MouseEvent("click", { bubbles: true }));
pointer("pointermove", 0.5, 0.5); seen.hidden = tip();
seen.off = figure.querySelectorAll(".series.off").length > 0;
figure.querySelector(".entry").dispatchEvent(new MouseEvent("click", { bubbles: true }));
seen.on = figure.querySelectorAll(".off").length === 0;
pointer("pointerdown", 0.6, 0.1); pointer("pointerup", 1.0, 0.9);
pointer("pointermove", 0.99, 0.5); seen.zoomed = tip();
seen.ticks = [...figure.querySelectorAll(".zoomed-ticks text")].map((tick) => tick.textContent);
const use = figure.querySelector(".content use:not([x='0'])").getBoundingClientRect();
seen.round = use.width / use.height;
figure.querySelector(".reset").click();
seen.whole = figure.querySelector(".content").getAttribute("transform");
seen.back = figure.querySelectorAll(".zoomed-ticks *").length === 0 && !figure.classList.contains("zoomed");
document.documentElement.dataset.seen = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_folders.study_folder(tmp_path_factory.mktemp("study") / "s", bits=(2,))


@pytest.fixture(scope="module")
def seen(study, tmp_path_factory):
    rows = [
        {"label": name, "loss": loss, "rms_end": run.records[-1].estimates["rms"]}
        for name, loss, run in zip(("b", "a", "c"), (10.0, 9.5, None), [*study.runs, study.runs[0]], strict=True)
    ]
    folder = tmp_path_factory.mktemp("page")
    text = page.write(study, table=rows, out=folder).read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    path = folder / "read.html"
    path.write_text(text.replace("</body>", f"<script>{READER}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={folder}/profile", "--window-size=1400,900", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode != 0:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_a_heading_sorts_by_numbers_and_what_has_none_stays_last(seen):
    assert seen["ascending"] == ["9.5", "10.0", "–"]
    assert seen["descending"] == ["10.0", "9.5", "–"]
    assert seen["marked"] == "descending"
    assert seen["names"] == ["a", "b", "c"]


def test_the_values_of_every_run_are_shown_where_the_pointer_is(seen, study):
    step, *lines = seen["middle"]
    assert step == "step 10"
    baseline, before, after = lines  # the second run has two records at that step
    value, low, high = study.runs[0].records[1].estimates["lambda_max"].rounded()
    assert baseline == f"2-bit baseline: {value} [{low}, {high}]" or (low == high and baseline.startswith("2-bit base"))
    assert before.startswith("2-bit WinQ: ")
    assert before.endswith(", before the reset")
    assert after.endswith(", after the reset")


def test_an_entry_of_the_legend_hides_its_curve_and_its_values(seen):
    assert seen["entries"] == ["2-bit baseline", "2-bit WinQ"]
    assert seen["off"]
    assert [line.partition(":")[0] for line in seen["hidden"]] == ["step 10", "2-bit WinQ", "2-bit WinQ"]
    assert seen["on"]


def test_a_rectangle_zooms_with_ticks_of_its_own_and_markers_keep_their_shape(seen):
    assert seen["zoomed"][0] == "step 20"
    numbers = [float(tick) for tick in seen["ticks"]]
    assert 3 <= len([number for number in numbers if 11 < number < 21]) <= 12
    assert 10 not in numbers
    assert seen["round"] == pytest.approx(1, abs=0.1)
    assert re.fullmatch(r"translate\(0 0\) scale\(1 1\)", seen["whole"])
    assert seen["back"]
