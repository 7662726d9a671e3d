"""Counts below a threshold after a change of variables, against dense Hessians in float64."""

import functools

import numpy as np
import pytest
import torch
from tiny_models import causal_lm, token_batches

import qat
import spectra
from spectra.algorithms import inertia


@functools.cache
def hessian(bits=None, seed=0):
    """A small language model's Hessian in float64, and its eigenvalues; those of rows of zeros are exactly zero."""
    model, batches = causal_lm("llama", seed=seed), token_batches([(16, 9, 12, 16)], seed=seed + 1)
    if bits is None:
        op = spectra.HessianOperator(model, batches)
    else:
        qat.quantize_model(model, qat.QuantConfig(bits=bits))
        op = qat.hessian_operator(model, batches, "ste")
    matrix = op.to_dense().numpy()
    kept = matrix.any(axis=1)
    values = np.zeros(len(matrix))
    values[kept] = np.linalg.eigvalsh(matrix[np.ix_(kept, kept)])
    return op, values


@pytest.fixture(scope="module")
def case():
    return hessian()


@pytest.mark.parametrize("quantile", [0.2, 0.9])
def test_the_count_below_any_threshold(case, quantile):
    op, values = case
    threshold = float(np.quantile(values, quantile))
    count, _ = spectra.count_below(op, threshold, products=300)
    share = count.share()
    assert share.low <= np.mean(values < threshold) <= share.high
    assert count.products <= 300


@pytest.mark.parametrize(("bits", "threshold"), [(1, 1e-4), (2, -1e-4), (2, 0.0)])
def test_masked_weights_count_on_their_side_of_the_threshold(bits, threshold):
    op, values = hessian(bits)
    assert np.mean(values == 0) > 0.02
    count, found = spectra.count_below(op, threshold, products=300)
    share = count.share()
    assert share.low <= np.mean(values < threshold) <= share.high
    assert found.mask is not None


def test_a_density_reads_its_negative_share_from_the_count_alone(case):
    op, values = case
    plain = spectra.slq(op, probes=2, steps=30)
    counted = spectra.slq(op, probes=2, steps=30, congruence=True, count_products=250)
    assert counted.trace() == plain.trace()
    assert counted.rms() == plain.rms()
    share = counted.negative_share()
    assert share.low <= np.mean(values < 0) <= share.high
    assert share.half_width < plain.negative_share().half_width / 2
    assert counted.count.products <= 250


def test_an_earlier_change_of_variables_shortens_the_search(case):
    op, _ = case
    cold, found = spectra.count_below(op, products=200)
    warm, _ = spectra.count_below(op, products=200, start=found)
    assert warm.search_products < cold.search_products
    density = spectra.slq(op, probes=1, steps=20, congruence=found, count_products=200)
    assert density.count.search_products == warm.search_products


def test_progress_ends_full_and_counts_every_product(case):
    op, _ = case
    seen, before = [], op.products
    count, _ = spectra.count_below(op, products=200, progress=lambda *counts: seen.append(counts))
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == op.products - before == count.products


def test_a_hopeless_count_ends_after_its_first_steps(case, monkeypatch):
    op, _ = case
    monkeypatch.setattr(inertia, "HOPELESS", 0.0)
    count, _ = spectra.count_below(op, products=300)
    assert count.cost()["steps"] == inertia.FIRST_STEPS


def test_rounding_error_is_left_to_float64_where_that_is_fast(monkeypatch):
    model, batches = causal_lm("llama", dtype=torch.float32), token_batches([(16, 16, 12, 16), (16, 9, 16)], seed=1)
    op = spectra.HessianOperator(model, batches)
    lower, _ = spectra.count_below(op, products=200)
    monkeypatch.setattr(inertia, "is_fast_in_float64", lambda device: True)
    monkeypatch.setattr(inertia, "LARGEST_ROUNDING", 0.0)
    monkeypatch.setattr(inertia, "HEAVY_TAILED", 0.0)
    monkeypatch.setattr(inertia, "LONG_BUDGET", 0)
    before = op.products
    count, _ = spectra.count_below(op, products=200)
    assert (lower.float_bits, count.float_bits) == (32, 64)
    assert count.measure.rounding_error < lower.measure.rounding_error
    assert count.products == op.products - before <= 200
    assert count.search_products > lower.search_products
    values = np.linalg.eigvalsh(op.in_float64().to_dense().numpy())
    assert count.share().low <= np.mean(values < 0) <= count.share().high


