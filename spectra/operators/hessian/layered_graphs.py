"""The graphs of a rank whose part of a sharded model's loss is computed with one unit's weights at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.shards import Shards
from spectra.operators.hessian import engines
from spectra.operators.hessian.footprint import Footprint, measure_footprint
from spectra.operators.hessian.gathered_units import NotGathered, ReadElsewhere, UnitsHeldFixed, units_gathered
from spectra.operators.hessian.graphs import GraphStore, Part, gradient_of, second_derivatives_named
from spectra.operators.hessian.isolation import differentiating, random_states_kept
from spectra.operators.hessian.objective import Objective, Piece
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.operators.hessian.recompute import LAYERS, AttentionAndLossRecomputed
from spectra.operators.hessian.substitution import Substitution
from spectra.operators.hessian.unit_exchange import FOLDED, IGNORED, UnitExchange


class GatheredSubstitution(Substitution):
    """Stand-ins for the parameters of a sharded model, whose units gather their weights when they compute.

    Attributes:
        chosen: A scalar that links the units, and the chosen parameters that stay gathered.

    Args:
        model: The model.
        exchange: Where weights come from.
        loss: The loss where it is a module.
        dtype: The dtype of floating-point stand-ins, None for that of each parameter.
        moved: The size of the random numbers that are added to the weights, relative to theirs.
        held: See `units_gathered`.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: UnitExchange,
        *,
        loss: nn.Module | None,
        dtype: torch.dtype | None,
        moved: float,
        held: UnitsHeldFixed | None,
    ):
        self._model, self._loss, self.dtype, self._redirected, self._written = model, loss, dtype, False, False
        self._exchange, self._moved, self._held = exchange, moved, held
        self._link = torch.zeros((), device=exchange.device, requires_grad=True)
        self._stand_ins: dict[int, nn.Parameter] = {}
        self._originals = []
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in {id(p): p for module in self._modules() for p in module.parameters(recurse=False)}.values():
            number = exchange.number_of.get(id(parameter))
            self._originals.append(parameter)
            if number is None:  # it is not sharded, as one of a loss that is a module
                found = nn.Parameter(self._cast(parameter.detach()), requires_grad=False)
            elif number in exchange.apart:
                with self._settings():
                    (value,) = exchange.weights(number)
                found = nn.Parameter(value, requires_grad=exchange.is_chosen(parameter))
            else:
                found = NotGathered.like(parameter, names[id(parameter)], self._dtype_of(parameter))
            self._stand_ins[id(parameter)] = found
        leaves = [self._stand_ins[id(exchange.units[number].parameters[0])] for number in exchange.apart]
        self.chosen = (self._link, *(leaf for leaf in leaves if leaf.requires_grad))  # type: ignore[assignment]

    def _dtype_of(self, parameter: torch.Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and parameter.is_floating_point() else parameter.dtype

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """A context in which weights are asked for as this substitution has them."""
        exchange = self._exchange
        before = exchange.dtype, exchange.moved
        try:
            exchange.dtype, exchange.moved = self.dtype, self._moved
            yield
        finally:
            exchange.dtype, exchange.moved = before

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """See `Substitution.active`."""
        gathered = units_gathered(self._model, self._exchange, self._link, self._held)
        with super().active(), self._settings(), gathered:
            yield


class LayeredGraphStore(GraphStore):
    """A `GraphStore` of one rank of a sharded model, which holds the whole weights of one unit at a time.

    Its methods are called within `UnitExchange.run`, where the ranks serve each other. Gradients and products go to the
    exchange, which sums them over the ranks; what methods return in their place has no meaning.

    Args:
        model: See `GraphStore`.
        space: See `GraphStore`.
        objective: The loss of the batches of this rank.
        **options: See `GraphStore`.

    Attributes:
        exchange: What the ranks exchange.
        held: What units with straight-through derivatives hold fixed, in a check.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, objective: Objective, **options: Any):
        super().__init__(model, space, objective, **{**options, "policy": "auto"})
        self.shards: Shards | None = Shards.of_this_rank(space.dimension)  # type: ignore[assignment]
        self.exchange = UnitExchange(model, space, self.device)
        self.held: UnitsHeldFixed | None = None
        self._recomputed = self._least_recomputed = LAYERS
        if self.training:
            raise InputError("graph='gather layers' measures in evaluation mode, since layers are computed again")

    def prepare(self, *, thorough: bool = False) -> bool:
        """Do nothing: all ranks compute graphs together."""
        return False

    def compute(self) -> None:
        """Compute the loss, and the gradient into the sum of the exchange; keep graphs as memory allows."""
        layout = self.layout()
        if layout.objective is not self.objective:
            self.objective = layout.objective
            self.notes.append(f"memory for {max(self.objective.rows)} rows at a time")
        loss, kept = 0.0, []
        substitution: Substitution | None = None
        with random_states_kept(self.device), self.on_stream():
            for index, piece in enumerate(self.objective.pieces):
                if substitution is None:
                    value, gradient, substitution = self._build_first(piece)
                else:
                    value, gradient = self.build(piece, substitution)
                loss += value.item()
                if index < layout.kept:
                    kept.append(gradient)
        assert substitution is not None
        self.remember(substitution, loss, [], kept, torch.zeros(0))  # no piece alone has a gradient here
        for note in self.objective.batch_loss.notes:
            self.note(note)

    # -- one piece

    def substitution(self, *, dtype: torch.dtype | None = None, offset: Any = None) -> GatheredSubstitution:
        """See `GraphStore.substitution`. An offset is a size relative to the weights; others belong to the exchange."""
        return GatheredSubstitution(
            self.model,
            self.exchange,
            loss=self.objective.loss if isinstance(self.objective.loss, nn.Module) else None,
            dtype=dtype or self.copy,
            moved=offset or 0.0,
            held=self.held,
        )

    def moved_weights(self, size: float) -> Any:
        """See `GraphStore.moved_weights`."""
        return size

    def _build_first(self, piece: Piece) -> tuple[torch.Tensor, engines.Tensors, Substitution]:
        while True:
            substitution = self.substitution()
            try:
                return (*self.build(piece, substitution), substitution)
            except ReadElsewhere as error:
                name = str(error)
            self.exchange.keep_apart(name)
            self.note(f"'{name}' is read outside of its module, and stays gathered while a graph is built")

    def _differentiated(
        self, loss: torch.Tensor, parameters: engines.Tensors, piece: Piece, part: Part, *, second_order: bool
    ) -> engines.Tensors:
        found = gradient_of(loss, parameters, None, create_graph=second_order)
        for number, gradient in zip(self._apart(parameters), found[1:], strict=True):
            self.exchange.add(number, [gradient])
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))

    def _apart(self, parameters: Sequence[torch.Tensor]) -> list[int]:
        """The units of the parameters that stay gathered, in the order of `GatheredSubstitution.chosen`."""
        return [n for n in self.exchange.apart if self.exchange.chosen_of(n)][: len(parameters) - 1]

    def gradient_at(
        self, objective: Objective, *, dtype: torch.dtype | None = None, offset: Any = None
    ) -> tuple[float, torch.Tensor]:
        """The loss of this rank's pieces, and their gradient folded to a short vector with random signs."""
        loss = 0.0
        with self.exchange.gradients(FOLDED), random_states_kept(self.device), self.on_stream():
            loss = self._loss_and_gradient(objective, dtype=dtype, offset=offset)
            folded = self.exchange.folded
        return loss, torch.zeros(1, dtype=self.dtype, device=self.device) if folded is None else folded

    def loss_and_gradient(self, objective: Objective, *, dtype: torch.dtype | None = None) -> float:
        """The loss of this rank's pieces; the gradient goes to the exchange."""
        with random_states_kept(self.device), self.on_stream():
            return self._loss_and_gradient(objective, dtype=dtype)

    def _loss_and_gradient(
        self, objective: Objective, *, dtype: torch.dtype | None = None, offset: Any = None
    ) -> float:
        loss, substitution = 0.0, self.substitution(dtype=dtype, offset=offset)
        for piece in objective.pieces:
            loss += self.build(piece, substitution, second_order=False)[0].item()
        return loss

    def gradient(self) -> torch.Tensor:
        """The gradient of this rank's pieces, folded as in `gradient_at`, for the check of the gradient."""
        return self.gradient_at(self.objective)[1]

    def loss_of_the_model_itself(self) -> float:
        """The loss once more; the model's own parameters are nowhere whole."""
        return self.loss_at()

    def gradient_of_the_model_itself(self) -> tuple[float, torch.Tensor]:
        """Loss and folded gradient once more."""
        return self.gradient_at(self.objective)

    # -- products

    def _piece_products(
        self, index: int, piece: Piece, vectors: torch.Tensor, engine: str, part: Part = None
    ) -> torch.Tensor:
        state = self._state
        assert state is not None
        keep = index < len(state.kept)
        if keep:
            gradient = state.kept[index]
        else:
            with self.exchange.gradients(IGNORED):
                gradient = self.build(piece, state.substitution)[1]
        return self.through(gradient, state.substitution, vectors, keep=keep)

    def product_of_fresh_graphs(self, dtype: torch.dtype | None = None) -> None:
        """The product with the vector of the exchange through graphs that are built for it."""
        with random_states_kept(self.device), self.on_stream():
            substitution = self.substitution(dtype=dtype)
            for piece in self.objective.pieces:
                with self.exchange.gradients(IGNORED):
                    gradient = self.build(piece, substitution)[1]
                self.through(gradient, substitution, torch.zeros(1, 1), keep=False)

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
        """The product with the vector of the exchange, into its sum. Returns nothing of meaning."""
        parameters = substitution.chosen
        with (
            self._measuring(),
            substitution.active(),
            self._forward_pass(),
            differentiating(self.device),
            self._arithmetic(),
            second_derivatives_named(),
        ):
            numbers = self._apart(parameters)
            along = [torch.ones_like(gradient[0])]
            along += [self.exchange.vector(number, g.dtype)[0] for number, g in zip(numbers, gradient[1:], strict=True)]
            pairs = [(g, v) for g, v in zip(gradient, along, strict=True) if g.requires_grad]
            found = torch.autograd.grad(
                [g for g, _ in pairs], parameters, [v for _, v in pairs], retain_graph=keep, allow_unused=True
            )
            for number, product in zip(numbers, found[1:], strict=True):
                self.exchange.add(number, [product])
        return torch.zeros(1, 1)

    def check_products(self, vectors: torch.Tensor) -> None:
        """Raise a NonFiniteError. The parts of products are not known apart."""
        raise NonFiniteError("a Hessian product is not finite: check the weights, or measure with precision='float64'")

    # -- memory

    def _choices(self) -> list[str]:
        return [LAYERS]

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        with AttentionAndLossRecomputed():
            yield

    def _measured_footprint(self) -> Footprint:
        with self.exchange.gradients(IGNORED), random_states_kept(self.device), self.on_stream():
            if not self.second_order:
                return measure_footprint(self.objective, lambda piece: piece, self._build_first)  # type: ignore[arg-type]
            return measure_footprint(
                self.objective,
                lambda piece: self._build_first(piece)[1:],
                lambda built: self.through(*built, torch.zeros(1, 1), keep=True),  # type: ignore[misc]
            )

    def run_within_memory(self, run: Callable[[], Any], reduce: Callable[[], str], *, vectors: int) -> Any:
        """Call `run`. All ranks use less memory together, where one of them runs out of it."""
        return run()

    def reduce_memory(self) -> str:
        """See `GraphStore.reduce_memory`: rebuild graphs, then cut rows."""
        rows = max(self.objective.rows)
        if self.policy != "rebuild":
            self.policy, change = "rebuild", "graphs rebuilt at every product"
        elif rows > 1 and self.can_be_cut():
            self.objective, change = self.objective.halved(), f"{(rows + 1) // 2} rows at a time"
        else:
            return ""
        self.forget()
        return change
