"""What the graph of a microbatch takes in memory, and a product through it, before the whole of it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spectra.backend.memory import AllocationMeter

if TYPE_CHECKING:
    from spectra.operators.hessian.objective import Piece
    from spectra.operators.hessian.operator import HessianOperator


@dataclass(frozen=True)
class Footprint:
    """Bytes of a microbatch's graph, and on top while a product goes through it, as straight lines in its rows, each
    (at no rows, for a row more)."""

    graph_line: tuple[float, float]
    product_line: tuple[float, float]

    def graph(self, rows: int) -> int:
        """Of a graph of so many rows."""
        return int(self.graph_line[0] + rows * self.graph_line[1])

    def product(self, rows: int) -> int:
        """On top, while a product runs."""
        return int(self.product_line[0] + rows * self.product_line[1])


def measure_footprint(op: HessianOperator) -> Footprint:
    """Build the graph of two and of three rows of the largest microbatch and multiply through each once.

    Activations, and so both sizes, are linear in the rows. A batch that has no more rows, or cannot be cut, is measured
    as it is.
    """
    rows = max(op.objective.rows)
    if rows > 3:
        try:
            (graph, product), (more, product_more) = (_held(op, op.objective.some_rows(count)) for count in (2, 3))
        except Exception:  # rows of this batch do not stand alone, whatever the model makes of that
            pass
        else:
            step, product_step = max(more - graph, 0), max(product_more - product, 0)
            return Footprint((graph - 2 * step, step), (product - 2 * product_step, product_step))
    graph, product = _held(op, op.objective.some_rows(rows))
    return Footprint((0, graph / rows), (0, product / rows))


def _held(op: HessianOperator, piece: Piece) -> tuple[int, int]:
    """Bytes of the piece's graph, and the most that a product holds on top."""
    vector = torch.zeros(1, op.shape[0], dtype=op.dtype, device=op.device)
    with AllocationMeter() as meter:
        _, gradient = op.build(piece)
        held = meter.peak = meter.live
        op.through(gradient, vector, keep=True)
    return held, meter.peak - held
