"""Graphs of a model whose parameters and vectors are sharded over the ranks of torch.distributed.

With L_r the part of the loss on the batches of rank r, L = sum_r L_r and H v = sum_r H_r v. Each rank gathers the
weights once, and builds the graphs of its own part. For a product the parts of v are gathered (all-gather), every rank
multiplies with H_r, and the products are summed and cut again (reduce-scatter). This is the product that autograd
computes through a differentiable all-gather of the weights, whose backward is a reduce-scatter and whose second
backward is an all-gather. But nothing is exchanged inside of autograd. So graphs may differ from rank to rank, an error
on one rank ends all, and engines and memory are chosen by each rank for itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import torch

from spectra.backend import ranks
from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.shards import Shards
from spectra.operators.hessian import pieces
from spectra.operators.hessian.batches import contents_of
from spectra.operators.hessian.footprint import Footprint
from spectra.operators.hessian.graphs import GraphLayout, GraphStore
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.sharded_weights import WholeWeights, reshard

T = TypeVar("T")
TOGETHER_BYTES = 1 << 26  # of the whole vectors that are gathered and multiplied at once


def part_of_this_rank(objective: Objective, spread: str) -> Objective:
    """The part L_r of the loss over the batches of all ranks, from the loss over the batches that this rank was given.

    If every rank was given the same batches, each takes some of them. Else the batches of all ranks together are
    measured, and each weighs by what it counts, as if one process had been given all of them.

    Args:
        objective: The loss over the batches of this rank.
        spread: "batches" if all ranks are expected to have the same.

    Returns:
        The part.

    Raises:
        InputError: If the batches differ, but were said to be the same.
    """
    mine = objective.counted, _digest(objective.batches)
    counted, digests = zip(*ranks.all_gather(mine), strict=True)
    if len(set(digests)) == 1 and (spread == "batches" or len(objective.pieces) >= len(counted)):
        return objective.of_this_rank()
    if len(set(digests)) == 1:
        return objective.scaled(1 / len(counted))
    if spread == "batches":
        raise InputError(
            "spread='batches' divides the same batches among the ranks, but the ranks were given different ones: leave "
            "it out, and the batches of all ranks together are measured"
        )
    part = objective if objective.adds_up else objective.scaled(objective.counted / sum(counted))
    part.has_others = True
    return part


def _digest(batches: list[Any]) -> str:
    """What is the same if batches are."""
    digest = hashlib.sha256()
    for content in contents_of(batches):
        if isinstance(content, torch.Tensor):
            dense = content.detach() if content.layout == torch.strided else content.detach().to_dense()
            digest.update(repr((tuple(dense.shape), dense.dtype)).encode())
            content = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(content)
    return digest.hexdigest()


class ShardedGraphStore(GraphStore):
    """The gradient of an objective over all ranks; this rank holds a part of every vector, and the graphs of its part.

    Args:
        local: The graphs of this rank's part of the objective, in whole parameters. They are built by this store.
    """

    def __init__(self, local: GraphStore):
        self._local = local
        self._weights = WholeWeights(local.model)
        self._loss = math.nan
        self._gradient: torch.Tensor | None = None  # this rank's part; None before `prepare`
        super().__init__(
            local.model,
            local.space,
            local.objective,
            dtype=local.dtype,
            copy=local.copy,
            precision=local.precision,
            training=local.training,
            context=local.context,
            policy=local.policy,
            over_ranks=False,
            notes=local.notes,
        )
        self.shards: Shards = Shards.of_this_rank(self.space.dimension)  # type: ignore[assignment]

    @property
    def local(self) -> GraphStore:
        """The graphs of this rank's part of the objective."""
        return self._local

    def in_float64(self, notes: list[str]) -> ShardedGraphStore:
        """See `GraphStore.in_float64`."""
        local = self._local.in_float64(notes)
        local.space = self.space
        return ShardedGraphStore(local)

    # -- what belongs to the graphs of this rank

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """This rank's part of the objective."""
        return self._local.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._local.objective = objective

    @property
    def precision(self) -> str | None:  # type: ignore[override]
        """The precision of the measurement, see `GraphStore`."""
        return self._local.precision

    @precision.setter
    def precision(self, precision: str | None) -> None:
        self._local.precision = precision

    @property
    def each_forward(self) -> Callable[[], AbstractContextManager[Any]]:  # type: ignore[override]
        """A further context around every forward pass, see `GraphStore`."""
        return self._local.each_forward

    @each_forward.setter
    def each_forward(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._local.each_forward = context

    # -- over the ranks

    def on_this_rank(self, check: Callable[[GraphStore], T]) -> T:
        """Call a check with the graphs of this rank. If it fails on one rank, every rank raises the error."""
        self.prepare()
        return self._on_this_rank(check)

    def _on_this_rank(self, check: Callable[[GraphStore], T]) -> T:
        """`on_this_rank` at the weights that were gathered last."""

        def run() -> T:
            with self._weights.installed():
                return check(self._local)

        return ranks.together(run, self.device)

    def is_piecewise_linear(self) -> bool:
        """See `GraphStore.is_piecewise_linear`."""
        return self.shards.any(self._local.piecewise_linear, self.device)

    def in_which_weights_move(self, check: Callable[[GraphStore], T]) -> T:
        """See `GraphStore.in_which_weights_move`; here the weights of each rank move alone."""
        return self.on_this_rank(check)

    def adopt(self, objective: Objective, note: str) -> bool:
        """See `GraphStore.adopt`; refused where the batches of several ranks have no known weights."""
        if self.objective.is_part:
            return self._replace(objective)
        found = ranks.all_gather((note, objective.counted))
        notes = {each for each, _ in found}
        if notes <= {"", pieces.RANDOM, pieces.NOT_TOGETHER}:
            return False
        if notes == {pieces.SUMMED}:
            return self._replace(objective)
        if notes == {pieces.UNSHIFTED}:
            return self._replace(objective.scaled(objective.counted / sum(counted for _, counted in found)))
        raise InputError(
            "the loss of a rank's batches is no mean over what they count, so that the weights of the batches of other "
            f"ranks are not known ({' / '.join(sorted(filter(None, notes)))}): pass weight=, or give all ranks the "
            "same batches"
        )

    def _replace(self, objective: Objective) -> bool:
        changed, self.objective = objective is not self.objective, objective
        return self.shards.any(changed, self.device)

    def products_over_ranks(
        self, multiply: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor
    ) -> torch.Tensor:
        """The products of the rows of `vectors`, this rank's parts (k, entries)."""
        self.prepare()
        products = torch.empty_like(vectors)
        for start in range(0, len(vectors), self._together):
            rows = slice(start, start + self._together)
            whole = self.shards.gather(vectors[rows])
            found = self._on_this_rank(lambda _, whole=whole: multiply(whole))
            del whole
            products[rows] = self.shards.sum_of_whole(found)
        return products

    @property
    def _together(self) -> int:
        """How many whole vectors to hold at once: more only where they are small."""
        return max(TOGETHER_BYTES // (self.space.dimension * self.dtype.itemsize), 1)

    def _total(self, number: float) -> float:
        return self.shards.sum(torch.tensor(number, dtype=torch.float64, device=self.device)).item()

    # -- what is known at the current weights

    def prepare(self, *, thorough: bool = False) -> bool:
        """See `GraphStore.prepare`. A change of the weights on one rank is a change for all."""
        reshard(self.model)
        if self.shards.any(self.weights_changed(thorough=thorough), self.device):
            self._gradient = None
            self.space = self.space.renewed(self.model)
        if self._gradient is not None:
            return False
        self._weights.gather()
        self._on_this_rank(GraphStore.prepare)
        self._loss = self._total(self._local.loss_found())
        self._gradient = self.shards.sum_of_whole(self._on_this_rank(GraphStore.gradient))
        self.unused = self._local.unused
        return True

    def forget(self) -> None:
        """Drop what was computed, the whole weights too, and their memory."""
        self._gradient = None
        self._local.forget()
        self._weights.drop()

    def loss(self) -> float:
        """The loss over all ranks at the current weights."""
        self.prepare()
        return self._loss

    def gradient(self) -> torch.Tensor:
        """This rank's part of the gradient at the current weights, (entries,)."""
        self.prepare()
        assert self._gradient is not None
        return self._gradient.clone()

    @property
    def keeps_every_graph(self) -> bool:
        """Whether this rank builds no graph again in a product."""
        return self._local.keeps_every_graph

    # -- at other weights

    def gradient_at(
        self, objective: Objective, *, dtype: torch.dtype | None = None, offset: torch.Tensor | None = None
    ) -> tuple[float, torch.Tensor]:
        """See `GraphStore.gradient_at`; offset and gradient are this rank's parts."""
        whole = None if offset is None else self.shards.gather(offset)
        loss, gradient = self.on_this_rank(lambda local: local.gradient_at(objective, dtype=dtype, offset=whole))
        return self._total(loss), self.shards.sum_of_whole(gradient)

    def differentiated_at(self, *, dtype: torch.dtype, offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        """See `GraphStore.differentiated_at`; both vectors are this rank's parts."""
        whole = self.shards.gather(offset)
        loss, vector = self.on_this_rank(lambda local: local.differentiated_at(dtype=dtype, offset=whole))
        return self._total(loss), self.shards.sum_of_whole(vector)

    def loss_at(
        self,
        *,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        objective: Objective | None = None,
    ) -> float:
        """See `GraphStore.loss_at`; the offset is this rank's part."""
        whole = None if offset is None else self.shards.gather(offset)
        return self._total(
            self.on_this_rank(lambda local: local.loss_at(dtype=dtype, offset=whole, objective=objective))
        )

    def product_at(self, vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `GraphStore.product_at`; vector and product are this rank's parts."""
        whole = self.shards.gather(vector)
        return self.shards.sum_of_whole(self.on_this_rank(lambda local: local.product_at(whole, dtype)))

    def higher_precision_product(self, vector: torch.Tensor) -> torch.Tensor:
        """See `GraphStore.higher_precision_product`; vector and product are this rank's parts."""
        whole = self.shards.gather(vector)
        return self.shards.sum_of_whole(self.on_this_rank(lambda local: local.higher_precision_product(whole)))

    def operations(self) -> Iterable[Any]:
        """The nodes of the autograd graph of the loss of this rank's first piece."""
        return self.on_this_rank(GraphStore.operations)

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """See `GraphStore.raise_non_finite`; the rows are this rank's parts."""
        whole = self.shards.gather(vectors)
        self.on_this_rank(lambda local: local.check_products(whole))
        raise NonFiniteError("the sum of the Hessian products over ranks overflows; measure with precision='float64'")

    # -- memory

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the whole weights."""
        return self._weights.size

    def exchanged_bytes(self, vectors: int) -> int:
        """Bytes of the whole vectors that a product of so many vectors gathers, which its whole products are beside."""
        return min(vectors, self._together) * self.shards.count * self.shards.length * self.dtype.itemsize

    def footprint(self, recomputed: str | None = None) -> Footprint:
        """The memory that a microbatch takes on this rank, see `GraphStore`. All ranks call this together."""
        return self.on_this_rank(lambda local: local.footprint(recomputed))

    def layout(self, *, reserved: int | None = None, held: int | None = None, free: int | None = None) -> GraphLayout:
        """See `GraphStore.layout`; of this rank. All ranks call this together."""
        # the graphs of this rank count in whole vectors, of which the reserved ones are parts
        if held is None:
            held = self._local.reserved if reserved is None else reserved * self._vector_bytes
        return self.on_this_rank(lambda local: local.layout(held=held, free=free))

    def reserve(self, vectors: int) -> bool:
        """See `GraphStore.reserve`. Graphs that exist stay: ranks build them together."""
        self.reserved = self._local.reserved = vectors * self._vector_bytes
        return False

    def product_bytes(self) -> int | None:
        """See `GraphStore.product_bytes`; of this rank, with the vector that is gathered."""
        known = self._local.product_bytes()
        return None if known is None else known + self.exchanged_bytes(1)
