import importlib.util
import shutil
import subprocess

import pytest

from qat.cli import build_parser as qat_parser
from qat.cli import main as qat
from spectra.cli.completion import SHELLS
from spectra.cli.main import build_parser, main

HAS_SHTAB = importlib.util.find_spec("shtab") is not None
needs_shtab = pytest.mark.skipif(not HAS_SHTAB, reason="needs shtab")
PROGRAMS = {"spectra": (main, build_parser), "qat": (qat, qat_parser)}

# What bash does at a press of the tabulator: COMP_WORDS are the words typed, COMPREPLY the words offered.
TAB = """
source {script}
COMP_WORDS=({words} "{begun}"); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE="{words} {begun}"
COMP_POINT=${{#COMP_LINE}}
complete -p {program} | grep -o -- '-F [^ ]*' | cut -c4- > {script}.name
$(cat {script}.name) {program} "{begun}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def offered(program, words, begun, tmp_path, capsys):
    script = tmp_path / "completion.sh"
    assert PROGRAMS[program][0](["--print-completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    typed = TAB.format(script=script, words=words, begun=begun, program=program)
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    return done.stdout.split()


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("program", PROGRAMS)
def test_bash_offers_the_commands_and_their_options(program, tmp_path, capsys):
    commands = next(action for action in PROGRAMS[program][1]()._actions if action.metavar == "COMMAND").choices
    assert offered(program, program, "c", tmp_path, capsys) == [name for name in commands if name.startswith("c")]
    options = offered(program, f"{program} compare", "--", tmp_path, capsys)
    assert {"--help", "--json"} <= set(options)
    assert set(options) == {
        option for action in commands["compare"]._actions for option in action.option_strings if option[:2] == "--"
    }


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_files_where_a_run_is_expected(tmp_path, capsys):
    (tmp_path / "my-run").mkdir()
    assert offered("spectra", "spectra report", "my", tmp_path, capsys) == ["my-run"]


@needs_shtab
@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert "spectra" in script
    assert "measure" in script


def test_without_shtab_a_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("spectra.backend.extras.find_spec", lambda name: None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == 'spectra: error: shtab is not installed: pip install "spectra-qat[completion]"\n'


def test_another_shell_is_refused(capsys):
    assert main(["--print-completion", "powershell"]) == 2
    assert "powershell" in capsys.readouterr().err
