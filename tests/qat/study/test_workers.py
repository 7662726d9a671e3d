"""Jobs in processes of their own: the same results as in turn, errors as they are, and no more cores than given."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qat.study import workers
from spectra.backend.errors import InputError, NonFiniteError


def square(shared, number):
    return shared * number**2, os.getpid(), torch.get_num_threads()


def break_down(shared, path, number):
    (path / f"{number}-began").touch()
    if number == 0:
        raise NonFiniteError("the loss is nan")
    time.sleep(0.5)
    (path / f"{number}-ended").touch()


def die(shared):
    os._exit(9)


def test_jobs_in_turn_and_side_by_side_give_the_same():
    jobs = [(number,) for number in range(5)]
    in_turn = dict(workers.run_jobs(square, 3, jobs, workers=1))
    beside = dict(workers.run_jobs(square, 3, jobs, workers=2))
    assert {index: result[0] for index, result in in_turn.items()} == {index: 3 * index**2 for index in range(5)}
    assert {index: result[0] for index, result in beside.items()} == {index: 3 * index**2 for index in range(5)}
    assert {result[1] for result in in_turn.values()} == {os.getpid()}
    assert os.getpid() not in {result[1] for result in beside.values()}
    assert {result[2] for result in beside.values()} == {1}


def test_an_error_ends_what_has_not_begun_and_lets_the_rest_end(tmp_path):
    jobs = [(tmp_path, number) for number in range(12)]
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        list(workers.run_jobs(break_down, None, jobs, workers=2))
    began = {path.name.removesuffix("-began") for path in tmp_path.glob("*-began")}
    ended = {path.name.removesuffix("-ended") for path in tmp_path.glob("*-ended")}
    assert ended == began - {"0"}
    assert len(began) < 12


def test_a_worker_that_is_killed_says_what_to_do():
    with pytest.raises(InputError, match="--workers 1"):
        list(workers.run_jobs(die, None, [()], workers=2))


PARENT = """
import sys
sys.path.insert(0, {here!r})
import test_workers
from qat.study.workers import run_jobs
from spectra.cli.command_line import run_command

def main(arguments=None):
    list(run_jobs(test_workers.wait_long, None, [({folder!r},)] * {count}, workers=2))

if __name__ == "__main__":
    raise SystemExit(run_command(main, name="prog")())
"""


def wait_long(shared, folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(300)


def lives(process):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=60.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at the processes in /proc")
@pytest.mark.parametrize(("number", "code", "count"), [(signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGINT, 130, 1)])
def test_workers_end_with_their_parent(number, code, count, tmp_path):
    """The signal goes to the parent alone: the workers must see by themselves that it is gone."""
    began = tmp_path / "began"
    began.mkdir()
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(here=str(Path(__file__).parent), folder=str(began), count=count))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert until(lambda: len(list(began.iterdir())) == count)
            workers_of_it = [int(path.name) for path in began.iterdir()]
            assert all(map(lives, workers_of_it))
            parent.send_signal(number)
            assert parent.wait(timeout=30) == code
            assert until(lambda: not any(map(lives, workers_of_it)), seconds=10)
        finally:
            parent.kill()
        assert "Traceback" not in parent.stderr.read()


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", None), ("150000 100000", 2), ("20000 100000", 1)])
def test_no_more_cores_than_a_containers_quota(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(limit)
    assert workers.available_cores(tmp_path) == (cores or 8)


@pytest.mark.parametrize(("limit", "cores"), [("-1", 8), ("400000", 4), ("50000", 1)])
def test_the_older_kind_of_quota(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(limit)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert workers.available_cores(tmp_path) == cores


def test_without_quota_every_core_it_is_bound_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert workers.available_cores(tmp_path) == 3


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with workers.threads(1):
        assert torch.get_num_threads() == 1
        with workers.threads(64):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_no_jobs_are_none_with_any_number_of_workers():
    assert [list(workers.run_jobs(print, None, [], workers=count)) for count in (1, 2)] == [[], []]
