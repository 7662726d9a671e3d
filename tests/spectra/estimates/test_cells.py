"""Every cell of a density holds the mass that is inside, for spectra that are known."""

import numpy as np
import pytest

import spectra
from spectra.estimates.cells import MOST_MASS, RESOLVED_RATIO, WIDEST, density_cells


def readme(rng):
    return np.concatenate([0.01 * rng.standard_t(2.5, 20_000) + 0.002, rng.uniform(1, 27, 40)])


def language_model(rng):
    """Sizes over seven decades, as in the Hessian of a language model."""
    return np.concatenate([rng.lognormal(-8, 3, 6000) * rng.choice([-1, 1], 6000, p=[0.4, 0.6]), [60.0, 90.0, -8.0]])


def many_zeros(rng):
    return np.concatenate([0.05 * rng.normal(size=3000), np.zeros(2000), rng.uniform(1, 9, 10)])


def edges_of(density, threshold, count=64):
    low, high = density.lambda_min().low, np.nextafter(density.lambda_max().high, np.inf)
    positions = np.linspace(np.arcsinh(low / threshold), np.arcsinh(high / threshold), count + 1)
    inner = threshold * np.sinh(positions[1:-1])
    edges = np.unique(np.concatenate([[low], inner, [0.0], [high]]))
    return edges, np.arcsinh(edges / threshold)


def inside(cells, values):
    """Whether the true mass of every cell lies in its interval."""
    truth = np.diff(np.searchsorted(np.sort(values), cells.edges)) / len(values)
    return bool(np.all((cells.low <= truth + 1e-12) & (truth <= cells.high + 1e-12)))


@pytest.mark.parametrize("spectrum", [readme, language_model, many_zeros])
@pytest.mark.parametrize(("probes", "steps", "deflate"), [(2, 20, 0), (4, 60, 0), (4, 60, 12)])
def test_the_true_mass_of_every_cell_lies_in_its_interval(spectrum, probes, steps, deflate):
    for seed in range(3):
        print(f"seed = {seed}")
        values = spectrum(np.random.default_rng(seed))
        density = spectra.slq(
            spectra.DiagonalOperator(values), probes=probes, steps=steps, deflate=deflate, seed=100 + seed
        )
        if spectrum is many_zeros:
            assert density.zero_share() == pytest.approx(2000 / len(values))
            values = values[values != 0]
        edges, positions = edges_of(density, 0.01)
        cells = density_cells(density, edges, positions=positions)
        others = density.dimension / len(values)
        scaled = cells.low * others, cells.high * others
        truth = np.diff(np.searchsorted(np.sort(values), cells.edges)) / len(values)
        assert np.all((scaled[0] <= truth + 1e-12) & (truth <= scaled[1] + 1e-12))
        assert (cells.edges[0], cells.edges[-1]) == (edges[0], edges[-1])
        assert set(cells.edges) <= set(edges)
        spans = np.diff(np.arcsinh(cells.edges / 0.01)) / (positions[-1] - positions[0])
        ratio = cells.high <= RESOLVED_RATIO * cells.low
        assert np.array_equal(cells.resolved, ratio & (spans <= WIDEST + 1e-9) & (cells.low <= MOST_MASS))


def test_more_lanczos_steps_resolve_more():
    values = readme(np.random.default_rng(0))
    operator = spectra.DiagonalOperator(values)
    part = []
    for probes, steps, deflate in ((2, 20, 0), (4, 100, 40)):
        density = spectra.slq(operator, probes=probes, steps=steps, deflate=deflate, seed=0)
        edges, positions = edges_of(density, 0.01)
        cells = density_cells(density, edges, positions=positions)
        assert inside(cells, values)
        part.append(cells.low[cells.resolved].sum())
    assert part[0] < 0.01  # 20 steps say next to nothing of the bulk
    assert part[1] > 0.6


def test_known_eigenvalues_give_the_histogram_itself():
    values = np.sort(np.random.default_rng(1).normal(size=500))
    edges = np.linspace(values[0], np.nextafter(values[-1], 9), 20)
    cells = density_cells(spectra.SpectralDensity.from_eigenvalues(values), edges)
    assert np.array_equal(cells.low, cells.high)
    assert cells.low.sum() == pytest.approx(1)
    assert inside(cells, values)
    low, high = cells.heights
    assert low == pytest.approx(np.histogram(values, cells.edges, density=True)[0])
    assert np.array_equal(low, high)


def test_the_cheapest_cells_are_those_of_a_search_through_all():
    from itertools import combinations, pairwise

    from spectra.estimates.cells import _cheapest

    cost = np.random.default_rng(2).uniform(size=(8, 8))
    starts, ends = _cheapest(cost)
    ways = [(0, *inner, 7) for count in range(7) for inner in combinations(range(1, 7), count)]
    totals = [sum(cost[a, b] for a, b in pairwise(way)) for way in ways]
    assert cost[starts, ends].sum() == pytest.approx(min(totals))
    assert (starts[0], ends[-1]) == (0, 7)
    assert np.array_equal(starts[1:], ends[:-1])


def test_nothing_but_zeros_leaves_empty_cells():
    cells = density_cells(spectra.SpectralDensity.from_eigenvalues(np.zeros(4)), np.array([-1.0, 0.0, 1.0]))
    assert cells.zero_share == 1
    assert cells.high.max() == 0
