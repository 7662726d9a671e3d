"""The memory of a microbatch's graph and of a product through it, measured on a few rows before the whole is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spectra.backend.memory import AllocationMeter
from spectra.operators.hessian.objective import Objective, Piece


@dataclass(frozen=True)
class Footprint:
    """Bytes as straight lines in the rows of a microbatch, each as (intercept, slope).

    Attributes:
        graph_line: of the graph of the gradient.
        product_line: of what a product holds on top while it runs.
    """

    graph_line: tuple[float, float]
    product_line: tuple[float, float]

    def graph(self, rows: int) -> int:
        """Bytes of a graph of so many rows."""
        return int(self.graph_line[0] + rows * self.graph_line[1])

    def product(self, rows: int) -> int:
        """Bytes on top while a product runs."""
        return int(self.product_line[0] + rows * self.product_line[1])


def measure_footprint(
    objective: Objective, build: Callable[[Piece], object], multiply: Callable[[object], object]
) -> Footprint:
    """Build the graph of two and of three rows of the largest microbatch, and multiply through each once.

    Activations, and so both sizes, are linear in the rows. A batch that has no more rows, or cannot be cut, is measured
    as it is.

    Args:
        objective: the loss whose pieces are measured.
        build: piece -> the gradient with its graph.
        multiply: gradient with its graph -> one product through it.

    Returns:
        The bytes of a graph and of a product through it.
    """

    def held(piece: Piece) -> tuple[int, int]:
        with AllocationMeter() as meter:
            gradient = build(piece)
            graph = meter.peak = meter.live
            multiply(gradient)
        return graph, meter.peak - graph

    rows = max(objective.rows)
    if rows > 3:
        try:
            (graph, product), (more, product_more) = (held(objective.some_rows(count)) for count in (2, 3))
        except Exception:  # rows of this batch do not stand alone, whatever error the model raises for that
            pass
        else:
            step, product_step = max(more - graph, 0), max(product_more - product, 0)
            return Footprint((graph - 2 * step, step), (product - 2 * product_step, product_step))
    graph, product = held(objective.some_rows(rows))
    return Footprint((0, graph / rows), (0, product / rows))
