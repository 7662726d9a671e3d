"""How much memory a microbatch's graph and a product through it take, measured on a few rows before it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spectra.backend.memory import AllocationMeter
from spectra.operators.hessian.objective import Objective, Piece


@dataclass(frozen=True)
class Footprint:
    """Memory as a linear function of the rows of a microbatch, each as (intercept, slope) in bytes.

    Attributes:
        graph_line: Memory of the graph of the gradient.
        product_line: Additional memory while a product runs.
    """

    graph_line: tuple[float, float]
    product_line: tuple[float, float]

    def graph(self, rows: int) -> int:
        """Bytes of the graph of a microbatch with so many rows."""
        return int(self.graph_line[0] + rows * self.graph_line[1])

    def product(self, rows: int) -> int:
        """Additional bytes while a product of a microbatch with so many rows runs."""
        return int(self.product_line[0] + rows * self.product_line[1])


def measure_footprint(
    objective: Objective, build: Callable[[Piece], object], multiply: Callable[[object], object]
) -> Footprint:
    """Build the graph of two and of three rows of the largest microbatch, and multiply through each once.

    Activations are linear in the rows, and so are both sizes. A batch that has no more than three rows, or cannot be
    cut, is measured whole.

    Args:
        objective: The loss whose pieces are measured.
        build: Computes the gradient of a piece, with its graph.
        multiply: Computes one product through what `build` returned.

    Returns:
        The bytes of a graph and of a product through it.
    """

    def held(piece: Piece) -> tuple[int, int]:
        """Bytes of the piece's graph, and additional bytes of a product."""
        with AllocationMeter() as meter:
            gradient = build(piece)
            graph = meter.peak = meter.live
            multiply(gradient)
        return graph, meter.peak - graph

    rows = max(objective.rows)
    if rows > 3:
        try:
            (graph, product), (more, product_more) = (held(objective.some_rows(count)) for count in (2, 3))
        except Exception:  # the model does not run on a part of this batch; it may raise any error
            pass
        else:
            slope, product_slope = max(more - graph, 0), max(product_more - product, 0)
            return Footprint((graph - 2 * slope, slope), (product - 2 * product_slope, product_slope))
    graph, product = held(objective.some_rows(rows))
    return Footprint((0, graph / rows), (0, product / rows))
