"""Run and study folders with true spectra in them, made in milliseconds from diagonal operators."""

import math

import numpy as np

from spectra.algorithms.slq import slq
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import summarize
from spectra.operators.explicit import DiagonalOperator
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord

TOLERANCE = 1e-3


def eigenvalues(*, seed=0, scale=1.0, n=400):
    """A bulk within a hundredth of zero and a few outliers of both signs. (n,)"""
    print(f"seed = {seed}")
    bulk = np.random.default_rng(seed).normal(scale=0.01, size=n)
    bulk[:5] = [8.0, 5.0, 3.0, 1.0, -1.5]
    return scale * bulk


def density(*, seed=0, scale=1.0, probes=3, steps=20):
    import torch

    return slq(DiagonalOperator(torch.tensor(eigenvalues(seed=seed, scale=scale))), probes=probes, steps=steps, seed=0)


CHECKS = {"symmetry_gap": 1e-16, "linearity_gap": 2e-16, "repeatability": 0.0, "precision_error": 0.0}


def record(spectrum, *, step=0, mode="full", label="", extras=None, **estimates):
    """The record of a density; estimates given by name take the place of the measured ones."""
    return SpectrumRecord(
        step=step,
        mode=mode,
        loss=2.5 - step / 1000,
        gradient_norm=0.5,
        dimension=spectrum.dimension,
        estimates=summarize(spectrum, TOLERANCE) | estimates,
        near_zero_tol=TOLERANCE,
        probes=len(spectrum.nodes),
        lanczos_steps=spectrum.nodes.shape[1],
        seed=0,
        reorthogonalize="full",
        products=spectrum.nodes.size,
        seconds=0.25,
        label=label,
        extras=extras or {},
        checks=dict(CHECKS),
        versions={"spectra": "0.1.0"},
        dtype="float64",
        device="cpu",
        wall_time=1.7e9,
    )


def add(run, *, step=0, mode="full", label="", scale=1.0, extras=None, **estimates):
    spectrum = density(scale=scale)
    return run.append(record(spectrum, step=step, mode=mode, label=label, extras=extras, **estimates), spectrum)


UNRESOLVED = Estimate(0.4, 0.1, 0.8, False, "the <share> still moved by 0.08 over the last 10 steps: use more steps")


MARKS = ((0, "start"), (10, ""), (20, "end"))
RESETS = ((0, "start"), (10, "before-reset"), (10, "after-reset"), (20, "end"))


def run_folder(folder, *, marks=MARKS, modes=("full",), **config):
    """A run with a record for each mark (step, label) and mode, and a line of telemetry for every second step."""
    run = Run.create(folder, config)
    for step, label in marks:
        for mode in modes:
            shrunk = 1 - step / 100 + (0.3 if label == "after-reset" else 0)
            add(
                run, step=step, mode=mode, label=label, scale=shrunk, extras={"custom": 1.0}, near_zero_share=UNRESOLVED
            )
    for step in range(0, 21, 2):
        line = {"step": step, "loss": 3 - step / 10, "flip_rate": 0.1 * math.exp(-step / 10), "distance_to_grid": 0.3}
        run.append_telemetry(line | ({"validation_loss": 3.1 - step / 10} if step % 4 == 0 else {}))
    return run


COLORS = {1: "#D55E00", 1.58: "#E69F00", 2: "#0072B2", 4: "#009E73"}
REFERENCE = {
    "label": "full precision",
    "group": "full precision",
    "color": "#000000",
    "line": "dashdot",
    "reference": True,
}


def presentation(*, bits, method):
    """What config.json says under "presentation" of how a quantized training run is shown."""
    winq = method == "winq"
    return {
        "label": f"{bits:g}-bit {'WinQ' if winq else method}",
        "group": f"{bits:g}-bit",
        "color": COLORS[bits],
        "line": "solid" if winq else [0, [4, 2]],
        "reference": False,
        "modes": {"ste": "the Hessian seen through the straight-through gradient"},
        "quantities": {
            "flip_rate": {"name": "flip rate", "unit": "", "meaning": "share of the codes that changed"},
            "distance_to_grid": {"name": "distance to the grid", "unit": "", "meaning": "‖W − Q(W)‖ / ‖W‖"},
        },
        "labels": {"before-reset": "before the reset", "after-reset": "after the reset"},
    }


def study_folder(folder, *, bits=(1, 2), reference=False):
    """A study: a baseline and a WinQ run for each bit-width, and the spectrum they are compared with if asked for."""
    study = Run.create(folder, {"steps": 20, "seed": 0, "nested": {"alpha": 0.4}})
    for width in bits:
        for method, marks in (("baseline", MARKS), ("winq", RESETS)):
            config = {"bits": width, "method": method, "presentation": presentation(bits=width, method=method)}
            run_folder(study.folder / f"{width:g}bit-{method}", marks=marks, modes=("ste",), **config)
    if reference:
        config = {"method": "full precision", "presentation": REFERENCE}
        add(Run.create(study.folder / "full-precision", config), mode="full", label="start")
    return study
