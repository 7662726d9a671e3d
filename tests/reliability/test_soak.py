"""Measurement after measurement: memory, file handles and threads stay where they were after the first ones."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import spectra

PAGE = os.sysconf("SC_PAGE_SIZE")
SLACK = 24.0  # MB that an allocator may hold on to


def figures():
    """Resident memory in MB, open file handles, threads of Python and of the system, tensors alive."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6
    tensors = sum(1 for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter))
    threads = len(os.listdir("/proc/self/task"))
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count(), threads, tensors


def soak(measurements, folder, *, warm_up):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings = {"probes": 2, "steps": 8, "deflate": 2, "count_products": 0}
    with spectra.SpectrumProbe(model, batches, every=1, out=folder, **settings) as probe:
        for step in range(measurements):
            nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step(step)
            if step == warm_up:
                before = figures()
        after = figures()
    print(f"{measurements} measurements; memory, handles, threads, system threads, tensors: {before} -> {after}")
    assert len(spectra.Run(folder).measured) == measurements
    assert after[0] <= before[0] + SLACK
    assert after[1:] == before[1:]


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def test_twenty_measurements_hold_nothing(tmp_path):
    soak(20, tmp_path / "run", warm_up=8)


@pytest.mark.slow
def test_five_hundred_measurements_hold_nothing(tmp_path):
    soak(500, tmp_path / "run", warm_up=25)
