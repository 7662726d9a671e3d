"""Bars never run over their total, and end at it."""

import numpy as np
import pytest

import spectra
from spectra.algorithms.progress import Progress

OP = spectra.DiagonalOperator(np.append(np.linspace(-1, 3, 3000), [40.0, -30.0, 20.0]))
CALLS = {
    "slq": lambda report: spectra.slq(OP, probes=3, steps=20, progress=report),
    "slq after deflation": lambda report: spectra.slq(OP, probes=3, steps=20, deflate=3, progress=report),
    "exact slq": lambda report: spectra.slq(spectra.DiagonalOperator(OP.values[:50]), steps=60, progress=report),
    "topk": lambda report: spectra.topk(OP, 3, progress=report),
    "topk with restarts": lambda report: spectra.topk(OP, 5, basis=8, max_products=60, progress=report),
    "dense topk": lambda report: spectra.topk(spectra.DiagonalOperator(OP.values[:50]), 3, progress=report),
    "resolve": lambda report: spectra.resolve(OP, half_width=0.1, budget=400, progress=report),
    "exact resolve": lambda report: spectra.resolve(OP, budget=5000, progress=report),
    "hutchinson": lambda report: spectra.trace(OP, probes=30, progress=report),
    "hutch++": lambda report: spectra.trace(OP, method="hutch++", probes=30, progress=report),
    "xtrace": lambda report: spectra.trace(OP, method="xtrace", probes=31, progress=report),
    "exact trace": lambda report: spectra.trace(OP, probes=5000, progress=report),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bar_ends_at_its_total(name):
    reports = []
    CALLS[name](lambda done, total: reports.append((done, total)))
    done = [each for each, _ in reports]
    assert done == sorted(done)
    assert all(each <= total for each, total in reports)
    assert done[-1] == reports[-1][1] > 1
    assert len(reports) > 2 or name.startswith(("exact", "dense", "xtrace", "hutchinson"))


def test_deflation_is_counted():
    reports = []
    before = OP.products
    spectra.slq(OP, probes=3, steps=20, deflate=3, progress=lambda done, total: reports.append((done, total)))
    assert reports[0][0] == 1
    assert reports[-1][0] == OP.products - before > 60


def test_a_part_adds_to_what_was_done():
    reports = []
    count = Progress(lambda done, total: reports.append((done, total)), 10)
    count.add(4)
    part = count.part(remaining=7)
    part(1, 2)
    part(2, 2)
    count.reach(5)  # never backwards
    count.add(3)
    count.finish()
    count.finish()
    assert reports == [(4, 10), (5, 13), (6, 13), (9, 13), (9, 9)]
    Progress(None, 1).add(5)
