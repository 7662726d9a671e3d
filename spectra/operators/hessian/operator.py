"""The Hessian of a model's loss as a linear operator, one reverse-over-reverse product at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import nn

from spectra.backend import memory, ranks
from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.vectors import gaussian, norm
from spectra.operators.base import GAP_TO_ROUNDING, LinearOperator, Preflight
from spectra.operators.hessian import engines
from spectra.operators.hessian.footprint import Footprint, measure_footprint
from spectra.operators.hessian.isolation import differentiating, isolated, random_states_kept, requiring_grad, unwrap
from spectra.operators.hessian.objective import Objective, Piece, pieces_of_rank
from spectra.operators.hessian.parameters import ParameterSpace, Selection
from spectra.operators.hessian.pick import EnginePick
from spectra.operators.hessian.precision import LOWER, arithmetic, in_precision, lifted, one_dtype

GRAPHS = ("auto", "keep", "rebuild")


class HessianOperator(LinearOperator):
    """H = d^2 L / d theta^2 of the token-weighted mean loss L over `batches`, in the chosen parameters theta.

    A product is the gradient of g . v, where g = dL/d theta (Pearlmutter, Neural Computation 1994): H v in two
    gradients where arithmetic bounds, with the graph of g kept from one product to the next.

    model: any module; Hugging Face models are called with the batch and give their own loss. It is measured in
    evaluation mode unless `training`, with twice-differentiable attention, and left bit for bit as it was.
    batches, loss, microbatch, weight: see `spectra.Objective`. params: see `spectra.ParameterSpace`.
    context: called for a context manager entered around every forward pass.
    graph: "keep" the graph of every piece between products, "rebuild" it at each (three gradients instead of two,
    the memory of one piece), or "auto": keep as many as fit in half of the memory that is free.
    engine: how several vectors at once are multiplied, see `spectra.engines`; "auto" times the likely ones at the
    first block and keeps the fastest (`engine_used` names it). All give the same numbers to rounding.
    spread: "batches" leaves each rank of torch.distributed its part of the batches (of the microbatches, where those
    are asked for); loss, gradient and products are then summed over the ranks, which all have to ask for them.
    precision: "float32" or "float64" measures a copy of the model in that precision. Without it a model with bf16 or
    fp16 weights is refused: their rounding is larger than most eigenvalues. "tf32" and "bfloat16" make matrix products
    in that precision; what that changes is measured, noted, and widens the intervals. Nothing else lets TF32 in.

    Weights changed in place, as optimizers do, are noticed and the graph is rebuilt; after writing through `.data`
    call `refresh()`. `close()` (or a `with` block) gives the memory of the graphs back.
    Attributes: shape (n, n), dtype, device, space, objective, products, and notes (list of str): what a reader of the
    numbers should know of how they were computed.
    Raises InputError for what it cannot measure, NonFiniteError naming batch and parameter for NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        params: Selection = None,
        loss: Callable[..., torch.Tensor] | None = None,
        *,
        microbatch: int | None = None,
        weight: Callable[[Any], float] | None = None,
        training: bool = False,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        graph: str = "auto",
        engine: str = "auto",
        precision: str | None = None,
        spread: str = "none",
    ):
        if graph not in GRAPHS:
            raise InputError(f"graph must be one of {', '.join(GRAPHS)}, got {graph!r}")
        given = unwrap(model)
        model = in_precision(given, precision)
        self.model, self.training, self.graph = model, training, graph
        self.space = ParameterSpace(model, params)
        self.dtype = one_dtype(model, self.space)
        self.notes = lifted(given, self.space, self.dtype)  # what a record should say of how this was measured
        self.precision: str | None = precision
        self.device = self.space.parameters[0].device
        self._engine = EnginePick(self, engine)
        # a graph that is to be captured has to be built on the stream that it is captured on
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.shape = (self.space.dimension, self.space.dimension)
        cast = None if model is given else self.dtype  # a copy in another precision takes inputs in it
        self.objective = Objective(model, batches, loss, microbatch=microbatch, weight=weight, cast=cast)
        self.spread = ranks.check_spread(spread, ("none", "batches"))
        if spread == "batches":
            self.objective = self.objective.only(pieces_of_rank(self.objective.pieces))
        self._context = context or contextlib.nullcontext
        self._kept: dict[int, engines.Gradient] = {}
        self._forward: dict[int, engines.ForwardOverReverse] = {}
        self._footprint: Footprint | None = None
        self._loss: float | None = None
        self._linearity_gap: float | None = None
        self._precision_error: float | None = None
        self._gradient: torch.Tensor | None = None
        self._versions: tuple[tuple[int, int], ...] = ()

    def loss(self) -> float:
        """L at the current weights."""
        self.prepare()
        assert self._loss is not None
        return self._loss

    def gradient(self) -> torch.Tensor:
        """dL/d theta at the current weights: (n,)."""
        self.prepare()
        if self._gradient is not None:
            return self._gradient.clone()
        return functools.reduce(torch.add, map(self._flat, self._kept.values()))

    def preflight(self) -> Preflight:
        """Check that the loss is a deterministic function and its Hessian symmetric; seven products.

        Raises InputError where two evaluations of the gradient differ by more than a hundredth.
        """
        first = self.gradient()
        self.refresh()
        scale = norm(first)
        repeatability = norm(self.gradient() - first) / scale if scale > 0 else 0.0
        if repeatability > 1e-2:
            raise InputError(
                f"the loss is not a deterministic function: its gradient changed by {repeatability:.1%} between two "
                "evaluations; switch off sampling in the forward pass or measure with training=False"
            )
        return Preflight(self.symmetry_gap(), self.linearity_gap(), repeatability, self.precision_error())

    def linearity_gap(self, *, seed: int = 0) -> float:
        """See `LinearOperator.linearity_gap`; measured once at the current weights."""
        self.prepare()
        if self._linearity_gap is None:
            self._linearity_gap = super().linearity_gap(seed=seed)
        return self._linearity_gap

    @property
    def engine_used(self) -> str:
        """The engine that multiplied last, "" before the first product."""
        return self._engine.used

    def precision_error(self) -> float:
        """||(A - A') u|| / ||A' u|| for a random u, with A' the operator in float32: what "tf32" or "bfloat16" changes,
        measured once at the current weights. Zero where no lower precision was asked for."""
        if self.precision not in LOWER:
            return 0.0
        self.prepare()
        if self._precision_error is None:
            vector = gaussian(self, seed=0, index=0, stream="precision")[None]
            lower = self.rows(vector)
            precision, self.precision = self.precision, None
            try:
                with random_states_kept(self.device), self._on_stream():
                    products = [self.through(self.build(p)[1], vector, keep=False) for p in self.objective.pieces]
                    higher = torch.stack(products).sum(dim=0)
            finally:
                self.precision = precision
            if self.spread == "batches":
                ranks.all_reduce_sum_(higher)
            self._precision_error = norm((lower - higher)[0]) / norm(higher[0])
            self.notes.append(f"products in {precision}, {self._precision_error:.1e} off those in float32")
        return self._precision_error

    def rounding(self) -> float:
        """See `LinearOperator.rounding`; a lower precision moves eigenvalues by what it changes of a product."""
        return max(super().rounding(), GAP_TO_ROUNDING * self.precision_error())

    def refresh(self) -> None:
        """Forget everything computed at earlier weights."""
        self._engine.forget()
        self._kept.clear()
        self._forward.clear()
        self._loss = self._gradient = self._linearity_gap = self._precision_error = None

    def close(self) -> None:
        """Give back the memory of the kept graphs; the operator stays usable and rebuilds them when asked."""
        self.refresh()

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _matrows(self, vectors: torch.Tensor) -> torch.Tensor:
        images = self._engine(vectors)
        return ranks.all_reduce_sum_(images) if self.spread == "batches" else images

    def multiply(self, vectors: torch.Tensor, way: str) -> torch.Tensor:
        """The products of the rows of `vectors` (k, n) by one engine, "reverse", "batched" or "forward": what `@`
        calls with the engine it has picked."""
        self.prepare()
        with self._on_stream():
            return self._sum_over_pieces(vectors, way)

    def capture(self, example: torch.Tensor, way: str) -> engines.CapturedProducts:
        """The products of blocks like `example` (k, n), recorded as a CUDA graph at the current weights."""
        self.prepare()
        if self._stream is None or not self.keeps_every_graph:
            raise InputError("a product can be captured on a CUDA device with every graph kept: use engine='auto'")
        return engines.CapturedProducts(lambda vectors: self._sum_over_pieces(vectors, way), example, self._stream)

    @property
    def keeps_every_graph(self) -> bool:
        """Whether no product has to build a graph again."""
        return len(self._kept) == len(self.objective.pieces)

    def footprint(self) -> Footprint:
        """What a microbatch takes in memory, measured once on a few rows."""
        if self._footprint is None:
            with random_states_kept(self.device), self._on_stream():
                self._footprint = measure_footprint(self)
        return self._footprint

    def lighten(self) -> str:
        """Need less memory from here on: rebuild graphs instead of keeping them, then halve the microbatches. What
        changed, in words; "" where nothing is left to do."""
        rows = max(self.objective.rows)
        if self.graph != "rebuild":
            self.graph, change = "rebuild", "graphs rebuilt at every product"
        elif rows > 1:
            self.objective, change = self.objective.halved(), f"{(rows + 1) // 2} rows at a time"
        else:
            return ""
        self.refresh()
        return change

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On a GPU, work on the operator's own stream, in order with the caller's."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _sum_over_pieces(self, vectors: torch.Tensor, way: str) -> torch.Tensor:
        total = None
        for index, piece in enumerate(self.objective.pieces):
            products = self._piece_products(index, piece, vectors, way)
            total = products if total is None else total.add_(products)
        assert total is not None  # an objective has at least one piece
        return total

    def blame(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the NonFiniteError that names the batch and the parameter where a product is not finite."""
        for index, piece in enumerate(self.objective.pieces):
            products = self._piece_products(index, piece, vectors, "reverse")
            for product in products:
                self.space.check_finite(product, f"the Hessian product of {piece.name}")
        raise NonFiniteError("the sum of the Hessian products over batches overflows; measure with precision='float64'")

    def _piece_products(self, index: int, piece: Piece, vectors: torch.Tensor, way: str) -> torch.Tensor:
        if way == "forward":
            return self._forward_over_reverse(index, piece, vectors)
        keep = index in self._kept
        gradient = self._kept[index] if keep else self.build(piece)[1]
        return self.through(gradient, vectors, keep=keep, batched=way == "batched")

    def through(
        self, gradient: engines.Gradient, vectors: torch.Tensor, *, keep: bool, batched: bool = False
    ) -> torch.Tensor:
        """The products of the rows of `vectors` (k, n) with the derivative of a gradient that has its graph."""
        multiply = engines.batched if batched else engines.reverse
        with requiring_grad(self.model, self.space.parameters), differentiating(self.device), self._arithmetic():
            return multiply(gradient, self.space, vectors, keep=keep)

    def _forward_over_reverse(self, index: int, piece: Piece, vectors: torch.Tensor) -> torch.Tensor:
        if index not in self._forward:
            self._forward[index] = engines.ForwardOverReverse(
                self.model, self.space, lambda: self.objective.evaluate(piece, self.device) * piece.share
            )
        with (
            isolated(self.model, training=self.training, attention=("eager",)),
            self._context(),
            self._arithmetic(),
            torch.compiler.set_stance("default"),
        ):
            return self._forward[index](vectors)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self.precision, self.device)

    def build(self, piece: Piece) -> tuple[torch.Tensor, engines.Gradient]:
        """The piece's weighted loss, and its gradient with a graph that can be differentiated again."""
        parameters = self.space.parameters
        measuring = isolated(self.model, training=self.training)
        with measuring, requiring_grad(self.model, parameters), self._context(), self._arithmetic():
            loss = self.objective.forward(piece, self.device) * piece.share
            if not loss.requires_grad:
                return loss, tuple(torch.zeros_like(p) for p in parameters)
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        return loss.detach(), gradient

    def prepare(self) -> None:
        """Loss, gradient and graphs at the current weights; what belongs to others is forgotten."""
        state = (*self.model.parameters(), *self.model.buffers())
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in state)
        if versions != self._versions:
            self.refresh()
            self._versions = versions
        if self._loss is None:
            self._engine.in_memory(self._compute, 1)

    def _compute(self) -> None:
        loss, total = 0.0, torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        room = self.pieces_that_fit()
        with random_states_kept(self.device), self._on_stream():
            for index, piece in enumerate(self.objective.pieces):
                value, gradient = self.build(piece)
                flat = self._flat(gradient)
                self.space.check_finite(flat, f"the gradient of {piece.name}")
                loss += value.item()
                total += flat
                if index < room:
                    self._kept[index] = gradient
        if self.spread == "batches":
            total = ranks.all_reduce_sum_(total)
            loss = ranks.all_reduce_sum_(torch.tensor(loss, dtype=torch.float64, device=self.device)).item()
        self._loss = loss
        if self.spread == "batches" or not self.keeps_every_graph:  # else the graphs have it
            self._gradient = total

    def _flat(self, gradient: engines.Gradient) -> torch.Tensor:
        return self.space.flatten([part.detach() for part in gradient])

    def pieces_that_fit(self) -> int:
        """How many of the first microbatches' graphs are kept: with "auto", those that half of the free memory holds,
        after cutting microbatches that would not leave room for a product."""
        if self.graph != "auto":
            return len(self.objective.pieces) if self.graph == "keep" else 0
        if len(self.objective.pieces) == 1 and self.objective.rows[0] == 1:
            return 1  # nothing to choose
        free = memory.available(self.device)
        while max(self.objective.rows) > 1 and self._needs(max(self.objective.rows)) > 0.8 * free:
            self.objective = self.objective.halved()
            self.notes.append(f"memory for {max(self.objective.rows)} rows at a time")
        room = free // 2
        for kept, rows in enumerate(self.objective.rows):
            room -= self.footprint().graph(rows)
            if room < 0:
                return max(kept, 1 if len(self.objective.pieces) == 1 else 0)
        return len(self.objective.pieces)

    def _needs(self, rows: int) -> int:
        return self.footprint().graph(rows) + self.footprint().product(rows)
