"""How many faults the tests catch: mutants of the numerical rooms, each run against the tests that reach its lines.

    python benchmarks/mutation/mutation.py [--sample 300] [--seed 0] [--jobs 2] [--files GLOB ...] [--out FILE]

First the tests run once as they are, to see which of them reach which line. Then each mutant runs against those that
reach its statement: the tests that mirror its file, then those of the neighbouring rooms, the quickest first, and up to
--seconds of them. The first failure or a timeout catches it. Results are kept in runs/mutation: the same command again
goes on, and tries the survivors again where tests have changed. equivalent.toml lists mutants that are no faults.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, sample
from reached import Tracer, lines_of_statement

ROOT = Path(__file__).resolve().parents[2]
HESSIAN = "spectra/operators/hessian"
SOURCES = ["spectra/estimates/*.py", "spectra/algorithms/*.py", "qat/layers/*.py", "qat/layers/quantizers/*.py"]
SOURCES += [f"{HESSIAN}/{name}.py" for name in ("objective", "pieces", "batches", "losses")]
ROOMS = ["spectra/estimates", "spectra/algorithms", "spectra/operators", "qat/layers", "core"]
TESTS = [f"tests/{room}/**/test_*.py" for room in ROOMS] + ["tests/qat/test_hessian.py"]
COPIED = ["spectra", "qat", "tests", "benchmarks", "docs", "pyproject.toml", "README.md"]
PRELOADED = ["torch", "scipy.stats", "scipy.sparse.linalg", "pytest", "hypothesis", "transformers", "torch.fx"]
LIMIT = 12 << 30  # bytes of address space: a mutant that asks for more fails by itself
SLOWEST, SLOWER = 60, 10  # a test may take so many seconds, and so many times as long as without a mutant


@dataclass(frozen=True)
class Reached:
    """What each test takes and reaches, by test files."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, set[str]]]

    def tests(self, mutant: Mutant, source: str, budget: float) -> tuple[dict[str, float], dict[str, float]]:
        """The tests that reach a mutant and their seconds: those that mirror its file, and the neighbours'.

        The quickest come first, and of the neighbours' as many as fit in the budget.
        """
        lines = lines_of_statement(source, mutant.line)
        names = {name for line in lines for name in self.lines[mutant.file].get(line, ())}
        mirror, spent = f"/test_{Path(mutant.file).stem}.py", 0.0
        own, neighbours = {}, {}
        for name in sorted(names, key=self.seconds.__getitem__):
            if mirror in name:
                own[name] = self.seconds[name]
            elif spent + self.seconds[name] <= budget:
                neighbours[name] = self.seconds[name]
                spent += self.seconds[name]
        return own, neighbours


def _enter(tree: str) -> None:
    """Make a tree the project of this process, which was forked for it."""
    os.setsid()
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path.insert(0, tree)
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1"}
    spec = find_spec("spectra")
    assert str(spec and spec.origin).startswith(tree), spec
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _pytest(files: list[str], plugin: Any, *options: str) -> int:
    options = (*options, "-q", "-m", "not slow", "-p", "no:cacheprovider")
    return int(pytest.main([*files, *options], plugins=[plugin]))


def _trace(tree: str, test_file: str, files: list[str], out: str) -> None:
    """Write to `out` what the tests of one file take and reach."""
    _enter(tree)
    with Tracer(tree, files, test_file) as tracer:
        code = _pytest([test_file], tracer)
    lines = {file: {n: sorted(tests) for n, tests in found.items()} for file, found in tracer.lines.items()}
    Path(out).write_text(json.dumps({"code": code, "failed": tracer.failed, "seconds": tracer.seconds, "lines": lines}))


