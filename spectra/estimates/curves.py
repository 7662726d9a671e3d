"""Curves to draw: the smoothed spectral density and the cumulative share, from quadrature rules."""

from __future__ import annotations

import numpy as np


def kernel_widths(nodes: np.ndarray) -> np.ndarray:
    """Return the default kernel width of each node, half the distance between its neighbours.

    Args:
        nodes: (probes, m) ascending nodes of each rule.

    Returns:
        (probes, m) standard deviations, at least 1e-6 of the largest |node|.
    """
    radius = float(np.abs(nodes).max())
    floor = 1e-6 * radius if radius > 0 else 1e-12
    if nodes.shape[1] < 2:
        return np.full_like(nodes, floor)
    return np.maximum(np.gradient(nodes, axis=1), floor)


def smoothed_density(nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Smooth each node by a Gaussian kernel, and average over rules and over the cell of each grid point.

    The cell of a grid point reaches halfway to its neighbours. The density times the cell is the mass in the cell. So
    the trapezoid rule over a grid that covers the spectrum gives 1 for any grid spacing.

    Args:
        nodes: (probes, m) nodes of each rule.
        weights: (probes, m) their weights; a weight of 0 marks an unused node.
        widths: (probes, m) standard deviations of the kernels.
        grid: (g,) increasing points.

    Returns:
        (g,) the density, in units of 1 / eigenvalue.
    """
    from scipy.special import ndtr  # half a second to load, needed for curves only

    edges = np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
    mass = np.zeros(len(grid))
    for row_nodes, row_weights, row_widths in zip(nodes, weights, widths, strict=True):
        used = row_weights > 0
        in_cells = np.diff(ndtr((edges[:, None] - row_nodes[used]) / row_widths[used]), axis=0)
        mass += in_cells @ row_weights[used]
    return mass / len(nodes) / np.diff(edges)


def cumulative_share(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return a rule's weight below each grid point, interpolated monotonically (PCHIP) between nodes.

    Half of a node's weight counts at the node. The curve is for drawing; shares with intervals come from
    `spectra.estimates.shares`.

    Args:
        nodes: (m,) ascending nodes.
        weights: (m,) their weights.
        grid: (g,) where to evaluate.

    Returns:
        (g,) shares in [0, 1].
    """
    from scipy.interpolate import PchipInterpolator  # half a second to load, needed for curves only

    nodes, weights = _merge_equal_nodes(nodes, weights)
    middle = np.cumsum(weights) - weights / 2
    if len(nodes) == 1:
        return np.where(grid < nodes[0], 0.0, np.where(grid > nodes[0], 1.0, 0.5))
    curve = PchipInterpolator(nodes, middle, extrapolate=False)(grid)
    curve = np.where(grid < nodes[0], 0.0, np.where(grid > nodes[-1], 1.0, curve))
    return np.clip(curve, 0.0, 1.0)


def _merge_equal_nodes(nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge nodes that differ by rounding error only, such as ghost copies of a converged outlier."""
    tolerance = 1e-12 * max(float(np.abs(nodes).max()), 1e-300)
    starts = np.concatenate([[True], np.diff(nodes) > tolerance])
    return nodes[starts], np.bincount(np.cumsum(starts) - 1, weights=weights)
