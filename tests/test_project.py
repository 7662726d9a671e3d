"""House rules that no linter knows: what files may hold, and that the documentation is true."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from qat import cli as qat_cli
from spectra.cli import main as spectra_cli
from spectra.runs.settings import MeasurementSettings

ROOT = Path(__file__).resolve().parent.parent
GENERATED = re.compile(r"\.(?!ci$|gitignore$|pre-commit-config)|__pycache__$|build$|dist$|.*\.egg-info$")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROSE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + DOCS
PROSE += sorted((ROOT / "benchmarks").rglob("results/*.md"))
ROOMS = {"backend", "operators", "estimates", "algorithms", "runs", "views", "integrations", "cli"}
# Names of version 0.1 that other people's code relies on.
PUBLIC = {
    "spectra": """
        Change DeflatedOperator DenseOperator DiagonalOperator Eigenpairs Estimate HessianOperator InputError
        LinearOperator MeanOperator MemoryPlan NoiseSplit NonFiniteError Objective ParameterSpace Run SpectralDensity
        SpectrumCallback SpectrumProbe SpectrumRecord Tridiagonal __version__ batch_noise compare distributed lanczos
        plan plots report resolve slq topk trace""",
    "qat": """
        MODES PRESETS ConversionReport InputError QuantConfig QuantEmbedding QuantLayer QuantLinear WinQ WinQCallback
        WinQConfig decay_exempt hessian_mode hessian_operator interpolate_ quant_layers quantize_model reset_steps
        telemetry""",
}
MARK = r"(?:<!-- (?:not run: (?P<reason>.+?)|needs: (?P<needs>[\w, ]+)) -->\n)?"
BLOCK = re.compile(MARK + r"```(?P<language>\w*)\n(?P<body>.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d*\.?\d+(?:e[-+]?\d+)?")
# Folders that exist on one machine only. What follows must be a name, so that "~/.cache" and "/proc" pass.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|mnt|tmp|workspace|data)/[\w.-]|\b[A-Z]:\\\\?Users\\")
URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'`<>)\]]+")
HOST = re.compile(r"\b(?:[\w-]+\.)+(?:org|com)\b")
# Where links may lead. Package registries are not among them: which one is used is the installer's own setting.
HOSTS = {"arxiv.org", "doi.org", "github.com", "www.w3.org", "127.0.0.1", "localhost"}
# Files and folders, from the root of the repository.
PATH = re.compile(
    r"(?<![\w/.-])(?:spectra|qat|tests|docs|benchmarks|notebooks)/(?:[\w-]+/)*"
    r"(?:[\w-]+\.(?:py|md|sh|ipynb)\b|(?<=/)(?![\w*]))"
)
INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|\bPIP_(?:EXTRA_)?INDEX_URL\b")


def named(path):
    return path.relative_to(ROOT).as_posix()


def tracked_files():
    """The files that git tracks; where there is no git, all but what installing and testing leaves here."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        found = [ROOT / name for name in done.stdout.decode().split("\0") if name]
        if found:
            return [path for path in found if path.is_file()]
    files = (Path(folder, name) for folder, _, names in os.walk(ROOT) for name in names)
    parts = {path: path.relative_to(ROOT).parts for path in files}
    return [path for path in parts if parts[path][0] != "runs" and not any(map(GENERATED.match, parts[path]))]


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


def test_spectra_has_its_eight_rooms_and_nothing_else():
    files = [path.relative_to(ROOT / "spectra") for path in (ROOT / "spectra").rglob("*") if path.is_file()]
    found = {path.parts[0] for path in files} - {"__pycache__"}
    assert found == ROOMS | {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("package", ["spectra", "qat"])
def test_subpackages_hand_nothing_on(package):
    """Their __init__.py holds a docstring alone, so that no function hides a module of its name."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")} - {ROOT / package}
    for folder in folders:
        body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert len(body) == 1, folder
        assert isinstance(body[0], ast.Expr), folder
        assert isinstance(body[0].value, ast.Constant), folder
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_public_names_stay(package):
    module = importlib.import_module(package)
    assert set(PUBLIC[package].split()) <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_git_ignores_no_source():
    """A rule for run folders once hid two files of spectra/runs."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "spectra", "qat", "tests", "docs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.splitlines() if "__pycache__" not in name]


