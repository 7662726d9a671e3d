"""The Hessian of a model's loss as a linear operator."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.errors import InputError
from spectra.backend.random_vectors import gaussian
from spectra.backend.vectors import norm
from spectra.operators.base import GAP_TO_ROUNDING, UNITS_OF_ROUNDING, Block, LinearOperator, Preflight
from spectra.operators.hessian import checks, pieces
from spectra.operators.hessian.differences import Difference, choose_difference
from spectra.operators.hessian.engines import DIFFERENCES
from spectra.operators.hessian.footprint import Footprint
from spectra.operators.hessian.graphs import GraphLayout, GraphStore, Part
from spectra.operators.hessian.isolation import check_is_model, note_of_scaled_gradients, unwrap
from spectra.operators.hessian.layered_graphs import LayeredGraphStore
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.parameters import ParameterSpace, Selection
from spectra.operators.hessian.pick import EnginePick
from spectra.operators.hessian.precision import LOWER, dtype_of_copy, dtype_of_vectors, note_of_copy
from spectra.operators.hessian.sharded_graphs import ShardedGraphStore, part_of_this_rank
from spectra.operators.hessian.sharded_layers import ShardedLayersStore, choose_store
from spectra.operators.hessian.sharded_weights import is_sharded
from spectra.operators.hessian.symmetry import check_steps, check_straight_through, check_symmetry


@dataclass
class _BlockState:
    """What is known of a diagonal block.

    Attributes:
        engine: Multiplies through the graphs of the whole.
        checked: Whether its products have been compared with differences of the gradient.
        product_rounding: The part of the relative error of a product that this showed to be rounding error.
        rounding: How far rounding error may move an eigenvalue at the current weights; None if not measured yet.
    """

    engine: EnginePick
    checked: bool = False
    product_rounding: float = 0.0
    rounding: float | None = None


class HessianOperator(LinearOperator):
    """H = d^2 L / d theta^2 of the mean loss L over batches, in the chosen parameters theta.

    A Hessian-vector product (HVP) is the gradient of g . v, where g = dL/d theta (Pearlmutter, Neural Computation 6,
    1994). The graph of g is kept from one product to the next, so that a compute-bound product costs about two
    gradients.

    The model is left as it was, bit for bit. It runs in evaluation mode unless `training`, with attention kernels that
    can be differentiated twice. The graphs are built again if weights changed in place, as optimizers change them, or
    if parameters were replaced. One change is not detected: on a GPU, a write through `.data` between the products of
    one algorithm. Call `refresh()` after it. `close()`, or a `with` block, frees the memory of the graphs.

    A model that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded over all ranks is measured as it is. Every
    rank is given its own batches, or all the same ones, and L is the mean over what all ranks count. Each rank holds
    n / ranks numbers of every vector: `op @ v` takes and gives this rank's part, `op.shards.take(whole)` and
    `op.shards.gather(part)` go from whole vectors to parts and back. Weights are gathered once for as long as graphs
    are kept. All ranks make the same calls. See docs/scale.md.

    Before the first product the operator checks its assumptions on the model itself (see
    `spectra.operators.hessian.checks`). This costs about five products.

    Args:
        model: Any module. A Hugging Face model is called with the batch and gives its own loss.
        batches: See `spectra.Objective`.
        params: Which parameters, see `spectra.ParameterSpace`; by default all trainable ones.
        loss: See `spectra.Objective`.
        microbatch: Number of rows at a time, see `spectra.Objective`.
        weight: batch -> its weight, see `spectra.Objective`.
        training: Whether to measure in training mode.
        context: Returns a context manager, which is entered around every forward pass.
        graph: "keep" the graph of every microbatch; "recompute" attention and cross-entropy in each product, whose
            graphs are the largest for long sequences and vocabularies; "recompute layers", which keeps the inputs of
            layers alone (three gradients a product instead of two); "rebuild" whole graphs in each product (three
            gradients too, and the memory of one microbatch); "gather layers", for a sharded model, which keeps the
            inputs of layers too, and gathers the weights of one layer at a time; or "auto": the first of these that
            fits in memory.
        engine: How several vectors at once are multiplied, see `spectra.operators.hessian.engines`. "auto" times the
            engines that may be fast at the first block of vectors, and keeps the fastest. All engines give the same
            numbers up to rounding error. "differences" takes differences of the gradient instead, for a model that
            torch cannot differentiate twice or whose graphs do not fit. Their error is measured with several step
            sizes, noted, and part of every interval. They are refused where it cannot be stated.
        precision: "float32" or "float64" measures the weights in that precision. Without it a model with bfloat16 or
            float16 weights is refused, as their rounding is larger than most eigenvalues. "tf32" and "bfloat16" compute
            matrix products in that precision. The error of these products is measured, noted, and part of every
            interval.
        spread: "batches" gives each rank of torch.distributed a part of the batches, or of the microbatches if
            `microbatch` is given. Loss, gradient and products are summed over the ranks. All ranks have to make the
            same calls.
        strict: Whether a failed check raises. If not, `unverified` holds the reason, and every estimate from this
            operator is unresolved.

    Attributes:
        shape: (n, n).
        space: the chosen parameters.
        products: HVPs so far.
        shards: which part of every vector this rank holds, for a sharded model; else None.
        mode: which Hessian: "full", "ste" for a model with straight-through derivatives, "" where `context` says it.
        training: whether the model is measured in training mode.
        notes: what a reader of the numbers should know of how they were computed.
        checks: the figures of the checks by name, empty before the first product.

    Raises:
        InputError: If the model, the batches or an option cannot be used, or a check fails.
        NonFiniteError: For NaN or infinity. The message names the batch and the parameter.
    """

    graph_store: type[GraphStore] = GraphStore

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
        strict: bool = True,
    ):
        check_is_model(model)
        if context is not None and not callable(context):
            raise InputError(f"context= must be a function that returns a context, got {type(context).__name__}")
        self.model, self.precision, self.strict, self.training = unwrap(model), precision, strict, training
        self.mode = "" if context is not None else checks.hessian_mode(self.model)
        space = ParameterSpace(self.model, params)
        copy_dtype = dtype_of_copy(self.model, precision)
        self.dtype = dtype_of_vectors(self.model, space, copy_dtype)
        self.device = space.parameters[0].device
        self.shape = (space.dimension, space.dimension)
        self.notes = [*note_of_copy(space, self.dtype), *note_of_scaled_gradients(self.model)]
        self.checks: dict[str, float] = {}
        self.spread = ranks.check_spread(spread, ("none", "batches"))
        sharded = is_sharded(self.model)

        def given() -> Objective:
            return Objective(self.model, batches, loss, microbatch=microbatch, weight=weight)

        if sharded:
            objective = part_of_this_rank(ranks.together(given, self.device), spread)
        else:
            objective = given() if spread == "none" else given().of_this_rank()
        kind = self.graph_store
        if sharded:
            kind = choose_store(kind, graph, space, self.dtype.itemsize, training=training)
        graphs = kind(
            self.model,
            space,
            objective,
            dtype=self.dtype,
            copy=copy_dtype,
            precision=precision,
            training=training,
            context=context or contextlib.nullcontext,
            policy=graph,
            over_ranks=spread == "batches" and not sharded,
            notes=self.notes,
        )
        self._graphs: GraphStore = graphs
        if isinstance(graphs, LayeredGraphStore):
            self._graphs = ShardedLayersStore(graphs)
            self.notes.append("weights gathered one layer at a time")
        elif sharded:
            self._graphs = ShardedGraphStore(graphs)
        self._connect(engine)
        self._verified_for: tuple[int, ...] = ()  # the parameters, by id
        self._product_rounding = 0.0
        self._linearity_gap: float | None = None
        self._precision_error: float | None = None
        self._difference: Difference | None = None  # the step of engine="differences" at the current weights
        self._trusted = False  # whether the checks were made by another operator

    def _connect(self, engine: str) -> None:
        """Let the graphs of this process and an engine use each other."""
        graphs = self._graphs.local
        self.shards = self._graphs.shards
        self.spread = self.spread if self.shards is None else "batches"
        graphs.can_be_cut = functools.cache(lambda: pieces.may_be_cut(graphs))
        self._takes_differences = engine == DIFFERENCES
        if self._takes_differences:
            self._check_differences_allowed()
            graphs.second_order, engine = False, "reverse"
        if isinstance(graphs, LayeredGraphStore):
            if engine not in ("auto", "reverse"):
                raise InputError(f"engine={engine!r} needs whole weights: with graph='gather layers' use engine='auto'")
            engine = "reverse"
        self._engine = EnginePick(graphs, engine)
        graphs.when_out_of_memory = self._engine.reduce_memory
        self._blocks: dict[Part, _BlockState] = {}
        self._block_in_use: Part = None

    def in_float64(self) -> HessianOperator | None:
        """The Hessian of a float64 copy of the weights, at the same batches and with the same options.

        The copy relies on the checks of this operator. The two hold graphs of their own: close this one to free its.

        Returns:
            The operator, or None if the precision was chosen by the caller or is float64 already.
        """
        if self.precision is not None or self.dtype == torch.float64:
            return None
        self._prepare(thorough=True)
        precise = copy.copy(self)
        precise.precision, precise.dtype, precise.products = "float64", torch.float64, 0
        precise.notes = [*self.notes, *note_of_copy(self.space, torch.float64)]
        precise._graphs = self._graphs.in_float64(precise.notes)
        precise._connect(DIFFERENCES if self._takes_differences else self._engine.engine)
        precise._linearity_gap = precise._precision_error = precise._difference = None
        precise.trust(self.checks)
        return precise

    # -- the loss

    @property
    def space(self) -> ParameterSpace:
        """The chosen parameters."""
        return self._graphs.space

    @property
    def objective(self) -> Objective:
        """The loss, in the pieces that are computed one after another."""
        return self._graphs.objective

    @property
    def engine_used(self) -> str:
        """The engine that multiplied last, "" before the first product."""
        return DIFFERENCES if self._takes_differences else self._engine.used

    def loss(self) -> float:
        """L at the current weights."""
        self._prepare(thorough=True)
        return self._graphs.loss()

    def loss_at(self, offset: torch.Tensor) -> float:
        """L at theta + offset. The weights stay as they are: stand-ins take their place in the forward passes.

        Args:
            offset: (n,) what is added to the chosen parameters.

        Returns:
            The loss on all batches.

        Raises:
            InputError: For another shape.
        """
        if offset.shape != (self.entries,):
            raise InputError(f"an offset ({self.entries},) is expected, got {tuple(offset.shape)}")
        self._prepare(thorough=True)
        return self._graphs.loss_at(offset=offset.detach().to(device=self.device, dtype=self.dtype))

    def gradient(self) -> torch.Tensor:
        """dL/d theta at the current weights, (n,)."""
        self._prepare(thorough=True)
        return self._graphs.gradient()

    # -- products

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        self._prepare()
        return self._products(vectors)

    def _products(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._takes_differences:
            difference = self._chosen_difference()
            return torch.stack([difference.product(self._graphs, vector) for vector in vectors])
        return self._graphs.products_over_ranks(self._engine.multiply, vectors)

    def _check_differences_allowed(self) -> None:
        """Refuse what differences of the gradient cannot measure."""
        if self.mode == "ste":
            raise InputError(
                "engine='differences' does not see the straight-through derivatives of a quantized model: use "
                "engine='auto'"
            )
        if self.graph_store is not GraphStore or self.precision in LOWER:
            raise InputError(
                "engine='differences' is for the Hessian in float32 or float64: use engine='auto' for other operators "
                f"and precisions, got {type(self).__name__} and precision={self.precision!r}"
            )

    def _chosen_difference(self) -> Difference:
        """The difference of the gradient that products are, chosen once at the current weights."""
        if self._difference is None:
            start = gaussian(self, seed=0, index=0, stream="linearity")
            self._difference = choose_difference(self._graphs, start)
            self.notes.append(
                f"products are differences of the gradient, {self._difference.error:.1e} off at a step of "
                f"{self._difference.step:.1e}"
            )
        return self._difference

    def _multiply_block_rows(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        self._prepare()
        return self._block_products(vectors, block)

    def _block_products(self, vectors: torch.Tensor, block: Block) -> torch.Tensor:
        """The products of a block, differentiated in its parameters alone. Captured products are kept for one block."""
        if self._block_in_use not in (None, block.positions):
            self._blocks[self._block_in_use].engine.forget()
        self._block_in_use = block.positions
        return self._graphs.products_over_ranks(self._state_of(block).engine.multiply, vectors)

    def _state_of(self, block: Block) -> _BlockState:
        part = block.positions
        if part not in self._blocks:
            self._blocks[part] = _BlockState(EnginePick(self._graphs, self._engine.engine, part))
        return self._blocks[part]

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the NonFiniteError that names the batch and the parameter where a product is not finite."""
        self._graphs.raise_non_finite(vectors)

    def multiply_rows_checked(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `LinearOperator.multiply_rows_checked`; here changes of the weights are detected on a GPU too."""
        self._prepare(thorough=True)
        return super().multiply_rows_checked(vectors)

    def _prepare(self, *, thorough: bool = False) -> None:
        """Build the graphs at the current weights, and run the checks if these parameters have not been checked."""
        if self._graphs.prepare(thorough=thorough):
            self._forget_products()
        if self._verified_for != tuple(map(id, self.space.parameters)):
            self._verified_for = tuple(map(id, self.space.parameters))
            self._blocks.clear()
            self._block_in_use = None
            self._verify()

    def refresh(self) -> None:
        """Forget everything computed at earlier weights."""
        self._graphs.forget()
        self._forget_products()

    def _forget_products(self) -> None:
        """Forget what belongs to products at earlier weights."""
        self._engine.forget()
        self._linearity_gap = self._precision_error = self._difference = None
        for state in self._blocks.values():
            state.engine.forget()
            state.rounding = None

    def close(self) -> None:
        """Free the memory of the kept graphs. The operator stays usable, and builds them again at the next product."""
        self.refresh()

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what can be relied on

    def trust(self, figures: dict[str, float]) -> None:
        """Use the check figures of another operator of the same model, loss and batches instead of checking again."""
        self.checks = dict(figures)
        self._verified_for = tuple(map(id, self.space.parameters))
        self._trusted = True

    def _verify(self) -> None:
        """Run the checks. A failed check raises, or with strict=False becomes the reason in `unverified`."""
        try:
            with self._graphs.in_full_precision():
                self._check_pieces()
            self.checks["gradient_error"] = self._graphs.on_this_rank(checks.check_gradient)
            self._graphs.in_which_weights_move(checks.check_unused)
            self._check_products()
        except InputError as error:
            if self.strict:
                self._verified_for = ()
                raise
            self._not_verified(error)

    def _not_verified(self, error: InputError) -> None:
        """Note a check that failed where strict=False was asked for."""
        self.unverified = str(error)
        self.notes.append(f"a check failed and strict=False was asked for: {error}")

    def _check_pieces(self) -> None:
        objective, error, note = self._graphs.on_this_rank(pieces.settle_shares)
        self.checks["pieces_error"] = error
        if note:
            self.notes.append(note)
        if self._graphs.adopt(objective, note):
            self.refresh()

    def _check_products(self) -> None:
        """Measure symmetry and linearity from three products, and compare products and gradient with differences."""
        if self._takes_differences:
            self.checks["product_error"] = self._chosen_difference().error
            self.checks["slope_error"] = self._chosen_difference().slope_error
            u, v = (gaussian(self, seed=0, index=i, stream="linearity") for i in (0, 1))
            self.checks["symmetry_gap"] = self.asymmetry(u, v, *self._products(torch.stack([u, v])))
            return
        symmetry, self._linearity_gap, found = self._compare_products(self._products, None)
        self.checks["symmetry_gap"], self.checks["linearity_gap"] = symmetry, self._linearity_gap
        self._product_rounding = found.rounding
        self.checks["product_error"], self.checks["slope_error"] = found.product, found.slope

    def _compare_products(
        self, multiply: Callable[[torch.Tensor], torch.Tensor], block: Block | None
    ) -> tuple[float, float, checks.DerivativeErrors]:
        """The symmetry gap, the linearity gap, and the comparison with differences, of the whole or of a block."""
        u = gaussian(self, seed=0, index=0, stream="linearity")
        v = gaussian(self, seed=0, index=1, stream="linearity")
        if block is not None:
            u, v = (block.embed(block.take(vector), len(vector)) for vector in (u, v))
        au, av, both = (multiply(vector[None])[0] for vector in (u, v, u + v))
        if not all(math.isfinite(norm(product, over=self.shards)) for product in (au, av)):
            self.raise_non_finite(torch.stack([u, v]))
        symmetry, size = self.asymmetry(u, v, au, av), norm(both, over=self.shards)
        linearity = norm(both - au - av, over=self.shards) / size if size > 0 else 0.0
        with self._graphs.within(None if block is None else block.positions):
            rounding = max(linearity, self._lower_precision_error(u, au))
            del v, av, both
            found = checks.check_derivatives(self._graphs, u, au, rounding)
            check_symmetry(symmetry, max(rounding, found.rounding), self.shape[0] if block is None else block.dimension)
            if math.isnan(found.product) and self._graphs.shards is None:
                check_straight_through(self._graphs.local)
            if block is None:
                check_steps(self._graphs.local, au)
            return symmetry, linearity, found

    # -- what can be relied on in a block

    def block_rounding(self, block: Block) -> float | None:
        """See `LinearOperator.block_rounding`. The products of the block are checked first, as those of the whole are.

        The check of the whole does not see a wrong derivative in a block of small curvature. That of a block costs
        three products of the block and two gradients in it.

        Args:
            block: The coordinates b.

        Returns:
            The error, measured at the current weights.

        Raises:
            InputError: If the check fails, unless strict=False.
        """
        if self._takes_differences:
            raise InputError(
                "blocks= is not supported with engine='differences': measure the parameters of a block alone, with "
                "params="
            )
        self._prepare(thorough=True)
        state, n = self._state_of(block), self.shape[0]
        if not (state.checked or self._trusted):
            try:
                _, linearity, found = self._compare_products(
                    lambda vectors: block.embed(self._block_products(block.take(vectors), block), n), block
                )
                state.product_rounding = found.rounding
                state.rounding = self._block_error(block, linearity)
            except InputError as error:
                if self.strict:
                    raise InputError(f"block '{block.name}': {error}") from error
                self._not_verified(error)
            state.checked = True
        if state.rounding is None:
            u, v = (block.take(gaussian(self, seed=0, index=i, stream="linearity"))[None] for i in (0, 1))
            both = self.multiply_block_rows(u + v, block)
            gap = both - self.multiply_block_rows(u, block) - self.multiply_block_rows(v, block)
            state.rounding = self._block_error(block, norm(gap[0]) / norm(both[0]) if both.any() else 0.0)
        return state.rounding

    def _block_error(self, block: Block, linearity: float) -> float:
        """The bound on the error of an eigenvalue of a block, from the errors of its products."""
        errors = [linearity, self._state_of(block).product_rounding]
        if self.precision in LOWER:
            u = block.embed(block.take(gaussian(self, seed=0, index=0, stream="precision")), self.shape[0])
            product = block.embed(self.multiply_block_rows(block.take(u)[None], block)[0], self.shape[0])
            with self._graphs.within(block.positions):
                errors.append(self._lower_precision_error(u, product))
        return max(UNITS_OF_ROUNDING * torch.finfo(self.dtype).eps, GAP_TO_ROUNDING * max(errors))

    def preflight(self) -> Preflight:
        """Run the checks if they have not been run, and return their figures.

        Returns:
            The figures.

        Raises:
            InputError: If a check fails.
        """
        self._prepare(thorough=True)
        figures = self.checks
        return Preflight(
            figures.get("symmetry_gap", math.nan),
            self.linearity_gap(),
            figures.get("gradient_error", math.nan),
            self.precision_error(),
        )

    def linearity_gap(self, *, seed: int = 0) -> float:
        """See `LinearOperator.linearity_gap`; measured once at the current weights."""
        self._prepare(thorough=True)
        if self._linearity_gap is None:
            self._linearity_gap = super().linearity_gap(seed=seed)
        return self._linearity_gap

    def precision_error(self) -> float:
        """The relative error of a product in "tf32" or "bfloat16": ||(A - A') u|| / ||A' u||, A' the float32 operator.

        It is measured once at the current weights, for a random u; 0 in other precisions. With engine="differences" it
        is the measured error of those.
        """
        if self._takes_differences:
            self._prepare()
            return self._chosen_difference().error
        if self.precision not in LOWER:
            return 0.0
        self._prepare()
        if self._precision_error is None:
            u = gaussian(self, seed=0, index=0, stream="precision")
            self._precision_error = self._lower_precision_error(u, self.multiply_rows(u[None])[0])
            self.notes.append(f"products in {self.precision}, {self._precision_error:.1e} off those in float32")
        return self._precision_error

    def _lower_precision_error(self, vector: torch.Tensor, product: torch.Tensor) -> float:
        if self.precision not in LOWER:
            return 0.0
        higher = self._graphs.higher_precision_product(vector)
        size = norm(higher, over=self.shards)
        return norm(product - higher, over=self.shards) / size if size > 0 else 0.0

    def rounding(self) -> float:
        """See `LinearOperator.rounding`; the error of products in a lower precision is part of it."""
        return max(super().rounding(), GAP_TO_ROUNDING * max(self.precision_error(), self._product_rounding))

    # -- memory

    def reserve(self, vectors: int) -> None:
        """See `LinearOperator.reserve`: under graph="auto", graphs leave the memory of these vectors free."""
        if self._graphs.reserve(vectors):
            self._forget_products()
            self._engine.pick_again()

    def product_bytes(self) -> int | None:
        """See `LinearOperator.product_bytes`; known where the memory of a few rows was measured."""
        return self._graphs.product_bytes()

    def footprint(self, recomputed: str | None = None) -> Footprint:
        """The memory of a microbatch, measured once on a few rows.

        Args:
            recomputed: What every product computes again, see `GraphLayout`; None for what it computes again now.

        Returns:
            The `Footprint`.
        """
        return self._graphs.footprint(recomputed)

    def graph_layout(self, *, reserved: int | None = None) -> GraphLayout:
        """How graphs would be kept in the memory that is free now. Asking changes nothing.

        Args:
            reserved: How many vectors (n,) an algorithm will hold beside them; None for what `reserve` was told.

        Returns:
            The `GraphLayout`.
        """
        return self._graphs.layout(reserved=reserved)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the whole weights that this rank gathers from the others; 0 where the model is not sharded."""
        return self._graphs.gathered_bytes

    def exchanged_bytes(self, vectors: int) -> int:
        """Bytes of the whole vectors that a product of so many sharded ones gathers; 0 where they are not sharded."""
        return self._graphs.exchanged_bytes(vectors)
