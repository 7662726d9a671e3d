"""The gradient of a sharded model, and products, with the whole weights and vectors of one unit at a time.

No rank ever holds a whole vector, or more weights than those of the unit that computes. Each rank computes with its own
batches; what it needs of a unit it asks for (`spectra.operators.hessian.unit_exchange`), and gradients are summed over
the ranks unit by unit. A product gathers the weights twice and the vector once, and sums twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import torch

from spectra.backend import memory, ranks
from spectra.backend.errors import InputError, NonFiniteError
from spectra.operators.hessian.gathered_units import UnitsHeldFixed
from spectra.operators.hessian.graphs import GATHER_LAYERS, GRAPHS_SHARE, GraphStore
from spectra.operators.hessian.layered_graphs import LayeredGraphStore
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.operators.hessian.sharded_graphs import ShardedGraphStore
from spectra.operators.hessian.sharded_weights import hooks_removed, reshard

T = TypeVar("T")
WHOLE_VECTORS = 4  # weights, gradient, vector and product, which a rank holds whole if weights stay gathered


def choose_store(
    kind: type[GraphStore], policy: str, space: ParameterSpace, itemsize: int, *, training: bool
) -> type[GraphStore]:
    """Which graphs a rank of a sharded model builds: with all weights gathered, or with those of one unit at a time.

    All ranks call this together.

    Args:
        kind: The graphs that the operator asks for.
        policy: See `graph` of `HessianOperator`.
        space: The chosen parameters.
        itemsize: Bytes of a number.
        training: Whether the model is measured in training mode, in which layers cannot be computed again.

    Returns:
        The class of the graphs of this rank.

    Raises:
        InputError: If an operator that needs all weights is to gather them by layers.
    """
    if policy == GATHER_LAYERS:
        if kind is not GraphStore:
            raise InputError("graph='gather layers' is for the Hessian alone: choose graph='auto' for this operator")
        return LayeredGraphStore
    if policy != "auto" or kind is not GraphStore or training:
        return kind
    device = space.parameters[0].device
    free = ranks.all_reduce_min(memory.available(device), device)
    return kind if WHOLE_VECTORS * space.dimension * itemsize <= GRAPHS_SHARE * free else LayeredGraphStore


class ShardedLayersStore(ShardedGraphStore):
    """A `ShardedGraphStore` without whole vectors, and with the whole weights of one unit at a time.

    Args:
        local: The graphs of this rank.
    """

    _local: LayeredGraphStore

    def _alone(self, run: Callable[[], T], **options: Any) -> tuple[T, torch.Tensor]:
        """What each rank finds with its own batches, and this rank's part of the sum; see `UnitExchange.run`."""
        options.setdefault("dtype", self.dtype)
        with hooks_removed(self.model):
            return self._local.exchange.run(run, **options)

    def _on_this_rank(self, check: Callable[[GraphStore], T]) -> T:
        return self._alone(lambda: check(self._local))[0]

    def in_which_weights_move(self, check: Callable[[GraphStore], T]) -> T:
        """See `GraphStore.in_which_weights_move`; here the weights of all ranks move together."""
        return check(self)

    def in_float64(self, notes: list[str]) -> ShardedLayersStore:
        """See `GraphStore.in_float64`."""
        local = self._local.in_float64(notes)
        assert isinstance(local, LayeredGraphStore)
        return ShardedLayersStore(local)

    # -- what is known at the current weights

    def prepare(self, *, thorough: bool = False) -> bool:
        """See `GraphStore.prepare`."""
        reshard(self.model)
        if self.shards.any(self.weights_changed(thorough=thorough), self.device):
            self._gradient = None
            self.space = self._local.space = self.space.renewed(self.model)
            self._local.exchange.renew(self.model, self.space)
            self._local.forget()
        if self._gradient is not None:
            return False
        self.run_within_memory(self._compute_together, self._reduce_together, vectors=1)
        return True

    def _compute_together(self) -> None:
        _, gradient = self._alone(self._local.compute)
        used = set().union(*ranks.all_gather([n for n, p in self._by_name() if id(p) in self._local.exchange.used]))
        if not used:
            raise InputError(
                f"the loss does not use any of the {len(self.space.names)} chosen parameters, such as "
                f"'{self.space.names[0]}': choose parameters that the forward pass uses with params=..."
            )
        self.unused = self._local.unused = tuple(name for name in self.space.names if name not in used)
        self._local.note_unused()
        self._loss = self._total(self._local.loss_found())
        self._check_finite(gradient, "the gradient")
        self._gradient = gradient

    def _by_name(self) -> Iterator[tuple[str, Any]]:
        return zip(self.space.names, self.space.parameters, strict=True)

    def _check_finite(self, part: torch.Tensor, what: str) -> None:
        """Raise the NonFiniteError that names the parameter where a rank's part of a vector is not finite."""

        def check() -> None:
            bad = ~torch.isfinite(part)
            if bad.any():
                name = self.space.name_at(self.shards.start + int(bad.nonzero()[0]))
                raise NonFiniteError(
                    f"{what} is not finite in parameter '{name}'; check the batches and the model's weights, or "
                    "measure in float64 with precision='float64'"
                )

        ranks.together(check, self.device)

    def _reduce_together(self) -> str:
        """Use less memory from here on, on every rank."""
        self._gradient = None
        self._local.forget()
        changes = ranks.all_gather(self._on_this_rank(lambda local: local.reduce_memory()))
        return next(filter(None, changes), "")

    def forget(self) -> None:
        """Drop what was computed, and its memory."""
        self._gradient = None
        self._local.forget()

    def products_over_ranks(
        self, multiply: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor
    ) -> torch.Tensor:
        """The products of the rows of `vectors`, this rank's parts (k, entries), one after another."""
        products = torch.empty_like(vectors)
        for vector, target in zip(vectors, products, strict=True):

            def run(vector: torch.Tensor = vector) -> torch.Tensor:
                self.prepare()
                return self._alone(lambda: multiply(torch.zeros(1, 1)), vector=vector)[1]

            target.copy_(self.run_within_memory(run, self._reduce_together, vectors=1))
        return products

    # -- at other weights

    def gradient_at(
        self, objective: Objective, *, dtype: torch.dtype | None = None, offset: torch.Tensor | None = None
    ) -> tuple[float, torch.Tensor]:
        """See `GraphStore.gradient_at`; offset and gradient are this rank's parts."""
        self.prepare()
        loss, gradient = self._alone(
            lambda: self._local.loss_and_gradient(objective, dtype=dtype), offset=offset, dtype=dtype or self.dtype
        )
        return self._total(loss), gradient

    def differentiated_at(self, *, dtype: torch.dtype, offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        """See `GraphStore.differentiated_at`; both vectors are this rank's parts."""
        return self.gradient_at(self.objective, dtype=dtype, offset=offset)

    def loss_at(
        self,
        *,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        objective: Objective | None = None,
    ) -> float:
        """See `GraphStore.loss_at`; the offset is this rank's part."""
        self.prepare()
        loss, _ = self._alone(lambda: self._local.loss_at(dtype=dtype, objective=objective), offset=offset)
        return self._total(loss)

    def product_at(self, vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `GraphStore.product_at`; vector and product are this rank's parts."""
        self.prepare()
        return self._alone(lambda: self._local.product_of_fresh_graphs(dtype), vector=vector.to(dtype), dtype=dtype)[1]

    def higher_precision_product(self, vector: torch.Tensor) -> torch.Tensor:
        """See `GraphStore.higher_precision_product`; vector and product are this rank's parts."""
        self.prepare()
        with self.in_full_precision():
            return self._alone(self._local.product_of_fresh_graphs, vector=vector)[1]

    def linearized(self, recorder: Callable[[], Any], dtype: torch.dtype) -> AbstractContextManager[None]:
        """See `GraphStore.linearized`."""

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            held = self._local.held = UnitsHeldFixed(recorder)
            try:
                self.loss_at(dtype=dtype)
                held.is_recorded = True
                yield
            finally:
                self._local.held = None

        return context()

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """See `GraphStore.raise_non_finite`; the rows are this rank's parts."""
        for vector in vectors:
            self._check_finite(self.product_at(vector, self.dtype), "the Hessian product")
        raise NonFiniteError("a Hessian product is not finite; measure with precision='float64'")

    # -- memory

    @property
    def gathered_bytes(self) -> int:
        """Bytes of whole weights that stay gathered: none."""
        return 0

    def exchanged_bytes(self, vectors: int) -> int:
        """Bytes of whole vectors: none. Those of a unit are part of a product."""
        return 0
