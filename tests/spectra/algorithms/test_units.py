"""Eigenvalues in other units: multiplied by a power of two, so that no rounding differs."""

import numpy as np
import pytest
from oracles import matrix_with_spectrum

import spectra
from spectra.estimates.quantities import summarize

RNG = np.random.default_rng(0)
VALUES = np.concatenate([0.02 * RNG.standard_t(3, size=294) + 0.004, np.zeros(3), [9.0, 4.0, -3.0]])
SMALL = np.concatenate([np.zeros(90), [5.0, -3.0, 1.0]])
NEAR = 2.0**-6


def estimates(found):
    return {key: (e.value, e.low, e.high, e.resolved) for key, e in found.items()}


def shares(op, scale):
    density = spectra.slq(op, probes=3, steps=30, deflate=2)
    found = estimates(summarize(density, near_zero_tol=NEAR * scale))
    band = density.band()
    return {
        **{
            key: (value / scale, low / scale, high / scale, resolved)
            for key, (value, low, high, resolved) in found.items()
            if not key.endswith("share")
        },
        **{key: numbers for key, numbers in found.items() if key.endswith("share")},
        "thresholds": (band.thresholds / scale).tolist(),
        "low": band.low.tolist(),
        "high": band.high.tolist(),
    }


MEASURED = {
    "slq": shares,
    "topk": lambda op, scale: (spectra.topk(op, 4).values / scale).tolist(),
    "resolve": lambda op, scale: estimates({"share": spectra.resolve(op, budget=100)}),
    "near zero": lambda op, scale: estimates(
        {"share": spectra.resolve(op, share="near_zero", tol=NEAR * scale, budget=100)}
    ),
    "compare": lambda op, scale: {
        key: (
            *(pytest.approx(number, rel=1e-12) for number in (change.ratio.value, change.ratio.low, change.ratio.high)),
            change.ratio.resolved,
        )
        for key, change in spectra.compare(
            spectra.slq(op, probes=3, steps=20),
            spectra.slq(spectra.DenseOperator(op.matrix * 1.5), probes=3, steps=20),
            near_zero_tol=NEAR * scale,
        ).items()
    },
    **{
        method: lambda op, scale, method=method: [
            number / scale
            for found in (
                spectra.trace(op, method=method, probes=20),
                spectra.trace(spectra.DenseOperator(scale * matrix_with_spectrum(SMALL, seed=2)), method=method),
            )
            for number in (found.value, found.low, found.high)
        ]
        for method in ("hutchinson", "hutch++", "xtrace")
    },
}


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("name", MEASURED)
def test_other_units_change_nothing_else(name, scale):
    matrix = matrix_with_spectrum(VALUES, seed=1)
    want = MEASURED[name](spectra.DenseOperator(matrix), 1.0)
    assert MEASURED[name](spectra.DenseOperator(scale * matrix), scale) == want