class Block(NamedTuple):
    """A fenced block of code in a page, with why it is not run, if it is not, and the block of output under it."""

    body: str
    reason: str | None
    output: str | None


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] in languages:
            under = BLOCK.match(text, match.end() + 2)
            output = under["body"] if under and under["language"] == "text" else None
            wanted = [name.strip() for name in (match["needs"] or "").split(",") if name.strip()]
            lacking = [name for name in wanted if importlib.util.find_spec(name) is None]
            reason = f"{', '.join(lacking)} not installed" if lacking else match["reason"]
            found.append(Block(match["body"], reason, output))
    return found


def run_blocks(page, capsys):
    """Run the Python blocks of a page in order and in one namespace, as a reader would type them."""
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python")):
        code = compile(block.body, f"{page.name}, python block {number}", "exec")
        if block.reason is None:
            exec(code, namespace)
            printed = capsys.readouterr().out
            if block.output is not None:
                assert_like(printed, block.output)
    return namespace


def assert_like(printed, shown):
    """The same words; numbers may differ a little, as a long recurrence amplifies what another CPU rounds otherwise."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.15, abs=0.03), printed


def test_other_output_than_the_page_shows_would_be_found():
    assert_like("0.43 [0.386, 0.480]\n", "0.44 [0.38, 0.48]")
    for other in ("0.43 [0.386, 0.880]", "0.43 [0.386, 0.480] (unresolved)"):
        with pytest.raises(AssertionError):
            assert_like("0.43 [0.386, 0.480]", other)


@pytest.fixture
def few_products(monkeypatch):
    """Probes deflate four outliers and count with 100 products where a page does not say how many: time goes there."""
    for name, value in (("deflate", 4), ("count_products", 100)):
        monkeypatch.setitem(MeasurementSettings.__init__.__kwdefaults__, name, value)


@pytest.mark.usefixtures("few_products")
@pytest.mark.parametrize("page", DOCS, ids=named)
def test_the_code_in_the_docs_runs(page, tmp_path, monkeypatch, capsys):
    """All but blocks under `<!-- not run: reason -->`, or `<!-- needs: package -->` without it, which must compile."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page, capsys)


@pytest.mark.usefixtures("few_products")
def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    """And shows what the README says of it."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    assert sum(block.reason is None for block in blocks(page, "python")) >= 5
    namespace = run_blocks(page, capsys)

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


def modules_with_examples():
    """The modules whose docstrings hold an example."""
    files = [path for package in ("spectra", "qat") for path in sorted((ROOT / package).rglob("*.py"))]
    files = [path for path in files if ">>> " in path.read_text(encoding="utf-8")]
    return [named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.attempted
    assert not result.failed


def shell_commands():
    """Each command line of our own in a shell block of the README."""
    lines = [line.partition("#")[0] for block in blocks(ROOT / "README.md", "sh") for line in block.body.splitlines()]
    return [words for line in lines if (words := shlex.split(line)) and words[0] in ("spectra", "qat", "make")]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_the_commands_in_the_readme_exist(words):
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    parser = {"spectra": spectra_cli.build_parser, "qat": qat_cli.build_parser}[program]()
    assert parser.parse_args(arguments).command


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for program, cli in (("spectra", spectra_cli), ("qat", qat_cli)):
        actions = [action for action in cli.build_parser()._actions if action.metavar == "COMMAND"]
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


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_paths_that_are_named_exist(texts):
    """Paths from the root of the repository, in prose, docstrings and comments."""
    assert not places(texts, lambda text: [path for path in PATH.findall(text) if not (ROOT / path).exists()])


def test_a_path_that_does_not_exist_would_be_found():
    found = PATH.findall("see spectra/old.py, `qat/layers/` and docs/tour.md (not a/spectra/b.py nor spectra/trust)")
    assert found == ["spectra/old.py", "qat/layers/", "docs/tour.md"]


def test_the_tour_has_a_row_for_every_room():
    told = set(re.findall(r"^\| `((?:spectra|qat)/[\w.]+/?)` \|", (ROOT / "docs/tour.md").read_text(), re.MULTILINE))
    there = {f"spectra/{room}/" for room in ROOMS}
    for path in (ROOT / "qat").iterdir():
        if not path.name.startswith("__") and path.name != "py.typed":
            there.add(named(path) + ("/" if path.is_dir() else ""))
    assert told == there


def test_the_changelog_has_this_version():
    from spectra import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
