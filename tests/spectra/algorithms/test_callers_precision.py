"""Numbers do not depend on the precision that a caller has set for matrix products."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, normal

import spectra
from spectra.algorithms.congruence import find_congruence

MATRIX = matrix_with_spectrum(np.append(np.random.default_rng(0).normal(size=119), 20.0), seed=1).float()
SPACE = type("Space", (), {"shapes": ((12, 10),), "names": ("weight",)})


def dense():
    op = spectra.DenseOperator(MATRIX)
    op.space = SPACE
    return op


MEASURED = {
    "lanczos": lambda op: spectra.lanczos(op, normal(120, seed=2, dtype=torch.float32), 20).alphas,
    "slq": lambda op: spectra.slq(op, probes=2, steps=20).alphas,
    "topk": lambda op: spectra.topk(op, 3).values,
    "trace": lambda op: spectra.trace(op, probes=10).value,
    "resolve": lambda op: spectra.resolve(op, budget=60, half_width=0.4).value,
    "find_congruence": lambda op: find_congruence(op).kurtosis,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_callers_autocast_changes_nothing(name):
    want = MEASURED[name](dense())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (dense() @ normal(120, 1, seed=3, dtype=torch.float32)).isfinite().all()
        found = MEASURED[name](dense())
    assert np.array_equal(found, want)