class _Chosen:
    """A pytest plugin that runs the chosen tests in their order, and remembers the first that failed.

    Where a mutant has changed the names of tests (of parametrized ones), all tests of these files run. A test that
    takes far longer than without the mutant ends the process.

    Args:
        seconds: Of each chosen test or file, in the order in which to run them.
    """

    def __init__(self, seconds: dict[str, float]):
        self._seconds, self._rank = seconds, {name: rank for rank, name in enumerate(seconds)}
        self.failed = ""

    def _name(self, item: pytest.Item) -> str:
        return item.nodeid if item.nodeid in self._rank else item.nodeid.split("::")[0]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not {name for name in self._rank if "::" in name} - {item.nodeid for item in items}:
            chosen = [item for item in items if self._name(item) in self._rank]
            items[:] = sorted(chosen, key=lambda item: self._rank[self._name(item)])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        signal.alarm(SLOWEST + int(SLOWER * self._seconds.get(self._name(item), 0.0)))
        result = yield
        signal.alarm(SLOWEST)
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def _catch(tree: str, stages: tuple[dict[str, float], ...], out: str) -> None:
    """Write to `out` which test failed, an empty text where all passed."""
    _enter(tree)
    failed = ""
    for seconds in filter(None, stages):
        chosen = _Chosen(seconds)
        signal.alarm(SLOWEST)
        code = _pytest(sorted({name.split("::")[0] for name in seconds}), chosen, "-x")
        failed = chosen.failed or ("" if code == 0 else f"pytest ended with {code}")
        if failed:
            break
    Path(out).write_text(failed)


class Runner:
    """Runs pytest in forked processes, each on a copy of the project of its own.

    Args:
        jobs: How many processes at a time.

    Attributes:
        tree: A copy that stays as it is.
    """

    def __init__(self, jobs: int):
        self._folder = Path(tempfile.mkdtemp(prefix="mutation-"))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self.tree = self._copy("unchanged")
        for job in range(jobs):
            self._trees.put(self._copy(str(job)))

    def _copy(self, name: str) -> Path:
        tree = self._folder / name
        tree.mkdir()
        for part in map(ROOT.joinpath, COPIED):
            if part.is_dir():
                shutil.copytree(part, tree / part.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(part, tree)
        return tree

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def paths(self, patterns: list[str]) -> list[str]:
        """The files that match, relative to the project."""
        found = {path for pattern in patterns for path in self.tree.glob(pattern)}
        return sorted(str(path.relative_to(self.tree)) for path in found)

    def state(self, *patterns: str) -> str:
        """A short name of the contents of these files, and of all that tests import."""
        found = hashlib.sha256()
        for path in self.paths(["spectra/**/*.py", "qat/**/*.py", "tests/helpers/*.py", *patterns]):
            found.update(path.encode() + (self.tree / path).read_bytes())
        return found.hexdigest()[:16]

    def trace(self, test_file: str, files: list[str]) -> dict[str, Any]:
        """Which lines the tests of a file reach; a test that fails without any mutant is left out, with a line."""
        outcome = self._run(_trace, (test_file, files))
        if outcome.startswith("signal"):
            raise SystemExit(f"{test_file} must run before mutants are made: it ended with {outcome}")
        result = json.loads(outcome)
        if failed := set(result["failed"]):
            print(f"left out, since they fail as they are: {', '.join(sorted(failed))}", flush=True)
            kept = {name: seconds for name, seconds in result["seconds"].items() if name not in failed | {test_file}}
            result["seconds"] = kept | {test_file: sum(kept.values())}
            for lines in result["lines"].values():
                lines.update({line: [name for name in names if name not in failed] for line, names in lines.items()})
        return result

    def catch(self, mutant: Mutant, stages: tuple[dict[str, float], ...]) -> str:
        """The name of a test that fails with the mutant, a signal that ended the process, or "" where all pass.

        Args:
            mutant: What to change.
            stages: Names and seconds of tests or files, those of the first stage to be run first.
        """
        return self._run(_catch, (stages,), mutant) if any(stages) else ""

    def _run(self, target: Any, arguments: tuple, mutant: Mutant | None = None) -> str:
        tree = self._trees.get()
        out = tree / "outcome"
        out.unlink(missing_ok=True)
        original = (tree / mutant.file).read_text() if mutant else ""
        try:
            if mutant:
                (tree / mutant.file).write_text(mutant.code)
            process = self._context.Process(target=target, args=(str(tree), *arguments, str(out)))
            process.start()
            process.join()
            with contextlib.suppress(ProcessLookupError):  # what it has started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            assert process.exitcode <= 0, f"{mutant and mutant.change}: a process ended with {process.exitcode}"
            return out.read_text() if out.exists() else f"signal {-process.exitcode}"
        finally:
            if mutant:
                (tree / mutant.file).write_text(original)
            self._trees.put(tree)


def reached(runner: Runner, jobs: int, tests: list[str], files: list[str], folder: Path) -> Reached:
    """Run each test file as it is, where that was not done before, and gather what the tests reach."""

    def of_file(test_file: str) -> dict[str, Any]:
        kept = folder / f"reached-{Path(test_file).stem}-{runner.state(test_file)}.json"
        if not kept.exists():
            print(f"running {test_file} as it is", flush=True)
            kept.write_text(json.dumps(runner.trace(test_file, files)))
        return json.loads(kept.read_text())

    seconds, lines = {}, {file: {} for file in files}
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(of_file, tests):
            seconds |= result["seconds"]
            for file, found in result["lines"].items():
                for line, names in found.items():
                    lines[file].setdefault(int(line), set()).update(names)
    return Reached(seconds, lines)


def equivalents() -> dict[tuple[str, str, str], str]:
    """The reasons of the mutants that are no faults."""
    listed = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text())["mutants"]
    return {(item["file"], item["before"], item["after"]): item["reason"] for item in listed}


