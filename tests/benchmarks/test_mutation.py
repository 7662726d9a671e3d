"""The mutation run: mutants of a few lines, the tests that reach them, and what becomes of one that is no fault."""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "mutation"))
pytest.importorskip("cosmic_ray", reason="in the dev extra")

import mutants  # noqa: E402
import mutation  # noqa: E402
import reached  # noqa: E402

SOURCE = """\
LIMIT = 2.5


def inside(a: int | None, *, b: int = 1) -> int | None:
    if a < b:
        return a - b
    return (
        a
        * 3
    )
"""
FILE = "spectra/estimates/digits.py"


def test_the_mutants_of_a_few_lines(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    found = Counter(
        (mutant.before, mutant.after.replace("  ", " ")) for mutant in mutants.sample(tmp_path, ["a.py"], 0, 0)
    )
    signature = "def inside(a: int | None, *, b: int = {}) -> int | None:"
    expected = [("LIMIT = 2.5", "LIMIT = 3.5"), ("LIMIT = 2.5", "LIMIT = 1.5")]
    expected += [(signature.format(1), signature.format(n)) for n in (0, 2)]
    expected += [("if a < b:", after) for after in ("if a <= b:", "if a >= b:", "if not a < b:")]
    expected += [("return a - b", "return a + b"), ("* 3", "/ 3"), ("* 3", "* 4"), ("* 3", "* 2")]
    assert found == Counter(expected)


def test_a_sample_takes_from_each_file_its_share(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(SOURCE + SOURCE.replace("inside", "other"))
    drawn = mutants.sample(tmp_path, ["a.py", "b.py"], 9, 5)
    assert Counter(mutant.file for mutant in drawn) == {"a.py": 3, "b.py": 6}
    assert len({(mutant.file, mutant.code) for mutant in drawn}) == 9
    assert drawn == mutants.sample(tmp_path, ["a.py", "b.py"], 9, 5)
    assert drawn != mutants.sample(tmp_path, ["a.py", "b.py"], 9, 6)


def test_the_lines_whose_tests_see_a_change():
    everything = set(range(1, 11))
    assert reached.lines_of_statement(SOURCE, 1) == everything
    assert reached.lines_of_statement(SOURCE, 4) == set(range(5, 11))  # a default value: whoever calls it
    assert reached.lines_of_statement(SOURCE, 5) == {5}
    assert reached.lines_of_statement(SOURCE, 6) == {6}
    assert reached.lines_of_statement(SOURCE, 9) == {7, 8, 9, 10}


def test_own_tests_go_first_and_the_quickest_of_the_neighbours():
    names = ["there/test_a.py::slow", "there/test_a.py::quick", "there/test_b.py::x", "there/test_c.py::y"]
    seconds = dict(zip(names, (9.0, 1.0, 3.0, 2.0), strict=True))
    found = mutation.Reached(seconds, {"a.py": {5: {*names[:3]}, 6: {*names}}})
    mutant = mutants.Mutant("a.py", 6, "", "", "")
    for line, budget, own, neighbours in ((6, 10.0, [1, 0], [3, 2]), (6, 4.0, [1, 0], [3]), (5, 4.0, [1, 0], [2])):
        stages = found.tests(replace(mutant, line=line), SOURCE, budget)
        assert [list(stage) for stage in stages] == [[names[i] for i in part] for part in (own, neighbours)]
        assert all(seconds[name] == stage[name] for stage in stages for name in stage)
    assert found.tests(replace(mutant, line=7), SOURCE, 4.0) == ({}, {})


@pytest.fixture
def fresh_fork_server():
    """A fork server that has imported nothing of the project, as the one of an earlier test may have."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


def test_a_fault_is_caught_and_no_change_is_not(tmp_path, fresh_fork_server):
    test_file, other = "tests/spectra/estimates/test_digits.py", {"tests/spectra/estimates/test_curves.py": 1.0}
    source = (ROOT / FILE).read_text()
    unchanged = mutants.Mutant(FILE, 1, "", "", source)
    broken = replace(unchanged, code=source.replace("MOST_DIGITS = 4", "MOST_DIGITS = 3"))
    with mutation.Runner(1) as runner:
        traced = mutation.reached(runner, 1, [test_file], [FILE], tmp_path)
        names = sorted({name for names in traced.lines[FILE].values() for name in names if "::" in name})
        reaching = {name: traced.seconds[name] for name in names}
        assert len(reaching) > 2
        assert runner.catch(unchanged, ({test_file: 1.0}, other)) == ""
        assert runner.catch(broken, (other, {})) == ""  # which does not reach it
        assert runner.catch(broken, (other, reaching)) in reaching
        assert test_file in runner.catch(broken, ({test_file + "::gone": 1.0}, {}))
        renamed = replace(unchanged, code=source.replace("def rounded", "def other"))
        assert runner.catch(renamed, (reaching, {})) == test_file


def test_a_test_that_does_not_end_is_ended(tmp_path):
    (tmp_path / "test_endless.py").write_text("def test_endless():\n    while True:\n        pass\n")
    code = (
        "import pytest, mutation; mutation.SLOWEST = 1; "
        f"pytest.main(['{tmp_path}'], plugins=[mutation._Chosen({{'test_endless.py': 0.0}})])"
    )
    paths = os.pathsep.join([str(ROOT / "benchmarks" / "mutation"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGALRM


def test_the_table():
    rows = [
        {"file": "a.py", "line": 3, "before": "x + 1", "after": "x - 1", "caught": "test_x"},
        {"file": "a.py", "line": 7, "before": "x > 0", "after": "x >= 0", "caught": ""},
        {"file": "b.py", "line": 2, "before": "0.5", "after": "1.5", "caught": ""},
    ]
    found = mutation.table(rows, {("a.py", "x > 0", "x >= 0"): "zero is caught before"}, "Sample")
    assert "| a.py | 2 | 1 | 1 | 0 |\n| b.py | 1 | 0 | 0 | 1 |\n| all | 3 | 1 | 1 | 1 |" in found
    assert "1 of 2, 50.0%" in found
    assert found.endswith("Survivors:\n\n* `b.py:2`: `0.5` became `1.5`\n")


def test_mutants_that_are_no_faults_are_of_lines_that_exist():
    listed = mutation.equivalents()
    for (file, before, after), reason in listed.items():
        lines = " ".join(line.strip() for line in (ROOT / file).read_text().splitlines())
        assert before in lines, (file, before)
        assert before != after
        assert reason
