"""No pickle is loaded, nothing in a folder or a text is run, what is shown is escaped, and no network is used."""

import ast
import base64
import functools
import hashlib
import json
import pickle
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import run_folders
import saved_models
import torch

from qat.cli import main as qat
from spectra.algorithms.topk import topk
from spectra.backend.errors import InputError
from spectra.cli.main import main as spectra
from spectra.integrations.loading import load_model
from spectra.operators.explicit import DiagonalOperator
from spectra.views import page

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("spectra", "qat") for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(node):
    """The dotted name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@functools.cache
def nodes():
    """Every node of every source file, with the file's name."""
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    return [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]


def calls():
    for path, node in nodes():
        if isinstance(node, ast.Call):
            yield path, name_of(node.func), {key.arg: key.value for key in node.keywords}


def test_no_source_unpickles_what_it_reads():
    """workers.py unpickles what its own parent process has just sent."""
    found = [
        (path, name)
        for path, name, options in calls()
        if name in ("pickle.load", "pickle.loads", "dill.load", "joblib.load", "eval", "exec", "os.system")
        or (name == "torch.load" and getattr(options.get("weights_only"), "value", None) is not True)
        or "allow_pickle" in options
        or name.startswith("subprocess.")
    ]
    assert found == [("qat/study/workers.py", "pickle.loads")]


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_is_a_pickle_is_not_run(tmp_path):
    folder, sprung = saved_models.save(tmp_path / "model"), tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap(sprung)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError):
        load_model(folder)
    assert not sprung.exists()


