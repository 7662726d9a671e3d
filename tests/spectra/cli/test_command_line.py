import argparse
import io
import json
import os
import subprocess
import sys
import time
import warnings

import pytest

from spectra.backend.errors import InputError, NonFiniteError
from spectra.cli.command_line import OneLineParser, on_terminal, print_json, run_command


def ending(error, capsys):
    """Exit code and stderr of a command that ends in `error`."""

    def main(arguments=None):
        if error is not None:
            raise error

    code = run_command(main, name="prog")([])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("expected a folder,\n  got none: make one"), "expected a folder, got none: make one"),
        (NonFiniteError("the loss is nan"), "the loss is nan"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "No such file or directory: x.txt"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_code_2(error, line, capsys):
    assert ending(error, capsys) == (2, f"prog: error: {line}\n")


@pytest.mark.parametrize("said", ["interrupted", "interrupted: 2 of 4 are kept"])
def test_an_interrupt_is_code_130_with_what_the_command_knows_is_kept(said, capsys):
    interrupt = KeyboardInterrupt(said) if ":" in said else KeyboardInterrupt()
    assert ending(interrupt, capsys) == (130, f"prog: error: {said}\n")


def test_an_interrupt_that_comes_in_a_finalizer_is_not_lost(capsys):
    """Python ignores exceptions there; the command must end all the same."""

    class Slow:
        def __del__(self):
            raise KeyboardInterrupt

    def main(arguments=None):
        del arguments
        Slow()
        for _ in range(100):
            time.sleep(0.1)

    assert run_command(main, name="prog")([]) == 130
    assert capsys.readouterr().err == "prog: error: interrupted\n"


def test_success_is_code_0(capsys):
    assert ending(None, capsys) == (0, "")


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError("1/0"), capsys)


def test_the_name_is_that_of_the_package(capsys):
    def main(arguments=None):
        raise InputError("x")

    main.__module__ = "somewhere.cli"
    run_command(main)()
    assert capsys.readouterr().err == "somewhere: error: x\n"


def test_arguments_that_argparse_refuses_are_code_2(capsys):
    @run_command
    def main(arguments=None):
        parser = argparse.ArgumentParser(prog="prog")
        parser.add_argument("--count", type=int)
        parser.parse_args(arguments)

    assert main(["--count", "x"]) == 2
    assert capsys.readouterr().err.endswith("prog: error: argument --count: invalid int value: 'x'\n")
    assert main(["--help"]) == 0


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the locale C
@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"|\u03bb| y\udce9"), ("utf-8", b"|\xce\xbb| y\\udce9")])
def test_letters_that_the_terminal_lacks_are_no_error(encoding, shown, errors, monkeypatch):
    printed = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors=errors))
        assert run_command(lambda arguments: print("|λ| y\udce9", flush=True), name="prog")([]) == 0
        assert printed.getvalue().rstrip() == shown


def test_printed_json_is_strict(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "x\udce9"})
    assert json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [None, 1.5],
        "c": "x\udce9",
    }


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        "from spectra.cli.command_line import run_command\n"
        "def main(arguments=None):\n    for i in range(100000): print(i)\n"
        "raise SystemExit(run_command(main, name='talk')([]))\n"
    )
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, script], stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        os.close(reading)
        _, stderr = process.communicate(timeout=60)
    assert stderr == ""


def test_a_terminal_is_told_from_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not on_terminal()


def test_a_warning_is_one_line_with_the_name_of_the_command():
    code = (
        "import warnings\n"
        "from spectra.cli.command_line import run_command\n"
        "def main(arguments):\n"
        "    warnings.warn('out of memory,\\n went on')\n"
        "run_command(main, name='prog')([])\n"
        "warnings.warn('afterwards')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = ended.stderr.splitlines()
    assert first == "prog: warning: out of memory, went on"
    assert "UserWarning: afterwards" in others[0]


def test_who_records_warnings_gets_those_of_commands():
    with pytest.warns(UserWarning, match="noted"):
        run_command(lambda arguments: warnings.warn("noted", stacklevel=1), name="prog")([])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["go", "--probs", "4"], "prog go: error: unrecognized arguments: --probs 4; did you mean --probes? (see"),
        (["go", "--prbes=4"], "prog go: error: unrecognized arguments: --prbes=4; did you mean --probes? (see"),
        (["go", "--zzz"], "prog go: error: unrecognized arguments: --zzz (see prog go --help)"),
        (["go", "more"], "prog go: error: unrecognized arguments: more (see prog go --help)"),
    ],
)
def test_an_unknown_option_is_answered_by_the_command_with_the_one_that_was_meant(words, line, capsys):
    parser = OneLineParser(prog="prog")
    parser.add_subparsers().add_parser("go").add_argument("--probes")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(line)
    assert parser.parse_args(["go", "--probes", "4"]).probes == "4"


@pytest.mark.parametrize("program", ["spectra", "qat"])
def test_each_package_runs_as_a_module(program):
    done = subprocess.run(
        [sys.executable, "-m", program, "--version"], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{program} ")
