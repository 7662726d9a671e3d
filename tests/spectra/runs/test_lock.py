"""One writer for each folder, between processes and within one."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.runs import lock
from spectra.runs.folder import Run
from spectra.runs.lock import WriterLock

HOLD = """
import sys
from pathlib import Path
from spectra.runs.lock import WriterLock
held = WriterLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_until_the_owner_is_killed(other, tmp_path):
    with pytest.raises(InputError, match=rf"is being written by another process \({other.pid}\)") as caught:
        Run.open_or_create(tmp_path, {})
    assert "\n" not in str(caught.value)
    assert "choose another out=" in str(caught.value)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with Run.open_or_create(tmp_path, {}) as run:
        run_folders.add(run)


def test_readers_need_no_lock(tmp_path):
    run = run_folders.run_folder(tmp_path)
    program = "import sys, spectra; print(len(spectra.Run(sys.argv[1]).records))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "3\n"
    run_folders.add(run, step=30)


def test_within_a_process_the_last_one_to_take_it_writes(tmp_path):
    first = Run.open_or_create(tmp_path, {})
    run_folders.add(first, step=0)
    second = Run.open_or_create(tmp_path, {})
    run_folders.add(second, step=1)
    with pytest.raises(InputError, match="was opened again and is written there"):
        run_folders.add(first, step=2)
    with pytest.raises(InputError, match="was opened again and is written there"):
        first.append_telemetry({"step": 2})
    assert [record.step for record in first.records] == [0, 1]
    second.close()
    first.close()
    run_folders.add(first, step=3)
    assert [record.step for record in second.records] == [0, 1, 3]


@pytest.mark.parametrize("how", ["release", "drop"])
def test_a_lock_ends_with_its_owner(tmp_path, how):
    held = WriterLock(tmp_path)
    if how == "release":
        held.release()
        assert not held.is_held
    del held
    program = HOLD.replace("sys.stdin.read()", "")
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "held\n", done.stderr


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """As the workers of a DataLoader, which may outlive a training that is killed."""
    held = WriterLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        held.release()
        program = HOLD.replace("sys.stdin.read()", "")
        command = [sys.executable, "-c", program, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout == "held\n", done.stderr
    finally:
        os.close(write)
        os.waitpid(child, 0)


@pytest.mark.parametrize("missing", ["flock", "module"])
def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch, missing):
    def fail(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", fail)
    run = Run.create(tmp_path / "a")
    run_folders.add(run)
    assert len(run.records) == 1


def test_handles_do_not_add_up(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    run_folders.add(Run.create(tmp_path))
    before = count()
    for step in range(20):
        run_folders.add(Run.open_or_create(tmp_path, {}), step=step)
    assert count() <= before + 1


def test_whether_this_process_writes_to_a_folder(tmp_path, other):
    (tmp_path / "mine").mkdir()
    held = WriterLock(tmp_path / "mine")
    assert lock.is_written_here(tmp_path / "mine")
    held.release()
    assert not lock.is_written_here(tmp_path / "mine")
    assert not lock.is_written_here(tmp_path)  # another process does