def table(rows: list[dict[str, Any]], equivalent: dict[tuple[str, str, str], str], title: str) -> str:
    """Mutants, caught and survivors by file, and each survivor's line."""
    counts: dict[str, Counter] = {}
    survivors = []
    for row in sorted(rows, key=lambda row: (row["file"], row["line"])):
        change = row["file"], row["before"], row["after"]
        outcome = "caught" if row["caught"] else "equivalent" if change in equivalent else "survived"
        counts.setdefault(row["file"], Counter())[outcome] += 1
        if outcome == "survived":
            survivors.append(f"* `{row['file']}:{row['line']}`: `{row['before']}` became `{row['after']}`")
    total = sum(counts.values(), Counter())
    lines = [f"# {title}", "", "| file | mutants | caught | equivalent | survived |", "|---|---:|---:|---:|---:|"]
    for name, count in [*counts.items(), ("all", total)]:
        cells = [count.total(), count["caught"], count["equivalent"], count["survived"]]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    faults = total["caught"] + total["survived"]
    lines += ["", f"Caught of what is not equivalent: {total['caught']} of {faults}, {total['caught'] / faults:.1%}."]
    return "\n".join([*lines, "", *(["Survivors:", "", *survivors, ""] if survivors else [])])


class Results:
    """Outcomes of mutants, kept in a file as they come.

    Args:
        path: The file, one outcome a line.
        state: A name of the sources and tests; survivors of others are tried again.
    """

    def __init__(self, path: Path, state: str):
        self._path, self._state = path, state
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._known = {row["mutant"]: row for row in rows if row["caught"] or row["state"] == state}

    def known(self, mutant: Mutant) -> dict[str, Any] | None:
        """The outcome, where it is known already."""
        return self._known.get(mutant.name)

    def add(self, mutant: Mutant, caught: str, tests: int) -> dict[str, Any]:
        """Keep the outcome, and print it."""
        row = {"file": mutant.file, "line": mutant.line, "before": mutant.before, "after": mutant.after}
        row |= {"caught": caught, "tests": tests, "mutant": mutant.name, "state": self._state}
        with self._path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{mutant.file}:{mutant.line}: {mutant.before} -> {mutant.after}: {caught or 'SURVIVED'}", flush=True)
        return row


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300, help="number of mutants; 0 for all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--files", nargs="*", default=SOURCES, help="globs of the files to change")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="globs of the files of tests")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the neighbours' tests, each (%(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "mutation", help="what is kept between runs")
    parser.add_argument("--out", type=Path, help="file for the table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    with Runner(options.jobs) as runner:
        files, tests = runner.paths(options.files), runner.paths(options.tests)
        drawn = sample(runner.tree, files, options.sample, options.seed)
        found = reached(runner, options.jobs, tests, files, options.folder)
        results = Results(options.folder / "results.jsonl", runner.state(*options.tests))

        def outcome(mutant: Mutant) -> dict[str, Any]:
            known = results.known(mutant)
            if known is None:
                stages = found.tests(mutant, (runner.tree / mutant.file).read_text(), options.seconds)
                known = results.add(mutant, runner.catch(mutant, stages), sum(map(len, stages)))
            return known

        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(outcome, drawn))
    version = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    text = table(rows, equivalents(), f"Mutants caught, a sample of {len(rows)} with seed {options.seed}, at {version}")
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
