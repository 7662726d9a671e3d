"""House rules that no linter knows: what files may hold, and that the documentation is true."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qat import cli as qat_cli
from spectra.cli import main as spectra_cli

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 350  # lines a file
GENERATED = re.compile(r"\.(?!ci$|gitignore$)|__pycache__$|runs$|build$|dist$|.*\.egg-info$")
PROSE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/tour.md", "docs/trust.md")
# Folders that exist on one machine only. What follows must be a name, so that "~/.cache" and "/proc" pass.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|mnt|tmp|workspace|data)/[\w.-]|\b[A-Z]:\\\\?Users\\")
URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'`<>)\]]+")
HOST = re.compile(r"\b(?:[\w-]+\.)+(?:org|com)\b")
# Where links may lead. Package registries are not among them: which one is used is the installer's own setting.
HOSTS = {"arxiv.org", "doi.org", "github.com", "www.w3.org", "127.0.0.1", "localhost"}
INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|\bPIP_(?:EXTRA_)?INDEX_URL\b")


def tracked_files():
    """The files that git tracks; where there is no git, all but what installing and testing leaves here."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        found = [ROOT / name for name in done.stdout.decode().split("\0") if name]
        if found:
            return [path for path in found if path.is_file()]
    files = (Path(folder, name) for folder, _, names in os.walk(ROOT) for name in names)
    return [path for path in files if not any(GENERATED.match(part) for part in path.relative_to(ROOT).parts)]


def named(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def texts():
    """The text of every tracked file that holds text, by its path."""
    found = {}
    for path in tracked_files():
        with contextlib.suppress(UnicodeDecodeError):
            found[named(path)] = path.read_text(encoding="utf-8")
    assert {"pyproject.toml", "README.md", "spectra/algorithms/lanczos.py", "qat/training/winq.py"} <= set(found)
    return found


def places(texts, found):
    """Where something was found in the texts, a line each: found(text) gives the offending strings."""
    return [f"{name}: {bad}" for name, text in texts.items() if name != "tests/test_project.py" for bad in found(text)]


def test_no_file_names_a_path_of_a_machine(texts):
    assert not places(texts, MACHINE_PATH.findall)
    here = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}(?![\w.-])")
    assert len(ROOT.parts) < 3 or not places(texts, here.findall)


def strange_hosts(text):
    """Hosts in the text that are not among those where links may lead, with or without a protocol in front."""
    return ({urlsplit(url).hostname or url for url in URL.findall(text)} | set(HOST.findall(text))) - HOSTS


def test_no_file_names_a_package_registry(texts):
    assert not places(texts, INDEX_OPTION.findall)
    assert not places(texts, strange_hosts)


def test_another_host_would_be_found():
    assert strange_hosts("pip install from https://registry.example.net/simple") == {"registry.example.net"}
    assert strange_hosts("fetched from files.example.org at once") == {"files.example.org"}
    assert not strange_hosts("see https://arxiv.org/abs/2605.17471, os.path.com_error")


@pytest.mark.parametrize(
    "line", ["cd /home/someone/project", 'open("/root/x")', "/Users/me/x", r"C:\Users\me", "in /work/here", "/tmp/x"]
)
def test_a_path_of_a_machine_would_be_found(line):
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize("line", ["~/.cache/qat", "/proc/meminfo", "runs/demo/work/x", "spectra/templates/", "a/tmp/b"])
def test_other_paths_pass(line):
    assert not MACHINE_PATH.search(line)


def test_every_file_is_short(texts):
    """Nearly all lines of a notebook are those of its cells."""
    kinds = (".py", ".md", ".toml", ".html", ".ipynb", "Makefile")
    long = {
        name: text.count("\n") for name, text in texts.items() if name.endswith(kinds) and text.count("\n") > LONGEST
    }
    assert not long


def code_blocks(name, *languages):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if language in languages]


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    """In order and in one namespace, as a reader would type it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    blocks = code_blocks("README.md", "python")
    assert len(blocks) >= 5
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    capsys.readouterr()

    spectra, truth = namespace["spectra"], (namespace["values"] < 0).mean()
    # The point that the README makes with eigenvalues that are known: nodes mislead, intervals hold.
    density = namespace["density"]
    counted = (density.weights * (density.nodes < 0)).sum(axis=1)
    assert abs(counted - truth).min() > 3 * counted.std(ddof=1)
    assert not density.negative_share().resolved
    known = spectra.resolve(namespace["known"], share="negative", half_width=0.05)
    assert known.resolved
    for estimate in (density.negative_share(), known):
        assert estimate.low <= truth <= estimate.high
    # And that the three ways to attach a probe leave runs with what was asked for.
    for folder, modes in (("loop", {"full"}), ("trainer/spectra", {"full"}), ("quantized", {"ste", "latent"})):
        records = spectra.Run(tmp_path / "runs" / folder).records
        assert {record.mode for record in records} == modes
        assert len({record.step for record in records}) >= 2


def shell_commands():
    """Each command line of our own in a shell block of the README."""
    lines = [line.partition("#")[0] for block in code_blocks("README.md", "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line)) and words[0] in ("spectra", "qat", "make")]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_the_commands_in_the_readme_exist(words):
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    parser = {"spectra": spectra_cli._parser, "qat": qat_cli._parser}[program]()
    assert parser.parse_args(arguments).command


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for program, cli in (("spectra", spectra_cli), ("qat", qat_cli)):
        actions = [action for action in cli._parser()._actions if action.metavar == "COMMAND"]
        for command in actions[0].choices:
            assert f"`{program} {command} " in text, f"{program} {command}"


@pytest.mark.parametrize("program", ["spectra", "qat"])
def test_help_exits_with_0(program):
    done = subprocess.run(
        [sys.executable, "-m", f"{program}.cli", "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: {program}" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_to_files(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tour_passes_every_file():
    """And names none that is not there."""
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    sources = [path for package in ("spectra", "qat") for path in (ROOT / package).rglob("*.py")]
    sources = [path for path in sources if path.name != "__init__.py"]
    untold = [named(path) for path in sources if path.name not in tour and f"`{path.parent.name}/`" not in tour]
    assert not untold
    assert {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", tour)} <= {path.name for path in sources}


def test_the_changelog_has_this_version():
    from spectra import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
