"""resolve: it keeps to the budget, reaches the half-width or says why not, and its intervals cover (a fast subset)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum

import spectra
from spectra.algorithms import resolve as resolution
from spectra.algorithms.congruence import find_congruence
from spectra.algorithms.inertia import recurrences_after_congruence
from spectra.algorithms.share_recurrences import probes_needed


def bulk(name, n, rng):
    return {
        "gauss": lambda: rng.normal(size=n) + 0.2,
        "laplace": lambda: rng.laplace(size=n) + 0.15,
        "student": lambda: rng.standard_t(2.5, size=n) + 0.2,
        "gamma": lambda: rng.gamma(2, size=n) - 0.8,
        "log-normal": lambda: 10 ** rng.uniform(-4, 0, size=n) * np.where(rng.random(n) < 0.4, -1, 1),
    }[name]()


def values_of(name, seed, *, n=5000, radius=27.0, zeros=0.0):
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    values = bulk(name, n, rng)
    values *= 0.005 / np.sqrt(np.mean(values**2))
    values[rng.random(n) < zeros] = 0.0
    values[:30] = np.geomspace(0.3, radius, 30)
    return values


@pytest.mark.parametrize("name", ["gauss", "laplace", "student", "gamma"])
@pytest.mark.parametrize("zeros", [0.0, 0.43])
@pytest.mark.parametrize("seed", range(4))
def test_ordinary_bulks_are_resolved_and_covered(name, zeros, seed):
    values = values_of(name, seed, zeros=zeros, radius=1000.0 if seed % 2 else 27.0)
    share = spectra.resolve(spectra.DiagonalOperator(values), budget=1500, seed=seed)
    assert share.resolved, share.reason
    assert share.low <= (values < 0).mean() <= share.high
    assert share.half_width <= 0.05
    assert share.products <= 1500
    assert abs(share.value - (values < 0).mean()) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_spectra_over_decades_are_covered_or_unresolved(seed):
    values = values_of("log-normal", seed)
    share = spectra.resolve(spectra.DiagonalOperator(values), budget=600, seed=seed)
    assert share.low <= (values < 0).mean() <= share.high
    if not share.resolved:
        assert "600" in share.reason
    assert share.products <= 600


def test_other_shares_and_a_tighter_width():
    values = values_of("gauss", 0)
    op = spectra.DiagonalOperator(values)
    near = spectra.resolve(op, share="near_zero", tol=3e-3, half_width=0.04, budget=3000)
    assert near.low <= (np.abs(values) < 3e-3).mean() <= near.high
    assert near.resolved
    inside = spectra.resolve(op, share="between", between=(0.004, 1.0), half_width=0.03, budget=3000)
    assert inside.low <= ((values > 0.004) & (values < 1.0)).mean() <= inside.high
    assert inside.half_width <= 0.03


def test_what_fits_in_the_budget_is_exact():
    values = values_of("student", 2, n=400)
    share = spectra.resolve(spectra.DiagonalOperator(values), budget=500)
    assert share.value == pytest.approx((values < 0).mean(), abs=1e-12)
    assert share.products == 400


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"share": "positive"}, "positive"),
        ({"share": "near_zero"}, "tol"),
        ({"share": "near_zero", "tol": 0.0}, "positive, got 0.0"),
        ({"share": "between", "between": (1.0, 1.0)}, "low < high"),
        ({"budget": 19}, "budget"),
        ({"half_width": 0.0}, "0.0"),
        ({"share": "between"}, "between"),
        ({"budget": 3}, "budget"),
        ({"half_width": 0.7}, "0.7"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, word):
    with pytest.raises(spectra.InputError, match=word) as caught:
        spectra.resolve(spectra.DiagonalOperator(np.arange(100.0)), **options)
    assert "\n" not in str(caught.value)


def test_an_eighth_of_the_budget_is_spent_before_the_first_estimate(monkeypatch):
    """Where memory cuts the search for outliers short, a bracket may be narrow after a few steps already."""
    monkeypatch.setattr(resolution, "SEARCH_BASIS_BYTES", 0)
    values = np.random.default_rng(0).uniform(-1, 1, size=20_000)
    estimate = spectra.resolve(spectra.DiagonalOperator(values), budget=1600)
    assert estimate.resolved
    assert 200 <= estimate.products < 220


@pytest.mark.parametrize(
    ("dimension", "half_width"), [(1, 0.02), (7, 0.05), (100, 0.05), (1000, 0.01), (10_000, 0.001)]
)
def test_as_many_probe_vectors_as_the_sampling_variance_asks_for(dimension, half_width):
    """A share of one half has the variance 2 * (1 / 4) / (n + 2) for one probe vector."""

    def sampling_half_width(probes):
        return 1.959964 * np.sqrt(2 * 0.25 / (dimension + 2) / probes)

    probes = probes_needed(dimension, half_width)
    assert probes > 1
    assert sampling_half_width(probes) <= half_width / 3 < sampling_half_width(probes - 1)


class Shaped(spectra.DenseOperator):
    """A matrix whose vectors are the parameters of these shapes, laid end to end."""

    def __init__(self, matrix, shapes):
        super().__init__(matrix)
        self.space = type("Space", (), {"shapes": shapes})


def shaped(kind, seed, *, rows=30, columns=24):
    """A matrix (720, 720) with Kronecker structure behind random signs, or with a spectrum of its own."""
    rng = np.random.default_rng(seed)
    n = rows * columns
    if kind != "kronecker":
        values = values_of(kind, seed, n=n, zeros=0.43 if seed % 2 else 0.0)
        return Shaped(matrix_with_spectrum(values, seed), ((rows, columns),)), values
    sides = [matrix_with_spectrum(np.geomspace(0.02, 1, side), seed) for side in (rows, columns)]
    root = torch.kron(*sides)
    matrix = root @ matrix_with_spectrum(np.sign(rng.random(n) - 0.3), seed) @ root
    matrix = (matrix + matrix.T) / 2
    return Shaped(matrix, ((rows, columns),)), torch.linalg.eigvalsh(matrix).numpy()


@pytest.mark.parametrize("kind", ["kronecker", "gauss", "laplace", "log-normal"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_after_a_change_of_variables_cover(kind, seed):
    op, values = shaped(kind, seed)
    share = spectra.resolve(op, budget=400, half_width=0.1, seed=seed)
    assert share.low <= (values < 0).mean() <= share.high
    assert share.products == op.products <= 400
    assert share.resolved or "400" in share.reason
    tol = float(np.quantile(np.abs(values), 0.5))
    near = spectra.resolve(op, share="near_zero", tol=tol, budget=500, half_width=0.1, seed=seed)
    assert near.low <= (np.abs(values) < tol).mean() <= near.high
    assert near.products <= 500
    above = spectra.resolve(op, share="between", between=(tol, np.inf), budget=400, half_width=0.1, seed=seed)
    assert above.low <= (values > tol).mean() <= above.high


def test_kronecker_structure_is_resolved_where_a_plain_recurrence_is_not():
    op, _ = shaped("kronecker", 0)
    share = spectra.resolve(op, budget=300, half_width=0.1)
    plain = spectra.resolve(spectra.DenseOperator(op.matrix), budget=300, half_width=0.1)
    assert share.resolved
    assert not plain.resolved
    again = spectra.resolve(op, budget=300, half_width=0.1, congruence=find_congruence(op))
    assert again.resolved
    assert again.products < share.products


@pytest.mark.parametrize("share", [{}, {"share": "between", "between": (0.0, 1e3)}, {"share": "near_zero", "tol": 0.2}])
def test_zero_coordinates_count_on_the_right_side_after_a_change_of_variables(share):
    op, _ = shaped("kronecker", 4)
    kept = torch.as_tensor(np.random.default_rng(0).random(720) < 0.57)
    op = Shaped(op.matrix * kept * kept[:, None], ((30, 24),))
    values = np.zeros(720)
    values[kept.numpy()] = torch.linalg.eigvalsh(op.matrix[kept][:, kept]).numpy()
    truth = {
        "between": (values > 0).mean(),
        "near_zero": (np.abs(values) < 0.2).mean(),
    }.get(share.get("share"), (values < 0).mean())
    found = spectra.resolve(op, budget=500, half_width=0.1, **share)
    assert found.low <= truth <= found.high
    assert found.resolved, found.reason


def test_a_reason_after_a_change_of_variables_names_the_zeros():
    op, _ = shaped("kronecker", 0)
    share = spectra.resolve(op, budget=130, half_width=0.02)
    assert not share.resolved
    assert "zero that are no coordinates" in share.reason
    assert share.products <= 130


@pytest.mark.parametrize("probes", [1, 2])
def test_a_probe_vector_alone_is_reorthogonalized_after_a_change_of_variables(probes):
    op, _ = shaped("kronecker", 0)
    found = recurrences_after_congruence(
        op,
        (-np.inf, 0.0),
        probes=lambda dimension, counts: probes,
        seed=0,
        start=None,
        remaining=lambda: 400 - op.products,
        on_product=lambda: None,
    )
    found.advance()
    results = found.parts[0].recurrence.tridiagonals()
    assert len(results) == probes
    if probes > 1:
        assert all(result.basis is None for result in results)
    else:
        gram = results[0].basis @ results[0].basis.T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-7, rtol=0)


def test_an_operator_that_is_zero_has_no_negative_eigenvalue():
    op = spectra.DiagonalOperator(np.zeros(3000))
    found = spectra.resolve(op, budget=100)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.resolved
    near = spectra.resolve(op, share="near_zero", tol=1e-3, budget=100)
    assert (near.value, near.low, near.high) == (1.0, 1.0, 1.0)


class Side:
    """Recurrences that place a mass of `rate` in each step."""

    def __init__(self, rate, budget, *, steps=0, growth=0.5):
        self.rate, self.budget, self.steps, self.growth = rate, budget, steps, growth

    @property
    def finished(self):
        return self.budget[0] < 1

    def advance(self):
        steps = min(max(50 - self.steps, int(self.growth * self.steps), 1), self.budget[0])
        self.steps += steps
        self.budget[0] -= steps
        return self.estimate()

    def estimate(self):
        return spectra.Estimate(0.5, 0.5 - self.half_width, 0.5 + self.half_width)

    @property
    def half_width(self):
        return 0.5 - self.rate * self.steps

    def advance_until(self, half_width):
        while self.half_width > half_width and not self.finished:
            self.advance()
        return self.estimate()


@pytest.mark.parametrize(("changed", "plain"), [(4e-4, 5e-5), (5e-5, 4e-4), (3e-4, 2.5e-4)])
def test_the_better_way_gets_most_of_the_budget(changed, plain):
    """Also where half of the eigenvalues stay unplaced whatever is spent, as of pretrained language models."""
    budget = [1000]
    sides = [Side(changed, budget, steps=40, growth=0.08), Side(plain, budget)]
    glance = Side(plain, budget)
    found = resolution._narrower(sides[0], lambda: glance, lambda: sides[1], lambda: budget[0], 0.05)
    worse, better = sorted(sides, key=lambda side: side.rate)
    assert budget[0] == 0
    assert found.half_width == min(side.half_width for side in sides)
    assert worse.steps <= (120 if better.rate > 2 * worse.rate else 0.8 * better.steps + 300)


@pytest.mark.parametrize(
    ("steps", "widths", "better"),
    [
        ((100, 100), (0.1, 0.2), 0),
        ((100, 76), (0.2, 0.1), 1),
        ((100, 74), (0.2, 0.1), None),  # too few steps to be compared
        ((49, 49), (0.1, 0.2), None),
        ((100, 100), (0.49, 0.41), 1),  # nine times as many placed
        ((100, 100), (0.49, 0.499), None),  # ten times as many, but few
    ],
)
def test_one_way_is_clearly_better_after_about_as_many_steps(steps, widths, better):
    sides = [
        SimpleNamespace(steps=count, estimate=lambda width=width: spectra.Estimate(0.5, 0.5 - width, 0.5 + width))
        for count, width in zip(steps, widths, strict=True)
    ]
    assert resolution._clearly_better(*sides) is (None if better is None else sides[better])


def test_the_search_for_outliers_stores_a_gibibyte_on_a_cpu(monkeypatch):
    monkeypatch.setattr(resolution, "max_vectors_in_memory", lambda op: 10**9)
    op = SimpleNamespace(device=torch.device("cpu"), vector_bytes=2**24)
    assert resolution._search_products(op, 1500) == 64
    op.vector_bytes = 2**30
    assert resolution._search_products(op, 1500) == resolution.SEARCH_STEPS[0]
    op.device = torch.device("cuda")
    assert resolution._search_products(op, 1500) == resolution.SEARCH_STEPS[1]