def test_a_basis_is_stored_where_it_takes_a_part_of_the_free_memory(monkeypatch):
    class Shape:
        shape, dtype, vector_bytes = (10**6, 10**6), torch.float32, 4 * 10**6

    op = Shape()
    monkeypatch.setattr(inertia.memory, "available", lambda device: 8 * 10**9)
    op.device = torch.device("cuda")
    assert inertia.count_basis_size(op, 1000) == 1000  # 4 GB, half of what is free
    assert inertia.count_basis_size(op, 1001) == 0
    op.device = torch.device("cpu")
    assert inertia.count_basis_size(op, 250) == 250  # 1 GB, an eighth
    assert inertia.count_basis_size(op, 251) == 0


def test_a_large_basis_is_met_seldom_and_leaves_the_count_true(case, monkeypatch):
    op, values = case
    monkeypatch.setattr(inertia, "SMALL_BASIS_BYTES", 0)
    share = spectra.count_below(op, products=300)[0].share()
    assert share.low <= np.mean(values < 0) <= share.high < 1


def test_a_small_matrix_is_diagonalised():
    values = np.linspace(-1, 2, 150)
    count, found = spectra.count_below(spectra.DiagonalOperator(values), 0.5)
    assert found is None
    assert count.share().value == np.mean(values < 0.5)
    assert count.share().half_width == 0


def test_operators_without_shapes_and_short_budgets_have_none(case):
    assert spectra.count_below(spectra.DiagonalOperator(np.linspace(-1, 2, 400))) is None
    assert spectra.count_below(case[0], products=99) is None
    assert spectra.slq(spectra.DiagonalOperator(np.linspace(-1, 2, 400)), steps=9, congruence=True).count is None


@pytest.mark.parametrize(("tails", "budget", "searches"), [(0.0, 0, 2), (np.inf, 0, 1), (0.0, 10**6, 1)])
def test_a_longer_search_needs_heavy_tails_and_a_long_budget(monkeypatch, tails, budget, searches):
    op = spectra.HessianOperator(causal_lm("llama", dtype=torch.float32), token_batches([(16, 9, 12)], seed=1))
    monkeypatch.setattr(inertia, "is_fast_in_float64", lambda device: True)
    for name, value in {"LARGEST_ROUNDING": 0.0, "HEAVY_TAILED": tails, "LONG_BUDGET": budget, "ROUNDS": 2}.items():
        monkeypatch.setattr(inertia, name, value)
    found, find = [], inertia.find_congruence
    monkeypatch.setattr(inertia, "find_congruence", lambda *a, **k: found.append(find(*a, **k)) or found[-1])
    spectra.count_below(op, products=100)
    assert len(found) == searches


@pytest.mark.parametrize(("half_width", "products", "probes"), [(0.2, 140, 1), (0.002, 140, 1), (0.002, 300, 2)])
def test_a_count_has_the_probe_vectors_that_the_products_allow_and_a_basis_for_one_alone(
    case, monkeypatch, half_width, products, probes
):
    """Forty steps take a third of what a probe vector may spend."""
    asked = []
    monkeypatch.setattr(inertia, "HOPELESS", 0.0)  # the first steps are enough here
    monkeypatch.setattr(inertia, "count_basis_size", lambda op, steps: asked.append(steps) or steps)
    count, _ = spectra.count_below(case[0], half_width=half_width, products=products)
    assert len(count.measure.rules) == probes
    assert len(asked) == (probes == 1)
    assert all(steps == products - count.search_products for steps in asked)
