"""What a measurement will hold in memory, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.algorithms.block_size import VECTORS_A_PROBE, probes_together
from spectra.algorithms.lanczos import choose_policy
from spectra.algorithms.topk import default_basis

if TYPE_CHECKING:
    from spectra.operators.hessian.operator import HessianOperator

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the operator's device beside the model and its batches.

    graphs: the kept graphs of the gradient, and the gradient. product: what one product holds on top while it runs.
    recurrence: the vectors of the probes that advance together, with their basis where they reorthogonalise.
    deflation: the vectors taken out. search: the basis in which those are looked for. kept of pieces: microbatches
    whose graph is kept, of how many; the others are rebuilt at each product. rows: of the largest microbatch.
    together: probes that advance side by side.
    """

    graphs: int
    product: int
    recurrence: int
    deflation: int
    search: int
    kept: int
    pieces: int
    rows: int
    together: int

    @property
    def peak(self) -> int:
        """The most that is held at once: the search for outliers comes before the recurrences."""
        return self.graphs + self.product + max(self.search, self.deflation + self.recurrence)

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("graphs", "product", "recurrence", "deflation", "search")}
        listed = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)
        graphs = "all graphs kept" if self.kept == self.pieces else f"{self.kept} of {self.pieces} graphs kept"
        return (
            f"{in_words(self.peak)} at most beside the model ({listed}); {graphs}, {self.rows} rows at a time, "
            f"{self.together} probes together"
        )


def plan(
    op: HessianOperator, *, probes: int = 10, steps: int = 100, deflate: int = 0, reorthogonalize: str = "auto"
) -> MemoryPlan:
    """What `slq(op, ...)` will hold at once, by the engine "reverse"; the batched ones hold a multiple of `product`.

    Graphs and products are measured on two and three rows of the largest microbatch: their size is linear in the rows.
    """
    vector = op.vector_bytes
    kept_vectors = steps if choose_policy(op, steps, reorthogonalize) == "full" else 0
    together = min(probes_together(op, kept_vectors, deflated=deflate > 0), probes)
    footprint, pieces = op.footprint(), op.objective.pieces
    fit = op.pieces_that_fit()
    graphs = sum(footprint.graph(rows) for rows in op.objective.rows[:fit])
    largest = max(op.objective.rows)
    transient = footprint.product(largest) + (footprint.graph(largest) if fit < len(pieces) else 0)
    return MemoryPlan(
        graphs=graphs + vector,
        product=transient + together * vector,
        recurrence=together * (VECTORS_A_PROBE - 1 + kept_vectors) * vector,
        deflation=deflate * vector,
        search=(default_basis(deflate) + 1 + deflate + 2) * vector if deflate else 0,
        kept=min(fit, len(pieces)),
        pieces=len(pieces),
        rows=largest,
        together=together,
    )


def in_words(size: int) -> str:
    """Bytes in a unit that reads well: 3.1 GiB."""
    number, unit = float(size), 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {UNITS[unit]}"
