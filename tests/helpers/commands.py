"""Commands in processes of their own, to be killed and compared."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMES = ("wall_time", "seconds")
STUDY = [
    *("--bits", "2", "--methods", "baseline,winq", "--steps", "4", "--batch-size", "2", "--length", "8"),
    *("--probes", "1", "--lanczos-steps", "3", "--deflate", "0", "--measure-sequences", "2"),
    *("--validation-sequences", "4", "--device", "cpu"),
]


def start(program, *arguments, cache):
    """The command `qat` or `spectra` as the leader of a process group."""
    module = {"qat": "qat.cli", "spectra": "spectra.cli"}[program]
    environment = os.environ | {"QAT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process, seconds=300):
    """Exit code, stdout and stderr at the end of a command."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


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
