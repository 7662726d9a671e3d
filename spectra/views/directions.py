"""Eigenvectors: the loss along them, and the layers that they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectra.algorithms.topk import Eigenpairs
from spectra.backend.errors import InputError
from spectra.backend.vectors import dot, norm
from spectra.operators.hessian.operator import HessianOperator
from spectra.views.style import (
    AXIS_COLOUR,
    HATCHES,
    MARKERS,
    NARROW,
    PALETTE,
    TEXT_COLOUR,
    add_legend,
    inches,
    literal,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PART_OF_LOSS = 0.1  # of the loss, which the quadratic term of the steepest direction changes at the end of the range
PART_OF_WEIGHTS = 0.1  # of the norm of the weights: no direction is followed further by default
MOST_LAYERS = 40  # bars; more layers than that, or than fit, are merged by their outermost names
ROW = 8.5  # points; the height of a bar with its name
LONGEST_NAME = 26  # characters of a layer's name beside narrow axes


@dataclass(frozen=True)
class Direction:
    """A unit vector in the space of the parameters.

    Attributes:
        vector: (n,) the unit vector.
        curvature: v . H v, in loss per parameter squared.
        label: What a legend calls it.
    """

    vector: torch.Tensor
    curvature: float
    label: str


@dataclass(frozen=True, eq=False)
class LossAlong:
    """The loss along a direction.

    Attributes:
        distances: (p,) signed distances from the current weights, in units of the parameters.
        losses: (p,) the loss there.
        quadratic: (p,) what the gradient and the curvature at the current weights predict.
    """

    distances: np.ndarray
    losses: np.ndarray
    quadratic: np.ndarray


def directions_of(op: HessianOperator, vectors: Any) -> list[Direction]:
    """Unit vectors with their curvatures.

    Args:
        op: The Hessian.
        vectors: `Eigenpairs`, of which the smallest and the largest pair are taken, a vector (n,), or vectors in the
            columns of (n, k), whose curvatures take a product each.

    Returns:
        At least one direction.

    Raises:
        InputError: If the vectors do not fit the operator, or one is zero.
    """
    if isinstance(vectors, Eigenpairs):
        ends = dict.fromkeys((0, len(vectors.values) - 1))
        names = {0: "most negative", len(vectors.values) - 1: "largest"}
        if vectors.values[0] >= 0:
            names[0] = "smallest found"
        return [_direction(op, vectors.vectors[:, i], float(vectors.values[i]), f"{names[i]} eigenvalue") for i in ends]
    given = torch.as_tensor(vectors)
    columns = given[:, None] if given.ndim == 1 else given
    if columns.ndim != 2 or columns.shape[0] != op.shape[0] or not columns.shape[1]:
        raise InputError(
            f"eigenpairs, a vector ({op.shape[0]},) or columns ({op.shape[0]}, k) are expected, "
            f"got {tuple(given.shape)}"
        )
    return [_direction(op, column, None, f"direction {i + 1}") for i, column in enumerate(columns.T)]


def _direction(op: HessianOperator, vector: torch.Tensor, curvature: float | None, name: str) -> Direction:
    """A direction from a vector of any length, whose curvature is measured if it is not known."""
    vector = vector.detach().to(device=op.device, dtype=op.dtype)
    length = norm(vector)
    if not 0 < length < float("inf"):
        raise InputError(f"a vector other than zero with finite entries is expected, {name} has norm {length:g}")
    unit = vector / length
    curvature = dot(unit, op @ unit) if curvature is None else curvature
    return Direction(unit, curvature, f"{name}: {curvature:.3g}")


def loss_along(op: HessianOperator, direction: Direction, distances: np.ndarray) -> LossAlong:
    """Evaluate the loss at theta + s v, and its quadratic model L + s g . v + s^2 v . H v / 2.

    Args:
        op: The Hessian. The model's weights are not touched: stand-ins take their place in the forward passes.
        direction: v.
        distances: (p,) values of s.

    Returns:
        The losses, on all batches of the operator.
    """
    slope, start = dot(op.gradient(), direction.vector), op.loss()
    losses = np.array([op.loss_at(float(s) * direction.vector) for s in distances])
    return LossAlong(distances, losses, start + slope * distances + direction.curvature * distances**2 / 2)


def default_radius(op: HessianOperator, directions: Sequence[Direction]) -> float:
    """How far the directions are followed: until the steepest one's quadratic term is a tenth of the loss.

    At most a tenth of the norm of the weights.
    """
    steepest = max(abs(direction.curvature) for direction in directions)
    limit = PART_OF_WEIGHTS * float(torch.stack([p.detach().double().norm() for p in op.space.parameters]).norm())
    limit = limit or 1.0
    return min(float(np.sqrt(2 * PART_OF_LOSS * abs(op.loss()) / steepest)), limit) if steepest > 0 else limit


def draw_loss_along(ax: Axes, found: Sequence[tuple[Direction, LossAlong]], *, legend: str) -> None:
    """Draw losses as markers with a line, and the quadratic models dashed.

    Args:
        ax: The axes.
        found: The directions with their losses.
        legend: Where the legend is; see `spectra.plots.loss_along`.
    """
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for position, (direction, loss) in enumerate(found):
        colour, marker = PALETTE[position % len(PALETTE)], MARKERS[position % len(MARKERS)]
        looks = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.5}
        handles += ax.plot(loss.distances, loss.losses, label=direction.label, **looks)
        ax.plot(loss.distances, loss.quadratic, color=colour, linestyle="dashed", linewidth=1.1)
    handles.append(Line2D([], [], color=TEXT_COLOUR, linestyle="dashed", linewidth=1.1, label="quadratic model"))
    losses = np.concatenate([loss.losses for _, loss in found])
    losses = losses[np.isfinite(losses)]
    if len(losses) and losses.max() > losses.min():
        margin = 0.08 * (losses.max() - losses.min())
        ax.set_ylim(losses.min() - margin, losses.max() + margin)
    ax.set_xlabel("distance along the unit vector")
    ax.set_ylabel("loss on the measured batches")
    tidy(ax)
    ax.axvline(0, color=AXIS_COLOUR, linewidth=0.8, zorder=0.5)
    add_legend(ax, handles, [str(handle.get_label()) for handle in handles], legend)


# Which layers an eigenvector moves.


def weights_by_layer(
    op: HessianOperator, directions: Sequence[Direction], *, most: int = MOST_LAYERS
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The part of each unit vector's squared norm that lies in each layer.

    Args:
        op: The Hessian.
        directions: The unit vectors.
        most: How many layers are told apart; more are merged by their outer names.

    Returns:
        The layers in the order of the model, (l,); the parts (l, k), whose columns sum to 1; and the part of the
        parameters that each layer has, (l,).
    """
    owners = _layers(op.space.names, most)
    names = list(dict.fromkeys(owners))
    parts, sizes = np.zeros((len(names), len(directions))), np.zeros(len(names))
    for column, direction in enumerate(directions):
        for owner, piece in zip(owners, op.space.unflatten(direction.vector), strict=True):
            parts[names.index(owner), column] += float(piece.double().square().sum())
    for owner, size in zip(owners, op.space.sizes, strict=True):
        sizes[names.index(owner)] += size
    return names, parts / parts.sum(axis=0), sizes / sizes.sum()


