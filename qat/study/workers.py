"""Runs of a study side by side: a process each, one thread each, and as many as there are cores.

Small models gain little from threads and lose much where other programs run on the same cores: OpenMP's threads spin
while they wait for one that is not running. Training such a model took 3 s with two threads on two idle cores, 4 s
with one, and 40 to 95 s with two on busy cores. Processes wait for nobody.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qat.training.progress import POSITION
from spectra.backend.errors import InputError

CGROUPS = Path("/sys/fs/cgroup")
MOST_WORKERS = 4  # each holds about 0.6 GB for its libraries alone

_shared: Any = None  # in a worker, what all jobs have in common


def run_jobs(
    job: Callable[..., Any], shared: Any, arguments: Sequence[tuple[Any, ...]], *, workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield (i, job(shared, *arguments[i])) as they are done: in turn with one worker, else side by side.

    After an error no further job is started; those that run come to their end, and then the error is raised.
    Raises InputError when a worker is killed, as a system does that is out of memory.
    """
    if workers <= 1:
        for index, given in enumerate(arguments):
            yield index, job(shared, *given)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks that threads of libraries hold
    setup = (pickle.dumps(shared), context.RLock(), context.Value("i", 0))
    with ProcessPoolExecutor(min(workers, len(arguments)), context, initializer=_set_up, initargs=setup) as pool:
        futures = {pool.submit(_in_worker, job, given): index for index, given in enumerate(arguments)}
        try:
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, most likely for want of memory: run one at a time with --workers 1"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def available_cores(cgroups: Path = CGROUPS) -> int:
    """The cores this process may use: those it is bound to, and no more than a container's quota gives time on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota / period)))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on at most `count` threads, and on no more than it did before."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota(cgroups: Path) -> tuple[int | None, int]:
    """Microseconds of processor time in a period, under either version of control groups; None is no limit."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
        return (None, 1) if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        pass
    try:
        quota = int((cgroups / "cpu" / "cpu.cfs_quota_us").read_text())
        return (None, 1) if quota < 0 else (quota, int((cgroups / "cpu" / "cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):
        return None, 1


def _set_up(shared: bytes, lock: Any, counter: Any) -> None:
    """In a new worker: one thread, a line of the terminal of its own, and no traceback when the user interrupts."""
    global _shared
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    torch.set_num_threads(1)
    with counter.get_lock():
        os.environ[POSITION] = str(counter.value)
        counter.value += 1
    tqdm.set_lock(lock)
    _shared = pickle.loads(shared)


def _in_worker(job: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    return job(_shared, *given)
