"""A histogram of the eigenvalues whose cells are as narrow as what is known of the mass in them allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import CONFIDENCE
from spectra.estimates.sharp_band import sharp_band

RESOLVED_RATIO = 2.5  # of the upper to the lower bound of the mass in a cell, up to which the mass is known
MOST_MASS = 0.5  # of all eigenvalues in a cell: the shape inside a cell with more is not known
WIDEST = 1 / 6  # of the axis that a cell may take
# What a way to merge the cells costs, per cell and with the axis of length 1: see `_cost`.
WIDTH_COST, UNRESOLVED_COST, CELL_COST = 20.0, 2.0, 0.06


@dataclass(frozen=True, eq=False)
class DensityCells:
    """Bounds on the share of eigenvalues in each of neighbouring cells, which hold for all cells at once.

    Attributes:
        edges: (c + 1,) ascending, in the units of the eigenvalues. Cell i holds edges[i] <= lambda < edges[i + 1].
        low: (c,) lower bounds of the share of all eigenvalues in each cell, known zeros left out.
        high: (c,) upper bounds.
        resolved: (c,) whether the mean density of the cell is a density: its mass is known to a factor, and the cell
            is narrow.
        zero_share: The share of eigenvalues known to be zero, which no cell counts.
        level: The probability, at least, that all bounds hold.

    Example:
        >>> density = SpectralDensity.from_eigenvalues(np.array([-1.0, 0.0, 1.0, 1.0]))
        >>> cells = density_cells(density, np.array([-2.0, 0.0, 2.0]), widest=1.0)
        >>> cells.low.tolist(), cells.high.tolist(), cells.zero_share
        ([0.25, 0.5], [0.25, 0.5], 0.25)
    """

    edges: np.ndarray
    low: np.ndarray
    high: np.ndarray
    resolved: np.ndarray
    zero_share: float
    level: float

    @property
    def widths(self) -> np.ndarray:
        """(c,) the widths of the cells."""
        return np.diff(self.edges)

    @property
    def heights(self) -> tuple[np.ndarray, np.ndarray]:
        """The bounds on the mean density of each cell, (c,) each, in units of 1 / eigenvalue."""
        return self.low / self.widths, self.high / self.widths


def density_cells(
    density: SpectralDensity,
    edges: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    level: float = CONFIDENCE,
    widest: float = WIDEST,
) -> DensityCells:
    """Merge the cells between edges until the mass in each is known, where that is possible.

    The mass of [a, b) lies between low(b) - high(a) and high(b) - low(a) for the bounds of `sharp_band`,
    which hold for all thresholds at once. So the cells may be chosen after the bounds are known. Of all ways to merge
    neighbours, the one is taken that balances narrow cells against narrow bounds on their mass.

    Args:
        density: The density.
        edges: (e,) ascending edges of the narrowest cells, in the units of the eigenvalues.
        positions: (e,) where a figure's axis shows the edges; None where it is linear.
        level: The probability that all bounds hold.
        widest: The part of the axis that a resolved cell may take.

    Returns:
        The cells, from the first edge to the last.
    """
    zeros = density.zero_share()
    positions = edges if positions is None else positions
    if zeros < 1:
        below, up_to = sharp_band(density, level=level, thresholds=edges, zeros=False).at(edges)
    else:
        below = up_to = np.zeros(len(edges))
    # the bounds of the mass between edge i and edge j, in row i and column j
    low = (1 - zeros) * np.maximum(below[None, :] - up_to[:, None], 0)
    high = (1 - zeros) * np.maximum(up_to[None, :] - below[:, None], 0)
    spans = np.abs(positions[None, :] - positions[:, None]) / (positions[-1] - positions[0])
    resolved = (spans <= widest + 1e-9) & (high <= RESOLVED_RATIO * low) & (low <= MOST_MASS)
    starts, ends = _cheapest(_cost(low, high, spans, resolved | (high == 0), floor=0.5 / density.dimension))
    return DensityCells(
        edges[np.append(starts, len(edges) - 1)],
        low[starts, ends],
        high[starts, ends],
        resolved[starts, ends],
        zeros,
        level,
    )


def _cost(low: np.ndarray, high: np.ndarray, spans: np.ndarray, resolved: np.ndarray, *, floor: float) -> np.ndarray:
    """What each cell costs: for the part of the axis that it takes, its doubt, its width, and if it is not resolved.

    The doubt is log(high / low), with half an eigenvalue added to both.
    """
    doubt = np.log((high + floor) / (low + floor))
    return spans * (doubt + WIDTH_COST * spans + UNRESOLVED_COST * ~resolved) + CELL_COST


def _cheapest(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and last edges of the cells that cost least together, from the cost (e, e) of each possible cell.

    By dynamic programming: `best[j]` is the lowest cost of the cells left of edge j.
    """
    best, previous = np.zeros(len(cost)), np.zeros(len(cost), dtype=int)
    for end in range(1, len(cost)):
        totals = best[:end] + cost[:end, end]
        previous[end] = totals.argmin()
        best[end] = totals.min()
    ends = [len(cost) - 1]
    while previous[ends[-1]] > 0:
        ends.append(previous[ends[-1]])
    ends.reverse()
    return np.array([0, *ends[:-1]]), np.array(ends)