def _layers(names: Sequence[str], most: int = MOST_LAYERS) -> list[str]:
    """The layer that each parameter belongs to: its module, or a module around it where these are too many."""
    owners = [name.rpartition(".")[0] or name for name in names]
    while len(set(owners)) > most:
        longest = max(owner.count(".") for owner in owners)
        if longest == 0:
            break
        owners = [owner.rpartition(".")[0] if owner.count(".") == longest else owner for owner in owners]
    return owners


def most_layers(ax: Axes) -> int:
    """How many layers have room for their names beside axes."""
    return min(max(int(72 * inches(ax)[1] / ROW), 4), MOST_LAYERS)


def _shortened(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def draw_weights(
    ax: Axes, names: Sequence[str], parts: np.ndarray, sizes: np.ndarray, labels: Sequence[str], *, legend: str
) -> None:
    """Draw a bar for each layer and direction, and a line where a layer's part of the parameters is.

    Args:
        ax: The axes.
        names: (l,) the layers, the first at the top.
        parts: (l, k) parts of the squared norms.
        sizes: (l,) parts of the parameters.
        labels: (k,) what a legend calls the directions.
        legend: Where the legend is; see `spectra.plots.weight_by_layer`.
    """
    places, height = np.arange(len(names)), 0.8 / parts.shape[1]
    handles: list[Any] = []
    for column, label in enumerate(labels):
        looks = {"color": PALETTE[column % len(PALETTE)], "hatch": HATCHES[column % len(HATCHES)], "alpha": 0.75}
        offset = (column - (parts.shape[1] - 1) / 2) * height
        handles.append(ax.barh(places + offset, parts[:, column], height, label=label, edgecolor="white", **looks))
    (mark,) = ax.plot(sizes, places, "|", color=TEXT_COLOUR, markersize=11, markeredgewidth=1.4)
    narrow = inches(ax)[0] < NARROW
    ax.set_yticks(places, [literal(_shortened(name) if narrow else name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, min(1.0, 1.08 * max(float(parts.max()), float(sizes.max()))))
    ax.set_xlabel("part of the squared norm")
    tidy(ax)
    ax.grid(False, axis="y")
    if len(names) * ROW * 1.5 > 72 * inches(ax)[1]:
        ax.tick_params(axis="y", labelsize=6.5)
    add_legend(ax, [*handles, mark], [*labels, "part of the parameters"], legend)
