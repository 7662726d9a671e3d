"""What is free on a device, and what operations allocate."""

import pytest
import torch

from spectra.backend import memory
from spectra.backend.memory import AllocationMeter


def test_the_meter_counts_a_storage_once_and_forgets_it():
    x = torch.zeros(1000)
    with AllocationMeter() as meter:
        y = x + 1
        _ = y.view(10, 100).T
        x.add_(1)
        assert meter.live == meter.peak == 4000
        del y, _
        assert meter.live == 0
        torch.zeros(2000)
    assert meter.peak == 8000


@pytest.mark.parametrize(
    ("limit", "used", "machine", "free"), [(900, 300, 1000, 600), (9000, 300, 1000, 1000), (5, 9, 7, 0)]
)
def test_the_smaller_of_machine_and_control_group_is_free(monkeypatch, tmp_path, limit, used, machine, free):
    for name, number in (("_CGROUP_LIMIT", limit), ("_CGROUP_USED", used)):
        (tmp_path / name).write_text(f"{number}\n")
        monkeypatch.setattr(memory, name, tmp_path / name)
    monkeypatch.setattr(memory, "_machine_available", lambda: machine)
    assert memory.available(torch.device("cpu")) == free


def test_without_a_limit_the_machine_decides(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "max")
    monkeypatch.setattr(memory, "_machine_available", lambda: 1234)
    assert memory.available(torch.device("cpu")) == 1234
