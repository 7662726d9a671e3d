"""No pickle is loaded, nothing in a folder or a text is run, what is shown is escaped, and no network is used."""

import ast
import pickle
import socket
from pathlib import Path

import pytest
import run_folders
import saved_models
import torch

from qat.cli import main as qat
from spectra.backend.errors import InputError
from spectra.cli.main import main as spectra
from spectra.integrations.loading import load_model
from spectra.views import page

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("spectra", "qat") for path in sorted((ROOT / package).rglob("*.py"))]
SCRIPT = "<script>alert('x')</script>"


def name_of(node):
    """The dotted name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield (
                    path.relative_to(ROOT).as_posix(),
                    name_of(node.func),
                    {key.arg: key.value for key in node.keywords},
                )


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


def test_a_run_full_of_markup_is_shown_as_text(tmp_path):
    shown = run_folders.presentation(bits=2, method=SCRIPT) | {"label": SCRIPT, "modes": {"full": SCRIPT}}
    shown |= {"quantities": {"rms": {"name": SCRIPT, "unit": SCRIPT, "meaning": SCRIPT}}, "labels": {"start": SCRIPT}}
    run = run_folders.run_folder(tmp_path / "run", model_name=SCRIPT, presentation=shown, **{SCRIPT: SCRIPT})
    written = page.write(run, title=SCRIPT).read_text(encoding="utf-8")
    assert "<script" not in written.lower()
    assert "&lt;script&gt;" in written


def test_a_study_whose_table_is_full_of_markup_is_shown_as_text(tmp_path):
    study = run_folders.study_folder(tmp_path / "study")
    rows = [{"label": SCRIPT, "bits": SCRIPT, SCRIPT: SCRIPT, "validation_loss": 1.0}]
    assert "<script" not in page.write(study, table=rows).read_text(encoding="utf-8").lower()


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
    assert spectra(["report", str(tmp_path / "run")]) == 0
    assert qat(["evaluate", str(folder), "--text", str(text), "--device", "cpu"]) == 0
    assert tried == []
