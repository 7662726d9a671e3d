"""How much memory a measurement will take, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from spectra.algorithms.basis_size import Basis, choose_basis, vectors_to_reserve
from spectra.algorithms.block_size import VECTORS_PER_PROBE, probe_block_size
from spectra.algorithms.inertia import count_basis_size
from spectra.algorithms.kronecker import KroneckerTransform, blocks_of
from spectra.algorithms.lanczos import choose_reorthogonalization
from spectra.algorithms.topk import default_basis_size
from spectra.backend.errors import InputError
from spectra.backend.float64 import is_fast_in_float64

if TYPE_CHECKING:
    from spectra.operators.hessian.operator import HessianOperator

PARTS = ("gathered", "graphs", "product", "recurrence", "deflation", "search", "count")  # that the plan lists
COUNT_VECTORS = 8  # of a count: the three of a recurrence, and those that the change of variables passes through
SEARCHED_FACTORS = 3  # sets of factors in float64 during the search: the best, the current and the next ones
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@runtime_checkable
class _Measurable(Protocol):
    """An operator whose graphs and products can be measured."""

    def footprint(self, recomputed: str | None = None) -> Any: ...

    def graph_layout(self, *, reserved: int | None = None) -> Any: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a measurement takes on the operator's device, apart from the model and its batches.

    For a sharded model they are those of this rank.

    Attributes:
        graphs: Bytes of the gradient and of its autograd graphs that are kept between products.
        product: Additional bytes while one product runs.
        recurrence: Bytes of the Lanczos vectors of the probe vectors that are advanced at once, with their bases where
            those are stored.
        deflation: Bytes of the deflated eigenvectors.
        search: Bytes of the Krylov basis in which those eigenvectors are searched for.
        kept: How many microbatches keep their graph; the others rebuild it in every product.
        pieces: How many microbatches there are.
        rows: How many rows the largest microbatch has.
        together: How many probe vectors are advanced at once.
        basis: How many Krylov basis vectors the search holds at once; fewer than usual where memory is short.
        host: Bytes of the search in host memory, where the device has too little memory for it.
        count: Bytes of the change of variables and of the recurrence after it, from which the negative share is read.
        recomputed: What every product computes again instead of keeping it: "", "attention and loss" or "layers".
        gathered: Bytes of the whole weights that this rank gathers from the others, where the model is sharded.
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
    basis: int = 0
    host: int = 0
    count: int = 0
    recomputed: str = ""
    gathered: int = 0

    @property
    def peak(self) -> int:
        """The largest number of bytes in use at once; search, recurrences and count come one after another."""
        return (
            self.gathered + self.graphs + self.product + max(self.search, self.deflation + self.recurrence, self.count)
        )

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in PARTS}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        graphs = "all graphs kept" if self.kept == self.pieces else f"{self.kept} of {self.pieces} graphs kept"
        graphs += f", {self.recomputed} computed again in every product" if self.recomputed else ""
        search = f", {self.basis} Krylov basis vectors" if self.basis else ""
        search += f" in {format_bytes(self.host)} of host memory" if self.host else ""
        return (
            f"{format_bytes(self.peak)} at most beside the model ({listed}); {graphs}, {self.rows} rows at a time, "
            f"{self.together} probe vectors together{search}"
        )


def plan(
    op: HessianOperator,
    *,
    probes: int = 10,
    steps: int = 100,
    deflate: int = 0,
    reorthogonalize: str = "auto",
    count_products: int = 0,
) -> MemoryPlan:
    """How much memory `slq(op, ...)` will take with these arguments.

    Graphs and products are measured on two and on three rows of the largest microbatch, because their size is linear in
    the number of rows. The plan is for the engine "reverse"; the batched engines take a multiple of `product`.

    Args:
        op: The Hessian operator.
        probes: How many probe vectors.
        steps: How many Lanczos steps.
        deflate: How many eigenvalues to deflate.
        reorthogonalize: "auto", "full" or "none", as in `spectra.slq`.
        count_products: The largest number of products for a count after a change of variables
            (`spectra.count_below`); 0 for none.

    Returns:
        The `MemoryPlan`; print it for one line of text.

    Raises:
        InputError: For another operator than a `HessianOperator`, whose products would have to be measured; for counts
            that `slq` does not take; or if there is no memory to search for that many eigenvalues.
    """
    if not isinstance(op, _Measurable):
        raise InputError(
            f"a HessianOperator is expected, whose graphs and products can be measured, got {type(op).__name__}: plan "
            "the HessianOperator it is made of; one that is not made of any takes what its own products take"
        )
    if probes < 1 or steps < 1 or deflate < 0:
        raise InputError(
            f"at least 1 probe and step and 0 or more deflated eigenvalues are expected, got probes={probes}, "
            f"steps={steps}, deflate={deflate}"
        )
    vector = op.vector_bytes
    basis_size = steps if choose_reorthogonalization(op, steps, reorthogonalize) == "full" else 0
    together = min(probe_block_size(op, basis_size, deflated=deflate > 0), probes)
    vectors = max(vectors_to_reserve(deflate), deflate + VECTORS_PER_PROBE + basis_size)
    layout = op.graph_layout(reserved=vectors)
    footprint, rows = op.footprint(layout.recomputed), layout.objective.rows
    graphs = sum(footprint.graph(count) for count in rows[: layout.kept])
    transient = footprint.product(max(rows)) + (footprint.graph(max(rows)) if layout.kept < len(rows) else 0)
    basis = choose_basis(op, deflate, default_basis_size(deflate)) if deflate else Basis(0, 0)
    search = basis.vectors * vector if deflate else 0
    return MemoryPlan(
        graphs=graphs + vector,
        product=transient + together * vector + op.exchanged_bytes(together),
        recurrence=together * (VECTORS_PER_PROBE - 1 + basis_size) * vector,
        deflation=deflate * vector,
        search=0 if basis.on_host else search,
        kept=layout.kept,
        pieces=len(rows),
        rows=max(rows),
        together=together,
        basis=basis.size,
        host=search if basis.on_host else 0,
        recomputed=layout.recomputed,
        count=_count_bytes(op, count_products) if count_products and op.shards is None else 0,
        gathered=op.gathered_bytes,
    )


def _count_bytes(op: HessianOperator, products: int) -> int:
    """Bytes of the factors of P, those in float64 of the search too, and of the recurrence of P^T A P.

    The vectors are in float64 where the device is fast in it: they are if rounding error asks for it.
    """
    factors = KroneckerTransform.identity(blocks_of(op.space.shapes), torch.device("meta"))
    entries = sum(factor.numel() for factor in (*factors.left, *factors.right))
    itemsize = 8 if is_fast_in_float64(op.device) else op.dtype.itemsize
    vectors = COUNT_VECTORS + count_basis_size(op, products)
    return entries * (SEARCHED_FACTORS * 8 + itemsize) + vectors * op.shape[0] * itemsize


def format_bytes(size: int) -> str:
    """Bytes in binary units with three digits, such as 3.1 GiB."""
    number, unit = float(size), 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {UNITS[unit]}"