def test_code_in_a_model_folder_is_run_only_when_asked(tmp_path, capsys):
    folder, text = saved_models.save(tmp_path / "model"), saved_models.write_text(tmp_path)
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    names = '{"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}'
    (folder / "config.json").write_text(
        config.replace('"model_type": "llama"', '"model_type": "mine"') + f', "auto_map": {names}}}'
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    capsys.readouterr()  # the bar of saving the model
    assert qat(["evaluate", str(folder), "--text", str(text), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--trust-remote-code" in line
    assert not (tmp_path / "sprung").exists()


SETS = "document.documentElement.dataset.ran='yes'"
HOSTILE = f'<script>{SETS}</script>"\'><img src=x onerror="{SETS}"><svg onload="{SETS}">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """The report of a study whose every text is markup that would leave a mark on the page."""
    shown = run_folders.presentation(bits=2, method="winq") | {"label": HOSTILE, "modes": {HOSTILE: HOSTILE}}
    shown |= {"quantities": {"rms": {"name": HOSTILE, "unit": HOSTILE, "meaning": HOSTILE}}, "group": HOSTILE}
    study = run_folders.Run.create(tmp_path_factory.mktemp("hostile") / f"<img src=x onerror={SETS}>")
    for name in ("a", "b"):
        config = {"model_name": HOSTILE, "presentation": shown | {"labels": {"start": HOSTILE}}, HOSTILE: [HOSTILE]}
        run = run_folders.Run.create(study.folder / name, config)
        for step in (0, 1):
            spectrum = run_folders.density()
            reason = replace(run_folders.UNRESOLVED, reason=HOSTILE)
            record = run_folders.record(spectrum, step=step, mode=HOSTILE, label="start", negative_share=reason)
            run.append(replace(record, notes=[HOSTILE], device=HOSTILE, versions={HOSTILE: HOSTILE}), spectrum)
            run.append_telemetry({"step": step, HOSTILE: step})
    rows = [{"label": HOSTILE, "bits": HOSTILE, HOSTILE: HOSTILE, "rms_end": replace(run_folders.UNRESOLVED)}]
    return page.write(study, title=HOSTILE, table=rows)


class Markup(HTMLParser):
    """The tags of a page, the names of their attributes, and what stands in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)


def test_a_run_full_of_markup_is_shown_as_text(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    assert text.count("&lt;script&gt;") > 20
    assert "<img" not in text.lower()
    found = Markup(text)
    assert not found.tags & {"img", "iframe", "object", "embed", "link", "form", "foreignobject", "animate", "set"}
    assert not [name for name in found.attributes if name.startswith("on")]
    *readings, (kind, script) = found.scripts
    assert len(readings) > 5
    assert all(kind == "application/json" and isinstance(json.loads(data), list) for kind, data in readings)
    assert not any("<" in data for _, data in readings)
    assert kind is None
    own = resources.files("spectra.views").joinpath("templates/report.js").read_text(encoding="utf-8")
    assert script == own


def test_a_browser_is_told_to_run_the_one_script_of_the_page_and_to_load_nothing(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    digest = base64.b64encode(hashlib.sha256(Markup(text).scripts[-1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def in_chromium(path, folder):
    """The page's document after its scripts have run, had it any."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={folder}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_markup_in_a_run_runs_nothing_in_a_browser(hostile_page, tmp_path):
    trap = tmp_path / "trap.html"
    trap.write_text(f"<!doctype html><html><body>{HOSTILE}</body></html>")
    assert "data-ran" in in_chromium(trap, tmp_path / "profile").partition("<body")[0]  # the markup does what it says
    shown = in_chromium(hostile_page, tmp_path / "profile")
    assert "data-ran" not in shown.partition("<body")[0]
    assert "&lt;script&gt;" in shown
    assert "Spectra in numbers" in shown


SHOWN = ("estimates/density", "estimates/estimate", "algorithms/topk", "runs/folder", "views/explorer")


def test_what_a_notebook_shows_is_made_where_it_is_escaped():
    """No object builds HTML of its own: each calls `spectra.backend.markup`, which escapes every text."""
    functions = [(path, node) for path, node in nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    shown = [path for path, node in functions if node.name.startswith("_repr_")]
    assert sorted(shown) == sorted(f"spectra/{name}.py" for name in SHOWN)
    displayed = [path for path, name, _ in calls() if name.rpartition(".")[2] in ("HTML", "Markdown", "display")]
    assert displayed == ["spectra/views/explorer.py"]  # the remarks below the figure, from `markup.paragraphs`
    texts = [(path, node.value) for path, node in nodes() if isinstance(node, ast.Constant)]
    tags = {path for path, text in texts if isinstance(text, str) and re.search(r"</?(span|table|td|tr|div)\b", text)}
    assert tags == {"spectra/backend/markup.py"}


@pytest.mark.parametrize("kind", ["estimate", "density", "eigenpairs", "run", "study", "failed"])
def test_markup_is_escaped_in_a_notebook(kind, hostile_page):
    study = run_folders.Run(hostile_page.parent)
    density = study.runs[0].density(study.runs[0].records[0])
    failed = replace(study.runs[0].records[0], status="failed", reason=HOSTILE, estimates={})
    study.runs[1].append(failed)
    shown = {
        "estimate": replace(run_folders.UNRESOLVED, reason=HOSTILE),
        "density": density.with_origin(replace(density.origin, unverified=HOSTILE)),
        "eigenpairs": replace(topk(DiagonalOperator(torch.arange(9.0)), 2), unverified=HOSTILE),
        "run": study.runs[0],
        "study": study,
        "failed": study.runs[1],
    }[kind]
    text = shown._repr_html_()
    assert set(re.findall(r"<(\w+)", text)) <= {"div", "span", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;img" in text  # every one holds HOSTILE or the name of the study


def test_no_network_for_folders_and_files(tmp_path, monkeypatch, capsys):
    folder, text = saved_models.save(tmp_path / "model"), saved_models.write_text(tmp_path)
    tried = []

    def refuse(*given, **options):
        tried.append(given)
        raise OSError("no network in this test")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    quick = ["--probes", "1", "--steps", "2", "--deflate", "0", "--sequences", "1", "--length", "8", "--device", "cpu"]
    assert spectra(["measure", str(folder), "--text", str(text), "--out", str(tmp_path / "run"), *quick]) == 0
    monkeypatch.setattr(page, "density_pictures", lambda run: [])
    assert spectra(["report", str(tmp_path / "run")]) == 0
    assert qat(["evaluate", str(folder), "--text", str(text), "--device", "cpu"]) == 0
    assert tried == []
