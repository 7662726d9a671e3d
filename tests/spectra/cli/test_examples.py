"""The examples at the end of each command's help."""

import shlex

import pytest
import run_folders
import saved_models

from qat import cli as qat
from spectra.cli import main as spectra
from spectra.views import page

PROGRAMS = {"spectra": spectra, "qat": qat}
QUICK = ["--probes", "1", "--steps", "4", "--deflate", "0", "--count-products", "0", "--length", "8"]
SLOW = "spectra crosscheck"  # tests/spectra/integrations runs PyHessian


def parsers(program):
    """The parser of each command, by its name."""
    (commands,) = [action for action in PROGRAMS[program].build_parser()._actions if action.metavar == "COMMAND"]
    return commands.choices


def examples(program, command):
    text = parsers(program)[command].format_help().rpartition("examples:\n")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


COMMANDS = [(program, command) for program in PROGRAMS for command in parsers(program)]


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_the_help_ends_with_two_examples_that_parse(program, command):
    found = examples(program, command)
    assert len(found) == 2
    for line in found:
        assert line.startswith(f"{program} {command}")
        options = PROGRAMS[program].build_parser().parse_args(shlex.split(line)[1:])
        assert callable(options.command)


def test_the_examples_of_spectra_run(tmp_path, monkeypatch, capsys):
    saved_models.save(tmp_path / "checkpoint")
    saved_models.write_text(tmp_path, name="notes.txt")
    run_folders.study_folder(tmp_path / "runs" / "study", bits=(2,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "density_pictures", lambda run: [])
    monkeypatch.setattr(page, "trajectory_pictures", lambda run: [])
    ran = 0
    for line in (line for command in parsers("spectra") for line in examples("spectra", command)):
        if not line.startswith(SLOW):
            quick = QUICK if line.startswith("spectra measure") else []
            assert spectra.main([*shlex.split(line)[1:], *quick]) == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran == 10
