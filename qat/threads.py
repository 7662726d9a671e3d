"""Threads that share a machine well: as many as there are cores for us, and asleep while they wait."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def restart_with_patient_threads() -> None:
    """Start this command again, once, in an environment in which OpenMP's threads sleep while they wait.

    By default they spin. Where anything else runs on the same cores, a thread then waits for one that is not running:
    training a small model with two threads on two shared cores took 95 s, and 4 s with threads that sleep. OpenMP
    reads its settings when torch is loaded, so that they can only be changed for a new process. What the user has set
    is left alone, and so are other systems than Linux.
    """
    if sys.platform != "linux" or "OMP_WAIT_POLICY" in os.environ:
        return
    import torch

    threads = min(torch.get_num_threads(), available_cores())
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {"OMP_WAIT_POLICY": "PASSIVE"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def available_cores(cgroups: Path = CGROUPS) -> int:
    """The cores this process may use: those it is bound to, and no more than a container's quota gives time on."""
    cores = len(os.sched_getaffinity(0))
    quota, period = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota / period)))


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
