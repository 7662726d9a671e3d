"""The autograd graphs of the gradient: built for one piece of the batches at a time, and kept as memory allows."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from spectra.backend import memory, ranks
from spectra.backend.errors import InputError, NonFiniteError, first_line
from spectra.backend.shards import Shards
from spectra.operators.hessian import engines
from spectra.operators.hessian.fingerprint import fingerprint, optimizer_steps
from spectra.operators.hessian.footprint import Footprint, measure_footprint
from spectra.operators.hessian.isolation import (
    TWICE_DIFFERENTIABLE,
    RandomStates,
    differentiating,
    draw_other_numbers,
    experts_in,
    isolated,
    random_states_kept,
)
from spectra.operators.hessian.objective import Objective, Piece
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.operators.hessian.precision import arithmetic
from spectra.operators.hessian.recompute import (
    ATTENTION_AND_LOSS,
    LAYERS,
    NOTHING,
    AttentionAndLossRecomputed,
    layers_of,
    layers_recomputed,
)
from spectra.operators.hessian.substitution import Substitution, WeightsWritten, nodes_of, unwritten

T = TypeVar("T")
Part = tuple[int, ...] | None  # positions of the parameters of a diagonal block; None for all of them
OTHER_SEED = 20240229  # of the random numbers that show whether a forward pass depends on random numbers
POLICIES = ("auto", "keep", "recompute", "recompute layers", "rebuild")
CHOICES = [NOTHING, ATTENTION_AND_LOSS, LAYERS]
RECOMPUTED = {"recompute": ATTENTION_AND_LOSS, "recompute layers": LAYERS}  # what a policy recomputes from the start
GRAPHS_SHARE = 0.5  # of the free memory that kept graphs may take under "auto"
PRODUCT_SHARE = 0.8  # of the free memory that one graph and a product may take before microbatches are cut
# A graph of one row has less than this many times the bytes of the vectors: with more memory nothing is measured.
PLENTY = 4096
# What torch says of an operation that it cannot differentiate twice; the group is the operation.
NO_SECOND_DERIVATIVE = (
    r"derivative for '?([\w:]+)'? is not implemented",
    r"(element \d+ of tensors does not require grad)",
    r"(trying to differentiate twice a function that was marked with @once_differentiable)",
    r"(\w+).{0,40} does not support (?:double backward|second)",
)


@dataclass(frozen=True)
class GraphLayout:
    """How the graphs lie in memory.

    Attributes:
        objective: The loss, cut into the pieces that are processed one after another.
        kept: How many graphs are kept, those of the first pieces; the others are rebuilt at every product.
        recomputed: What every product computes again instead of keeping it, see
            `spectra.operators.hessian.recompute`.
    """

    objective: Objective
    kept: int
    recomputed: str = NOTHING

    @property
    def kept_share(self) -> float:
        """The share of the rows whose graphs are kept."""
        return sum(self.objective.rows[: self.kept]) / sum(self.objective.rows)

    @property
    def is_whole(self) -> bool:
        """Whether every graph is kept."""
        return self.kept == len(self.objective.pieces)

    def means_the_same_as(self, other: GraphLayout) -> bool:
        """Whether the other cuts rows alike, keeps as many graphs, and recomputes the same."""
        mine, theirs = ((x.objective.rows, x.kept, x.recomputed) for x in (self, other))
        return mine == theirs


@dataclass
class _State:
    """What was computed at one set of weights."""

    substitution: Substitution
    loss: float
    kept: list[engines.Tensors]
    gradient: torch.Tensor | None  # None where the kept graphs hold all of it
    forward: dict[tuple[int, Part], engines.ForwardOverReverse]


class GraphStore:
    """The gradient of an objective with its graph, at the current weights of the model.

    Args:
        model: The model, outside of any wrapper.
        space: The parameters that are differentiated.
        objective: The loss.
        dtype: The dtype of the vectors and of the gradient.
        copy: The dtype of the copy of the weights that is measured, None for the weights themselves.
        precision: See `spectra.operators.hessian.precision`.
        training: Whether the model runs in training mode.
        context: Returns a context manager, which is entered around every forward pass.
        policy: "keep" all graphs; "recompute" attention and cross-entropy, or "recompute layers", in every product;
            "rebuild" whole graphs in every product; or "auto": the first of these that fits in memory.
        over_ranks: Whether every rank of torch.distributed has a part of the objective.
        notes: A list; what a reader of the numbers should know is appended to it.

    Attributes:
        can_be_cut: Returns whether batches may be cut into rows, which some losses do not allow.
        writes_to_weights: Whether the forward pass was seen to write to weights, as an embedding with max_norm does.
        unused: Names of chosen parameters that the gradient does not reach.
        when_out_of_memory: Makes later computations need less memory, and says how in words; by default
            `reduce_memory`.
        each_forward: Returns a further context manager around every forward pass; the checks set it temporarily.
        reserved: Bytes that an algorithm will need for its vectors.
        context: See the argument.
        shards: Which part of every vector this rank holds, where vectors are sharded; else None.
    """

    shards: Shards | None = None

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        objective: Objective,
        *,
        dtype: torch.dtype,
        copy: torch.dtype | None,
        precision: str | None,
        training: bool,
        context: Callable[[], AbstractContextManager[Any]],
        policy: str,
        over_ranks: bool,
        notes: list[str],
    ):
        if policy not in POLICIES:
            raise InputError(f"graph must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.model, self.space, self.objective = model, space, objective
        self.dtype, self.device, self.copy, self.precision = dtype, space.parameters[0].device, copy, precision
        self.training, self.policy, self.over_ranks, self.notes = training, policy, over_ranks, notes
        self.can_be_cut: Callable[[], bool] = lambda: True
        self.each_forward: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self.when_out_of_memory: Callable[[], str] = self.reduce_memory
        self.context = context
        # a graph that is to be captured has to be built on the stream that it is captured on
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._state: _State | None = None
        self._versions: tuple[tuple[int, int, int], ...] = ()
        self._fingerprint: list[float] = []
        self._steps_seen = 0
        self.reserved = 0
        self._recomputed = self._least_recomputed = RECOMPUTED.get(policy, NOTHING)
        self._footprints: dict[str, Footprint] = {}
        self._random_states: RandomStates | None = None  # from which every forward pass at these weights draws
        self.writes_to_weights = False  # if so, stand-ins have memory of their own
        self._written: dict[int, torch.Tensor] | None = None  # the weights as the forward pass leaves them
        self._other_numbers = False
        self._within: Part = None
        self._redirected = False  # whether the loss reads parameters or constants past the modules
        self.unused: tuple[str, ...] = ()

    def in_float64(self, notes: list[str]) -> GraphStore:
        """A store for the same loss of a float64 copy of the weights, still without graphs.

        Args:
            notes: See `notes` of the store.

        Returns:
            The store.
        """
        return type(self)(
            self.model,
            self.space,
            self.objective,
            dtype=torch.float64,
            copy=torch.float64,
            precision="float64",
            training=self.training,
            context=self.context,
            policy=self.policy,
            over_ranks=self.over_ranks,
            notes=notes,
        )

    # -- over the ranks

    @property
    def local(self) -> GraphStore:
        """The graphs that this process holds: the store itself, unless parameters are sharded."""
        return self

    def on_this_rank(self, check: Callable[[GraphStore], T]) -> T:
        """Call a check with the graphs that this process holds; it needs no other rank."""
        return check(self)

    def adopt(self, objective: Objective, note: str) -> bool:
        """Take over the objective that `settle_shares` found for the graphs of this process. Whether it is another.

        Args:
            objective: The objective, with the shares of its pieces.
            note: What that check noted.

        Returns:
            Whether anything computed before belongs to another objective.
        """
        changed, self.objective = objective is not self.objective, objective
        return changed

    def products_over_ranks(
        self, multiply: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor
    ) -> torch.Tensor:
        """The products of the rows of `vectors` (k, n), from those with the part of the objective of this rank."""
        products = multiply(vectors)
        return ranks.all_reduce_sum_(products) if self.over_ranks else products

    # -- what is known at the current weights

    def loss(self) -> float:
        """The loss at the current weights."""
        return self._current().loss

    def loss_found(self) -> float:
        """The loss that was computed last, whatever the current weights are."""
        assert self._state is not None
        return self._state.loss

    def gradient(self) -> torch.Tensor:
        """The gradient at the current weights, (n,)."""
        state = self._current()
        if state.gradient is not None:
            return state.gradient.clone()
        return functools.reduce(torch.add, map(self._flat, state.kept))

    @property
    def keeps_every_graph(self) -> bool:
        """Whether no product has to build a graph again."""
        return self._state is not None and len(self._state.kept) == len(self.objective.pieces)

    def weights_changed(self, *, thorough: bool = False) -> bool:
        """Whether weights or buffers have changed since the last call.

        torch counts the writes to a tensor, except those of fused optimizers, through `.data` and in inference mode.
        Such writes are detected by comparing values: on a CPU at every call, and on a GPU after any optimizer's step.

        Args:
            thorough: Whether to compare values on a GPU at this call too, which waits for the GPU.

        Returns:
            Whether they have changed.
        """
        state = (*self.model.parameters(), *self.model.buffers())
        versions = tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in state)
        changed, self._versions = versions != self._versions, versions
        steps, self._steps_seen = self._steps_seen, optimizer_steps()
        if changed or thorough or self.device.type == "cpu" or steps != self._steps_seen:
            current = fingerprint(state)
            changed, self._fingerprint = changed or current != self._fingerprint, current
        return changed

    def prepare(self, *, thorough: bool = False) -> bool:
        """Compute loss, gradient and graphs at the current weights, unless they are known. Returns whether it did."""
        if self.weights_changed(thorough=thorough):
            self.forget()
            self.space = self.space.renewed(self.model)
            self._random_states = self._written = None
        if self._state is not None:
            return False
        self.run_within_memory(self._compute, self.when_out_of_memory, vectors=1)
        return True

    def forget(self) -> None:
        """Drop what was computed, and its memory."""
        self._state = None

    def _current(self) -> _State:
        """What was computed at the current weights, computed now if need be."""
        self.prepare()
        assert self._state is not None
        return self._state

    def _compute(self) -> None:
        """Compute loss, gradient and graphs, piece by piece, and note what was unusual."""
        layout = self.layout()
        if layout.objective is not self.objective:
            self.objective = layout.objective
            self.notes.append(f"memory for {max(self.objective.rows)} rows at a time")
        if layout.recomputed != self._recomputed:
            self._recomputed = layout.recomputed
            if self._recomputed:
                self.note(f"{self._recomputed} computed again in every product, for want of memory")
        loss, kept = 0.0, []
        total = torch.zeros(self.space.dimension, dtype=self.dtype, device=self.device)
        with random_states_kept(self.device), self.on_stream():
            substitution = self.substitution()
            unused = set(self.space.names)
            for index, piece in enumerate(self.objective.pieces):
                if index == 0:
                    value, gradient, substitution = self._build_first(piece)
                else:
                    value, gradient = self.build(piece, substitution)
                unused &= set(self.unused)
                flat = self._flat(gradient)
                self.space.check_finite(flat, f"the gradient of {piece.name}")
                loss += value.item()
                total += flat
                if index < layout.kept:
                    kept.append(gradient)
        self.unused = tuple(name for name in self.space.names if name in unused)
        self._note_unused()
        if self.writes_to_weights:
            self._written = substitution.values()
        loss, total = self._over_ranks(loss, total)
        every_graph = len(kept) == len(self.objective.pieces) and not self.over_ranks
        self._state = _State(substitution, loss, kept, None if every_graph else total, {})
        for note in self.objective.batch_loss.notes:
            self.note(note)

    def _over_ranks(self, loss: float, gradient: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Loss and gradient summed over the ranks, where each has a part of the objective."""
        if not self.over_ranks:
            return loss, gradient
        total = ranks.all_reduce_sum_(torch.tensor(loss, dtype=torch.float64, device=self.device))
        return total.item(), ranks.all_reduce_sum_(gradient)

    # -- one piece

    def substitution(self, *, dtype: torch.dtype | None = None, offset: torch.Tensor | None = None) -> Substitution:
        """Stand-ins for the current weights, in another precision or moved by an offset (n,) if asked for."""
        loss = self.objective.loss if isinstance(self.objective.loss, nn.Module) else None
        return Substitution(
            self.model,
            self.space,
            loss=loss,
            dtype=dtype or self.copy,
            offset=offset,
            copies=self.writes_to_weights,
            values=self._written,
            redirected=self._redirected,
        )

    def _build_first(self, piece: Piece) -> tuple[torch.Tensor, engines.Tensors, Substitution]:
        """`build` for the first piece, which finds out what kind of stand-ins the loss needs; returns those too."""
        for _ in range(3):
            substitution = self.substitution()
            try:
                return (*self.build(piece, substitution, guarded=not self.writes_to_weights), substitution)
            except WeightsWritten:  # stand-ins with memory of their own keep the model's weights unchanged
                self.writes_to_weights = True
            except _ReadPastModules:
                self._redirected = True
        raise AssertionError("a loss is redirected once")

    def build(
        self,
        piece: Piece,
        substitution: Substitution,
        *,
        second_order: bool = True,
        guarded: bool = False,
        part: Part = None,
    ) -> tuple[torch.Tensor, engines.Tensors]:
        """The piece's weighted loss and its gradient, with a graph that can be differentiated again.

        Args:
            piece: The microbatch.
            substitution: The stand-ins for the weights at which it is computed.
            second_order: Whether the gradient has a graph.
            guarded: Whether to raise `WeightsWritten` if the forward pass would write to the model's weights.
            part: The parameters that the gradient is computed for; it is zero in the others.

        Returns:
            The loss, a scalar, and the gradient, a tensor for each chosen parameter.

        Raises:
            InputError: Where the loss does not depend on the chosen parameters, or cannot be differentiated.
        """
        recomputing = self._recomputing() if second_order else contextlib.nullcontext()
        with self._measuring(), substitution.active(), self._forward_pass(), recomputing:
            if guarded:
                loss = self._guarded_loss(piece, substitution)
            else:
                loss = self.objective.forward(piece, self.device, substitution.dtype)
            loss = loss * piece.share
            if not loss.requires_grad:
                raise InputError(
                    f"the loss of {piece.name} does not depend on the chosen parameters by differentiable steps: "
                    "look for torch.no_grad, .detach(), .item() or argmax in the forward pass and the loss, or choose "
                    "parameters that are used with params=..."
                )
            with second_derivatives_named():
                gradient = self._differentiated(loss, substitution.chosen, piece, part, second_order=second_order)
        return loss.detach(), gradient

    def _differentiated(
        self, loss: torch.Tensor, parameters: engines.Tensors, piece: Piece, part: Part, *, second_order: bool
    ) -> engines.Tensors:
        """What is kept of a piece: the gradient of its loss, with a graph if asked for."""
        return self._filled(gradient_of(loss, parameters, part, create_graph=second_order), parameters, piece, part)

    def _filled(
        self, gradient: Sequence[torch.Tensor | None], parameters: engines.Tensors, piece: Piece, part: Part
    ) -> engines.Tensors:
        """The gradient with zeros where the loss does not reach a parameter, whose names are stored."""
        if part is None:
            self._check_used(gradient, piece)
        filled = zip(gradient, parameters, strict=True)
        return tuple(torch.zeros_like(p) if g is None else _dense(g) for g, p in filled)

    def _guarded_loss(self, piece: Piece, substitution: Substitution) -> torch.Tensor:
        """The loss of a piece. Raises if its forward pass writes to the model's weights or bypasses the stand-ins."""
        with substitution.guarded(), _requiring_gradients(self.space.parameters):
            try:
                loss = self.objective.forward(piece, self.device, substitution.dtype)
            except (InputError, RuntimeError) as error:
                if substitution.dtype is None or self._redirected or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise _ReadPastModules from error  # constants in another precision are a likely cause
        past = substitution.reached_past(loss)
        if not self._redirected and (past or substitution.has_plain_form(loss)):
            raise _ReadPastModules
        if not past:
            return loss
        raise InputError(
            "the loss function or a module computes with tensors that were made from the model's parameters before: "
            "let it compute them from the model when it is called"
        )

    def _check_used(self, gradient: Sequence[torch.Tensor | None], piece: Piece) -> None:
        """Refuse a loss that uses none of the chosen parameters, and store the names of those that it does not use."""
        unused = [name for name, part in zip(self.space.names, gradient, strict=True) if part is None]
        if len(unused) == len(gradient):
            raise InputError(
                f"the loss of {piece.name} does not use any of the {len(unused)} chosen parameters, such as "
                f"'{unused[0]}': choose parameters that the forward pass uses with params=..."
            )
        self.unused = tuple(unused)

    def note(self, text: str) -> None:
        """Add a note for the reader of the numbers, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    def _note_unused(self) -> None:
        """Add a note that names the chosen parameters which the loss does not use."""
        listed = ", ".join(self.unused[:3]) + (f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else "")
        if self.unused:
            self.note(f"parameters that the loss does not use, whose rows are zero: {listed}")

    def gradient_at(
        self, objective: Objective, *, dtype: torch.dtype | None = None, offset: torch.Tensor | None = None
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient of an objective at other weights, without a graph.

        Args:
            objective: The loss, in its pieces.
            dtype: The precision, None for that of the measurement.
            offset: A vector (n,) added to the chosen parameters.

        Returns:
            The loss and the gradient, (n,).
        """
        loss, total = 0.0, None
        with random_states_kept(self.device), self.on_stream():
            substitution = self.substitution(dtype=dtype, offset=offset)
            for piece in objective.pieces:
                value, gradient = self.build(piece, substitution, second_order=False, part=self._within)
                flat = self._flat(gradient)
                loss += value.item()
                total = flat if total is None else total.add_(flat)
        assert total is not None  # an objective has at least one piece
        return self._over_ranks(loss, total)

    def differentiated_at(self, *, dtype: torch.dtype, offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss, and the vector (n,) whose derivative along the offset products are: the gradient, at other weights.

        Args:
            dtype: The precision.
            offset: A vector (n,) added to the chosen parameters.

        Returns:
            The loss and the vector.
        """
        return self.gradient_at(self.objective, dtype=dtype, offset=offset)

    def loss_at(
        self,
        *,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        objective: Objective | None = None,
    ) -> float:
        """The loss at other weights, or of another objective; arguments as in `gradient_at`."""
        total, objective = 0.0, objective or self.objective
        with random_states_kept(self.device), self.on_stream():
            substitution = self.substitution(dtype=dtype, offset=offset)
            for piece in objective.pieces:
                # gradients stay on: some modules compute differently without them
                with self._measuring(), substitution.active(), self._forward_pass():
                    value = objective.evaluate(piece, self.device, substitution.dtype)
                total += float(value.detach()) * piece.share
        if self.over_ranks:
            total = ranks.all_reduce_sum_(torch.tensor(total, dtype=torch.float64, device=self.device)).item()
        return total

    def loss_of_the_model_itself(self) -> float:
        """The loss as a training computes it: in the model's own parameters, without stand-ins."""
        total = 0.0
        with self._own_buffers_kept():
            for piece in self.objective.pieces:
                with self._without_stand_ins():
                    total += float(self.objective.forward(piece, self.device).detach()) * piece.share
        if self.over_ranks:
            total = ranks.all_reduce_sum_(torch.tensor(total, dtype=torch.float64, device=self.device)).item()
        return total

    def gradient_of_the_model_itself(self) -> tuple[float, torch.Tensor]:
        """Loss and gradient (n,) as a training computes them: in the model's own parameters, without stand-ins."""
        loss, total = 0.0, torch.zeros(self.space.dimension, dtype=self.dtype, device=self.device)
        own = {p.dtype for p in self.space.parameters}
        dtype = own.pop() if self.copy is not None and len(own) == 1 else None
        with self._own_buffers_kept():
            for piece in self.objective.pieces:
                with self._without_stand_ins():
                    value = self.objective.forward(piece, self.device, dtype) * piece.share
                    with second_derivatives_named():
                        parts = torch.autograd.grad(value, self.space.parameters, allow_unused=True)
                filled = zip(parts, self.space.parameters, strict=True)
                total += self._flat([torch.zeros_like(p) if g is None else _dense(g) for g, p in filled])
                loss += value.item()
        return self._over_ranks(loss, total)

    @contextlib.contextmanager
    def _without_stand_ins(self) -> Iterator[None]:
        """The contexts around a forward pass in the model's own parameters."""
        requiring = _requiring_gradients(self.space.parameters)
        try:
            experts = experts_in(self.model, self.space.parameters[0].dtype)
            with self.on_stream(), self._measuring(), self._forward_pass(), requiring, experts, unwritten(self.model):
                yield
        except WeightsWritten as error:
            raise InputError(
                "the loss function or the forward pass writes to the model's weights, as an optimizer's step in it "
                "does: let it compute the loss alone"
            ) from error

    @contextlib.contextmanager
    def _own_buffers_kept(self) -> Iterator[None]:
        """A context in which forward passes write to copies of the buffers, such as running means."""
        buffers = [(m, k, b) for m in self._modules() for k, b in m._buffers.items() if b is not None]
        try:
            for module, key, buffer in buffers:
                module._buffers[key] = buffer.clone()
            yield
        finally:
            for module, key, buffer in buffers:
                module._buffers[key] = buffer

    def _modules(self) -> Iterator[nn.Module]:
        """The modules of the model, and those of a loss that is a module."""
        yield from self.model.modules()
        if isinstance(self.objective.loss, nn.Module):
            yield from self.objective.loss.modules()

    # -- products

    def multiply(self, vectors: torch.Tensor, engine: str, part: Part = None) -> torch.Tensor:
        """The products of the rows of `vectors` (k, n) by "reverse", "batched" or "forward".

        Args:
            vectors: The vectors; (k, n_b) for a diagonal block.
            engine: The engine.
            part: The parameters of a diagonal block. Only they are differentiated, in the graph of the whole.

        Returns:
            The products, in the shape of the vectors.
        """
        self.prepare()
        with self.on_stream():
            return self.sum_over_pieces(vectors, engine, part)

    def capture(self, example: torch.Tensor, engine: str, part: Part = None) -> engines.CapturedProducts:
        """The products of vectors like `example` (k, n), recorded as a CUDA graph at the current weights."""
        self.prepare()
        if self.stream is None or not self.keeps_every_graph:
            raise InputError("a product can be captured on a CUDA device with every graph kept: use engine='auto'")
        return engines.CapturedProducts(
            lambda vectors: self.sum_over_pieces(vectors, engine, part), example, self.stream
        )

    def sum_over_pieces(self, vectors: torch.Tensor, engine: str, part: Part = None) -> torch.Tensor:
        """The sum of the products over all pieces, on the current stream."""
        total = None
        for index, piece in enumerate(self.objective.pieces):
            products = self._piece_products(index, piece, vectors, engine, part)
            total = products if total is None else total.add_(products)
        assert total is not None  # an objective has at least one piece
        return total

    def check_products(self, vectors: torch.Tensor) -> None:
        """Raise the NonFiniteError that names the batch and the parameter, if a product of a piece is not finite."""
        for index, piece in enumerate(self.objective.pieces):
            for product in self._piece_products(index, piece, vectors, "reverse"):
                self.space.check_finite(product, f"the Hessian product of {piece.name}")

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the NonFiniteError that names the batch and the parameter where a product is not finite."""
        self.check_products(vectors)
        raise NonFiniteError("the sum of the Hessian products over batches overflows; measure with precision='float64'")

    def _piece_products(
        self, index: int, piece: Piece, vectors: torch.Tensor, engine: str, part: Part = None
    ) -> torch.Tensor:
        """The products of one piece, from its kept graph or from one built for the occasion."""
        state = self._state
        assert state is not None
        if engine == "forward":
            return self._forward_over_reverse(state, index, piece, vectors, part)
        keep = index < len(state.kept)
        gradient = state.kept[index] if keep else self.build(piece, state.substitution, part=part)[1]
        return self.through(gradient, state.substitution, vectors, keep=keep, batched=engine == "batched", part=part)

    def through(
        self,
        gradient: engines.Tensors,
        substitution: Substitution,
        vectors: torch.Tensor,
        *,
        keep: bool,
        batched: bool = False,
        part: Part = None,
    ) -> torch.Tensor:
        """The products of the rows of `vectors` (k, n), computed from a gradient with its graph."""
        multiply = engines.batched if batched else engines.reverse
        parameters = substitution.chosen
        if part is not None:
            gradient, parameters = tuple(gradient[i] for i in part), tuple(parameters[i] for i in part)
        # activation checkpointing runs parts of the model again here, which need the stand-ins of the graph
        with contextlib.ExitStack() as stack:
            if self._recomputed == LAYERS:
                stack.enter_context(self._measuring())
            stack.enter_context(substitution.active())
            if self._recomputed == LAYERS:
                stack.enter_context(self._forward_pass())
            stack.enter_context(differentiating(self.device))
            stack.enter_context(self._arithmetic())
            stack.enter_context(second_derivatives_named())
            return multiply(gradient, parameters, vectors, keep=keep)

    def _forward_over_reverse(
        self, state: _State, index: int, piece: Piece, vectors: torch.Tensor, part: Part
    ) -> torch.Tensor:
        """The products of one piece by forward over reverse differentiation."""
        if (index, part) not in state.forward:
            positions = range(len(self.space.names)) if part is None else part
            state.forward[index, part] = engines.ForwardOverReverse(
                self.model,
                [self.space.names[i] for i in positions],
                tuple(state.substitution.chosen[i] for i in positions),
                lambda: self.objective.evaluate(piece, self.device, state.substitution.dtype) * piece.share,
            )
        with (
            self._measuring(attention=("eager",)),
            state.substitution.active(),
            self._forward_pass(),
            torch.compiler.set_stance("default"),
        ):
            return state.forward[index, part](vectors)

    def product_at(self, vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The product of one vector (n,) computed in another precision."""
        with random_states_kept(self.device), self.on_stream():
            substitution = self.substitution(dtype=dtype)
            parts = []
            for piece in self.objective.pieces:
                gradient = self.build(piece, substitution, part=self._within)[1]
                parts.append(self.through(gradient, substitution, vector[None].to(dtype), keep=False)[0])
        product = self._inside(torch.stack(parts).sum(dim=0))
        return ranks.all_reduce_sum_(product) if self.over_ranks else product

    def operations(self) -> Iterable[Any]:
        """The nodes of the autograd graph of the first piece's loss."""
        substitution, piece = self.substitution(), self.objective.pieces[0]
        with self.on_stream(), self._measuring(), substitution.active(), self._forward_pass():
            return nodes_of(self.objective.forward(piece, self.device, substitution.dtype))

    def higher_precision_product(self, vector: torch.Tensor) -> torch.Tensor:
        """The product of one vector (n,) with matrix products in float32, for a measurement in a lower precision."""
        state = self._current()
        with self.in_full_precision(), random_states_kept(self.device), self.on_stream():
            pieces = self.objective.pieces
            gradients = [self.build(piece, state.substitution, part=self._within)[1] for piece in pieces]
            parts = [self.through(g, state.substitution, vector[None], keep=False) for g in gradients]
            higher = self._inside(torch.stack(parts).sum(dim=0)[0])
        return ranks.all_reduce_sum_(higher) if self.over_ranks else higher

    @contextlib.contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """A context in which gradients at other weights and products in other precisions are zero outside a block."""
        self._within = part
        try:
            yield
        finally:
            self._within = None

    def _inside(self, vector: torch.Tensor) -> torch.Tensor:
        """The vector (n,), with zeros outside of `within`."""
        if self._within is None:
            return vector
        parts = vector.split(self.space.sizes)
        return torch.cat([p if i in self._within else torch.zeros_like(p) for i, p in enumerate(parts)])

    @contextlib.contextmanager
    def in_full_precision(self) -> Iterator[None]:
        """A context with matrix products in the precision of the weights, also if the measurement uses a lower one."""
        precision, self.precision = self.precision, None
        try:
            yield
        finally:
            self.precision = precision

    # -- memory

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the weights that are gathered from other ranks."""
        return 0

    def exchanged_bytes(self, vectors: int) -> int:
        """Bytes of the whole vectors that a product of so many sharded vectors gathers."""
        return 0

    def layout(self, *, reserved: int | None = None, free: int | None = None) -> GraphLayout:
        """The layout that fits into the memory that is free. Calling this changes nothing.

        Under "auto", microbatches are cut until one graph and a product through it fit, and as many graphs are kept as
        fit in half of the free memory. Where that is not all of them, attention and cross-entropy are recomputed if all
        fit then. Where a graph of one row does not fit, every layer is recomputed.

        Args:
            reserved: How many vectors (n,) an algorithm will hold; None for what was reserved.
            free: Bytes of memory; None for what is free now.

        Returns:
            The layout.
        """
        if reserved is not None:
            before, self.reserved = self.reserved, reserved * self._vector_bytes
            try:
                return self.layout(free=free)
            finally:
                self.reserved = before
        objective = self.objective
        if self.policy != "auto":
            return GraphLayout(objective, 0 if self.policy == "rebuild" else len(objective.pieces), self._recomputed)
        free = memory.available(self.device) if free is None else free
        single_row = len(objective.pieces) == 1 and objective.rows[0] == 1
        if single_row and free > PLENTY * self._vector_bytes:
            return GraphLayout(objective, 1, self._least_recomputed)
        fitting: list[GraphLayout] = []
        last: GraphLayout | None = None
        for recomputed in self._choices():
            if recomputed == LAYERS and fitting:  # a product costs no more where graphs that are not kept are rebuilt
                break
            try:
                found = self._fitted(recomputed, free)
            except torch.OutOfMemoryError:  # not even the few rows that are measured fit
                continue
            last = found
            if self._fits(found, free):
                if found.is_whole:
                    return found
                fitting.append(found)
        if last is None:
            raise torch.OutOfMemoryError("not even one row of a batch fits")
        return max(fitting, key=lambda layout: layout.kept_share) if fitting else last

    def _choices(self) -> list[str]:
        """What may be recomputed, from the least to the most."""
        possible = CHOICES if self._layers_may_be_recomputed() else CHOICES[:-1]
        return possible[CHOICES.index(self._least_recomputed) :] or [self._least_recomputed]

    def _layers_may_be_recomputed(self) -> bool:
        """Whether the model repeats layers that compute the same at every call."""
        return not self.training and not self.writes_to_weights and bool(layers_of(self.model))

    def _fitted(self, recomputed: str, free: int) -> GraphLayout:
        """The layout with this recomputed: microbatches cut as far as needed, and as many graphs kept as fit."""
        objective = self.objective
        while not self._fits(GraphLayout(objective, 0, recomputed), free) and self._can_be_halved(objective):
            objective = objective.halved()
        best = self._with_kept(objective, recomputed, free)
        # a product takes less memory for fewer rows, and leaves more for graphs
        while self.reserved and not best.is_whole and self._can_be_halved(objective):
            objective = objective.halved()
            best = max(best, self._with_kept(objective, recomputed, free), key=lambda layout: layout.kept_share)
        if len(best.objective.pieces) == 1:
            return GraphLayout(best.objective, 1, recomputed)  # a single graph is built in any case
        return best

    def _can_be_halved(self, objective: Objective) -> bool:
        return max(objective.rows) > 1 and self.can_be_cut()

    def _with_kept(self, objective: Objective, recomputed: str, free: int) -> GraphLayout:
        """The layout that keeps as many graphs as fit beside a product and the vectors of an algorithm."""
        footprint = self.footprint(recomputed)
        room = GRAPHS_SHARE * free
        if self.reserved:
            room = PRODUCT_SHARE * (free - self.reserved) - footprint.product(max(objective.rows))
        for kept, rows in enumerate(objective.rows):
            room -= footprint.graph(rows)
            if room < 0:
                return GraphLayout(objective, kept, recomputed)
        return GraphLayout(objective, len(objective.pieces), recomputed)

    def _fits(self, layout: GraphLayout, free: int) -> bool:
        """Whether one graph and a product through it fit beside the vectors of an algorithm."""
        footprint, rows = self.footprint(layout.recomputed), max(layout.objective.rows)
        return footprint.graph(rows) + footprint.product(rows) <= PRODUCT_SHARE * (free - self.reserved)

    def footprint(self, recomputed: str | None = None) -> Footprint:
        """The memory that a microbatch takes, measured once on a few rows.

        Args:
            recomputed: What is recomputed; None for what is recomputed now.

        Returns:
            The `Footprint`.
        """
        before = self._recomputed
        chosen = before if recomputed is None else recomputed
        if chosen not in self._footprints:
            try:
                self._recomputed = chosen
                self._footprints[chosen] = self._measured_footprint()
            finally:
                self._recomputed = before
        return self._footprints[chosen]

    def _measured_footprint(self) -> Footprint:
        with random_states_kept(self.device), self.on_stream():
            vector = torch.zeros(1, self.space.dimension, dtype=self.dtype, device=self.device)
            return measure_footprint(
                self.objective,
                lambda piece: self._build_first(piece)[1:],
                lambda built: self.through(*built, vector, keep=True),  # type: ignore[misc]
            )

    def reserve(self, vectors: int) -> bool:
        """Leave memory for so many vectors (n,).

        Graphs that are in the way are dropped, and so are those beside which others could be kept now. The next product
        builds them anew.

        Args:
            vectors: How many vectors an algorithm will hold.

        Returns:
            Whether graphs were dropped.
        """
        self.reserved = vectors * self._vector_bytes
        if self._state is None or self.policy != "auto" or self._recomputed not in self._footprints:
            return False
        if self.over_ranks:  # ranks have different amounts of memory, and build graphs together
            return False
        current = GraphLayout(self.objective, len(self._state.kept), self._recomputed)
        held = sum(self.footprint().graph(rows) for rows in self.objective.rows[: current.kept])
        available = memory.available(self.device)
        if self.reserved + (self.product_bytes() or 0) <= available and current.is_whole and not self._recomputed:
            return False
        if self.layout(free=available + held).means_the_same_as(current):
            return False
        self.forget()
        return True

    def product_bytes(self) -> int | None:
        """Bytes that a product takes while it runs, beside kept graphs; None where no memory was measured."""
        if self._recomputed not in self._footprints:
            return None
        rows = max(self.objective.rows)
        built = 0 if self.keeps_every_graph else self.footprint().graph(rows)
        return self.footprint().product(rows) + built

    @property
    def _vector_bytes(self) -> int:
        numbers = self.space.dimension if self.shards is None else self.shards.length
        return numbers * self.dtype.itemsize

    def reduce_memory(self) -> str:
        """Use less memory from here on: recompute attention and loss, rebuild graphs, cut rows, then recompute layers.

        Returns:
            What changed, in words; "" where nothing is left to do.
        """
        rows = max(self.objective.rows)
        if self.policy == "auto" and self._recomputed == NOTHING:
            self._least_recomputed = ATTENTION_AND_LOSS
            change = "attention and loss computed again in every product"
        elif self.policy != "rebuild":
            self.policy, change = "rebuild", "graphs rebuilt at every product"
        elif rows > 1 and self.can_be_cut():
            self.objective, change = self.objective.halved(), f"{(rows + 1) // 2} rows at a time"
        elif self._recomputed != LAYERS and self._layers_may_be_recomputed():
            self._least_recomputed, change = LAYERS, "every layer computed again in every product"
        else:
            return ""
        self._recomputed = max(self._recomputed, self._least_recomputed, key=CHOICES.index)
        self.forget()
        return change

    def run_within_memory(self, run: Callable[[], T], reduce: Callable[[], str], *, vectors: int) -> T:
        """Call `run`, and call it again after `reduce` each time that it runs out of memory. Changes are noted.

        Args:
            run: The computation.
            reduce: Makes later calls need less memory, and returns how in words; "" where it cannot.
            vectors: How many vectors are multiplied at once, for the message.

        Returns:
            What `run` returns.

        Raises:
            InputError: Where nothing is left to reduce.
        """
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            # outside of the handler the tensors of the failed attempt are freed
            change = reduce()
            if not change:
                raise InputError(
                    f"a product with {vectors} vectors does not fit in memory, not even a row of a batch at a time: "
                    "measure fewer parameters (params=), shorter sequences, or on a larger device"
                )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            note = f"out of memory, went on with {change}"
            self.notes.append(note)
            warnings.warn(f"{note} ({reason})", stacklevel=2)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """On a GPU, run on the store's own stream, synchronized with the caller's stream at both ends."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    @contextlib.contextmanager
    def other_random_numbers(self) -> Iterator[None]:
        """A context in which forward passes draw other random numbers than usual."""
        self._other_numbers = True
        try:
            yield
        finally:
            self._other_numbers = False

    @contextlib.contextmanager
    def _measuring(self, *, attention: Sequence[str] = TWICE_DIFFERENTIABLE) -> Iterator[None]:
        """The model isolated from the program, with the random states of every forward pass at these weights."""
        if self._random_states is None:
            self._random_states = RandomStates(self.device)
        with isolated(self.model, training=self.training, attention=attention, random_states=self._random_states):
            if self._other_numbers:
                draw_other_numbers(self.model, OTHER_SEED)
            yield

    @contextlib.contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """The contexts around a forward pass."""
        with self.context(), self.each_forward(), self._arithmetic():
            yield

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """A context in which parts of a forward pass are recomputed."""
        layers = layers_recomputed(self.model) if self._recomputed == LAYERS else contextlib.nullcontext()
        functions = contextlib.nullcontext() if self._recomputed == NOTHING else AttentionAndLossRecomputed()
        with layers, functions:
            yield

    def _arithmetic(self) -> AbstractContextManager[None]:
        """The context with the measurement's precision of matrix products."""
        return arithmetic(self.precision, self.device)

    def _flat(self, gradient: Any) -> torch.Tensor:
        """A gradient as one vector (n,), without its graph."""
        return self.space.flatten([part.detach() for part in gradient])


class _ReadPastModules(Exception):
    """A loss reads parameters or constants without the modules, so that plain stand-ins do not replace them."""


@contextlib.contextmanager
def _requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which the parameters themselves require gradients, and their hooks do not run."""
    before = [(p, p.requires_grad, p._backward_hooks) for p in parameters if not p.is_inference()]
    try:
        for parameter, _, hooks in before:
            parameter.requires_grad_(True)
            if hooks:
                parameter._backward_hooks = None
        yield
    finally:
        for parameter, flag, hooks in before:
            if hooks:
                parameter._backward_hooks = hooks
            parameter.requires_grad_(flag)


def gradient_of(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    part: Part,
    *,
    cotangents: Sequence[torch.Tensor] | None = None,
    create_graph: bool,
    retain_graph: bool | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The gradient, a tensor for each parameter; None for those that are not reached or not in part."""
    positions = range(len(parameters)) if part is None else part
    found = torch.autograd.grad(
        outputs,
        [parameters[i] for i in positions],
        cotangents,
        create_graph=create_graph,
        retain_graph=create_graph if retain_graph is None else retain_graph,
        allow_unused=True,
    )
    by_position = dict(zip(positions, found, strict=True))
    return tuple(by_position.get(i) for i in range(len(parameters)))


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """A sparse gradient as a dense tensor; others as they are."""
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


@contextlib.contextmanager
def second_derivatives_named() -> Iterator[None]:
    """Turn torch's errors about a missing second derivative into one line that names the operation."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        if "checkpoint" in text and "use_reentrant" in text:
            raise InputError(
                "the model uses reentrant checkpointing, which torch cannot differentiate twice: call "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False"
            ) from error
        if "backward through the graph a second time" in text:
            raise InputError(
                "the graph of the loss was freed before it could be differentiated: the loss function or the forward "
                "pass calls .backward() or torch.autograd.grad; let it return the loss alone, or call them with "
                "retain_graph=True or create_graph=True"
            ) from error
        if "modified by an inplace operation" in text:
            raise InputError(
                "a tensor that the derivative needs was changed in place after it was used, as by an optimizer's step "
                "in the loss function or by x += y on a tensor that is read again: compute the loss without that"
            ) from error
        for pattern in NO_SECOND_DERIVATIVE:
            if found := re.search(pattern, text, re.IGNORECASE):
                raise InputError(
                    f"the loss cannot be differentiated twice: torch has no second derivative here ({found[1]}); "
                    "replace that operation by others that compute the same, such as their plain torch form"
                ) from error
        raise
