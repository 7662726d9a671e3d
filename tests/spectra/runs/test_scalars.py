"""What a logger gets of a record, and when."""

import math
import random

import numpy as np
import pytest
import tiny_models
import torch

import spectra
from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.runs.record import SpectrumRecord
from spectra.runs.scalars import scalars

OPTIONS = {"probes": 2, "steps": 4, "deflate": 0, "count_products": 0}


def record(**changes):
    fields = {
        "step": 7,
        "mode": "ste",
        "loss": 2.5,
        "gradient_norm": 0.5,
        "dimension": 3,
        "near_zero_tol": 0.1,
        "probes": 2,
        "lanczos_steps": 4,
        "seed": 0,
        "reorthogonalize": "full",
        "products": 8,
        "seconds": 1.5,
        "estimates": {
            "rms": Estimate(2.0, 1.0, 3.0),
            "trace": Estimate(4.0, -math.inf, 9.0, resolved=False, reason="why"),
        },
    }
    return SpectrumRecord(**{**fields, **changes})


NUMBERS = {
    "loss": 2.5,
    "gradient_norm": 0.5,
    "rms": 2.0,
    "rms_low": 1.0,
    "rms_high": 3.0,
    "trace_high": 9.0,
    "seconds": 1.5,
}


@pytest.mark.parametrize(
    ("changes", "options", "prefix"),
    [
        ({}, {}, "spectra"),
        ({"label": "start"}, {"occasions": ("", "start")}, "spectra"),
        ({"label": "before-reset"}, {}, "spectra/before-reset"),
        ({}, {"prefix": "mlp"}, "mlp"),
        ({}, {"several_modes": True}, "spectra/ste"),
        ({"label": "before-reset"}, {"several_modes": True}, "spectra/ste/before-reset"),
    ],
)
def test_names_and_numbers(changes, options, prefix):
    """An unresolved value and an end that is not bounded are left out."""
    assert scalars(record(**changes), **options) == {f"{prefix}/{name}": value for name, value in NUMBERS.items()}


def test_a_failed_measurement_has_none():
    assert scalars(record(status="failed", reason="why")) == {}


def test_a_probe_logs_what_it_records(tmp_path):
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    logged = []
    modes = {"full": spectra.HessianOperator, "other": spectra.HessianOperator}
    options = {"every": 2, "out": tmp_path, "modes": modes, "log": lambda values, step: logged.append((step, values))}
    with spectra.SpectrumProbe(model, batches, **options, **OPTIONS) as probe:
        for i in range(4):
            probe.step(i)
    assert [step for step, _ in logged] == [0, 2, 3]
    for step, values in logged:
        assert all(type(value) is float for value in values.values())
        for found in (record for record in probe.records if record.step == step):
            assert values[f"spectra/{found.mode}/lambda_max_high"] == found.estimates["lambda_max"].high
    before = list(logged)
    with spectra.SpectrumProbe(model, batches, **options, **OPTIONS) as again:  # goes on from step 2
        for i in range(2, 5):
            again.step(i)
    assert logged[:3] == before
    assert logged[3] == before[1]  # what the folder held is logged as the training gets there
    assert [step for step, _ in logged[3:]] == [2, 4]


def test_a_log_ends_no_training_and_draws_no_numbers():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))

    def log(values, step):
        random.random(), torch.rand(()), np.random.rand()  # noqa: NPY002
        if step == 2:
            raise OSError("no room")

    def numbers(**options):
        random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
        probe = spectra.SpectrumProbe(model, batches, every=1, **options, **OPTIONS)
        for i in range(4):
            probe.step(i)
        assert len(probe.records) == 4
        return random.random(), float(torch.rand(())), np.random.rand()  # noqa: NPY002

    with pytest.warns(UserWarning, match="training step 2 was not logged: log= OSError: no room"):
        assert numbers(log=log) == numbers()
    with pytest.raises(OSError):
        numbers(log=log, strict=True)
    with pytest.raises(InputError, match="log must be a function"):
        numbers(log="tensorboard")
    with pytest.raises(InputError, match="log_prefix must be a name"):
        numbers(log_prefix="")
