"""Runs of a study in parallel: each in a process of its own, on one thread.

Small models gain little from threads, and lose much where other programs use the same cores: a thread of OpenMP keeps
its core busy while it waits for another. Training such a model took 3 s with two threads on two idle cores, 4 s with
one thread, and 40 to 95 s with two threads on busy cores. Processes do not wait for each other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qat.training.progress import POSITION
from spectra.backend.errors import InputError

CGROUPS = Path("/sys/fs/cgroup")
MOST_WORKERS = 4  # each holds about 0.6 GB for its libraries alone

_shared: Any = None  # in a worker's process, the first argument of every job


def run_jobs(
    job: Callable[..., Any], shared: Any, arguments: Sequence[tuple[Any, ...]], *, workers: int
) -> Generator[tuple[int, Any], None, None]:
    """Run jobs one after the other, or in parallel processes.

    After an error no further job is started. Running jobs are completed, and then the error is raised. An interrupt
    ends the processes at once, and so does the end of this process, even by SIGKILL.

    Args:
        job: Called as job(shared, *arguments[i]); a function that can be pickled.
        shared: What all jobs have in common; it is sent to each process once.
        arguments: The further arguments of each job.
        workers: How many processes; 1 runs the jobs in this one.

    Yields:
        Pairs (i, result of job i), in the order in which they are completed.

    Raises:
        InputError: A worker was killed, as systems do when memory runs out.
    """
    if workers <= 1 or not arguments:  # nothing is left to run where a killed study was finished
        for index, given in enumerate(arguments):
            yield index, job(shared, *given)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks that threads of libraries hold
    parent_lives, lifeline = context.Pipe(duplex=False)  # the system closes `lifeline` when this process ends
    setup = (pickle.dumps(shared), context.RLock(), context.Value("i", 0), parent_lives)
    with (
        lifeline,
        ProcessPoolExecutor(min(workers, len(arguments)), context, initializer=_set_up, initargs=setup) as pool,
    ):
        try:
            with _interrupts_held():  # the processes inherit this, and leave an interrupt to this one
                futures = {pool.submit(_in_worker, job, given): index for index, given in enumerate(arguments)}
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, most likely for want of memory: run one at a time with --workers 1"
            ) from error
        except (KeyboardInterrupt, GeneratorExit):
            lifeline.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def available_cores(cgroups: Path = CGROUPS) -> int:
    """How many cores this process may use, by its CPU affinity and by the quota of its container.

    Args:
        cgroups: Where the system's control groups are mounted.

    Returns:
        The number of cores, 1 or more.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota / period)))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch to `count` threads inside; a lower limit that was set before stays.

    Args:
        count: The largest number of threads.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota(cgroups: Path) -> tuple[int | None, int]:
    """The processor time in a period and the period, in microseconds, for both versions of control groups.

    A quota of None is no limit.
    """
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


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A context that delays interrupts until its exit, on systems that can."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_torchao() -> None:
    """Let torchao, which transformers loads where it finds it, say nothing of kernels that it lacks."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _set_up(shared: bytes, lock: Any, counter: Any, parent_lives: Connection) -> None:
    """Prepare a new worker: one thread, its own line for progress bars, and an end with its parent."""
    global _shared
    quiet_torchao()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_lives,), daemon=True).start()
    torch.set_num_threads(1)
    with counter.get_lock():
        os.environ[POSITION] = str(counter.value)
        counter.value += 1
    tqdm.set_lock(lock)
    _shared = pickle.loads(shared)


def _end_with(parent_lives: Connection) -> None:
    """End this process as soon as the parent's end of the pipe is closed, by the parent or because it has ended."""
    with contextlib.suppress(EOFError, OSError):
        parent_lives.recv_bytes()
    os._exit(130)


def _in_worker(job: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    return job(_shared, *given)
