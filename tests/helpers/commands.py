"""Commands in processes of their own, to be killed and compared.

A command takes six seconds to import what it needs. So most tests fork it from a server that has it all imported; the
long ones start an interpreter for each (`fresh`).
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

TIMES = ("wall_time", "seconds")
PROGRESS = re.compile(r": [\d,]+ of [\d,]+ \w+, \d\d:\d\d")
MODULES = {"qat": "qat.cli", "spectra": "spectra.cli.main"}
PRELOADED = ["qat.cli", "qat.study.compare", "spectra.cli.main", "spectra.integrations.loading", "matplotlib.figure"]

_numbers = itertools.count()


def start(program, *arguments, cache, fresh=False, figures=False):
    """The command `qat` or `spectra` as the leader of a process group.

    Temporary files go to the folder `temporary` beside the cache. Figures are left out of reports unless asked for, or
    the process is fresh.
    """
    temporary = Path(cache).with_name("temporary")
    temporary.mkdir(exist_ok=True)
    environment = {"QAT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    arguments = list(map(str, arguments))
    if not fresh:
        return Forked(MODULES[program], arguments, environment, figures=figures)
    return subprocess.Popen(
        [sys.executable, "-c", f"import {MODULES[program]} as m; raise SystemExit(m.main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


class Forked:
    """A command in a process that a server has forked, as far as it has the methods of `subprocess.Popen`."""

    def __init__(self, module, arguments, environment, *, figures):
        number = next(_numbers)
        self._files = [Path(environment["QAT_CACHE"]).with_name(f"{name}-{number}") for name in ("stdout", "stderr")]
        with _one_thread():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()
        self._process = context.Process(target=_run, args=(module, arguments, environment, self._files, figures))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._files)


@contextlib.contextmanager
def _one_thread():
    """The server must not have threads when it forks."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _run(module, arguments, environment, files, figures):
    """In the forked process: the command, as its console script would run it."""
    import importlib
    import tempfile

    from spectra.views import page

    os.setsid()
    for path, number in zip(files, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = [module, *arguments]
    if not figures:
        page.density_pictures = page.trajectory_pictures = lambda run: []
    code = importlib.import_module(module).main(arguments)
    sys.stdout.flush()
    sys.exit(code)


def finish(process, seconds=300):
    """Exit code, stdout and stderr at the end of a command, without the lines of progress that a busy machine gets."""
    out, err = process.communicate(timeout=seconds)
    lines = [line for line in err.splitlines(keepends=True) if not PROGRESS.search(line)]
    return process.returncode, out, "".join(lines)


def signal_group(process, number):
    """Send a signal to the command and its workers, as a terminal does with Ctrl-C."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def kill_alone(process):
    """SIGKILL the command itself; its workers must see that it is gone."""
    process.send_signal(signal.SIGKILL)


def group_members(process):
    """The processes of the command's group that are left, without zombies."""
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z":
            left.append(int(path.parent.name))
    return left


def none_left(process, seconds=10.0):
    """Whether every process of the group is gone within some seconds."""
    limit = time.monotonic() + seconds
    while group_members(process) and time.monotonic() < limit:
        time.sleep(0.05)
    return not group_members(process)


def contents(folder):
    """Every record, telemetry line, matrix and table of a run or study, without times and without the folder's name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "config.json" and "model" not in path.parts:
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "out"}
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.name in ("table.json", "table.md"):
            found[name] = path.read_text()
    return found


def _without_times(fields):
    return {key: value for key, value in fields.items() if key not in TIMES}
