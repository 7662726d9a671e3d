"""How many recurrences are advanced together."""

import numpy as np
import pytest

import spectra
from spectra.algorithms import block_size
from spectra.backend import memory


@pytest.mark.parametrize(
    ("free", "kept", "deflated", "expected"),
    [
        (4 * 50, 0, False, 10),  # a quarter of the free memory, five vectors a probe
        (4 * 50, 5, False, 5),
        (4 * 4, 0, False, 1),  # never none
        (10**9, 0, False, 20),  # beyond that a CPU's own limit
        (10**9, 0, True, 60),
    ],
)
def test_as_many_as_memory_and_the_cpu_allow(monkeypatch, free, kept, deflated, expected):
    op = spectra.DiagonalOperator(np.ones(1000))
    monkeypatch.setattr(memory, "available", lambda device: free * op.vector_bytes)
    monkeypatch.setattr(block_size, "CPU_BLOCK_BYTES", 100 * op.vector_bytes)
    monkeypatch.setattr(block_size, "CPU_BLOCK_BYTES_DEFLATED", 300 * op.vector_bytes)
    assert block_size.probe_block_size(op, kept, deflated=deflated) == expected
    assert block_size.max_vectors_in_memory(op) == free // 4
