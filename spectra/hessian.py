"""The Hessian of a model's loss as a linear operator, one reverse-over-reverse product at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from spectra import memory
from spectra.errors import InputError, NonFiniteError
from spectra.isolation import differentiating, isolated, random_states_kept, requiring_grad, unwrap
from spectra.objective import Objective, Piece
from spectra.operators import LinearOperator, Preflight
from spectra.parameters import ParameterSpace, Selection
from spectra.vectors import norm

GRAPHS = ("auto", "keep", "rebuild")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


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
    precision: "float32" or "float64" measures a copy of the model in that precision. Without it a model with bf16 or
    fp16 weights is refused: their rounding is larger than most eigenvalues.

    Weights changed in place, as optimizers do, are noticed and the graph is rebuilt; after writing through `.data`
    call `refresh()`. `close()` (or a `with` block) gives the memory of the graphs back.
    Attributes: shape (n, n), dtype, device, space, objective, products.
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
        precision: str | None = None,
    ):
        if graph not in GRAPHS:
            raise InputError(f"graph must be one of {', '.join(GRAPHS)}, got {graph!r}")
        model = _in_precision(unwrap(model), precision)
        self.model, self.training, self.graph = model, training, graph
        self.space = ParameterSpace(model, params)
        self.dtype = _one_dtype(model, self.space)
        self.device = self.space.parameters[0].device
        self.shape = (self.space.dimension, self.space.dimension)
        cast = None if precision is None else self.dtype  # a copy in another precision takes inputs in it
        self.objective = Objective(model, batches, loss, microbatch=microbatch, weight=weight, cast=cast)
        self._context = context or contextlib.nullcontext
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}
        self._loss: float | None = None
        self._gradient: torch.Tensor | None = None
        self._versions: tuple[tuple[int, int], ...] = ()

    def loss(self) -> float:
        """L at the current weights."""
        self._prepare()
        assert self._loss is not None
        return self._loss

    def gradient(self) -> torch.Tensor:
        """dL/d theta at the current weights: (n,)."""
        self._prepare()
        assert self._gradient is not None
        return self._gradient.clone()

    def preflight(self) -> Preflight:
        """Check that the loss is a deterministic function and its Hessian symmetric; four products or so.

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
        return Preflight(symmetry_gap=self.symmetry_gap(), repeatability=repeatability)

    def refresh(self) -> None:
        """Forget everything computed at earlier weights."""
        self._kept.clear()
        self._loss = self._gradient = None

    def close(self) -> None:
        """Give back the memory of the kept graphs; the operator stays usable and rebuilds them when asked."""
        self.refresh()

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        self._prepare()
        pieces = self.space.unflatten(vector)
        total = torch.zeros_like(vector)
        for index, piece in enumerate(self.objective.pieces):
            total += self._piece_product(index, piece, pieces)
        # One sum meets every NaN and infinity; only if it does is the culprit looked for.
        if not torch.isfinite(total.sum(dtype=torch.float64)):
            self._name_the_culprit(pieces)
        return total

    def _piece_product(self, index: int, piece: Piece, vector: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if index in self._kept:
            return self._differentiate(self._kept[index], vector, keep=True)
        _, gradient = self._build(piece)
        return self._differentiate(gradient, vector, keep=False)

    def _differentiate(
        self, gradient: tuple[torch.Tensor, ...], vector: tuple[torch.Tensor, ...], *, keep: bool
    ) -> torch.Tensor:
        outputs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        parameters = self.space.parameters
        if not outputs:  # a loss linear in the parameters
            return torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with requiring_grad(self.model, parameters), differentiating(self.device):
            products = torch.autograd.grad(
                [g for g, _ in outputs],
                parameters,
                [v for _, v in outputs],
                retain_graph=keep,
                materialize_grads=True,
            )
        return self.space.flatten(products)

    def _build(self, piece: Piece) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The piece's weighted loss, and its gradient with a graph that can be differentiated again."""
        parameters = self.space.parameters
        with isolated(self.model, training=self.training), requiring_grad(self.model, parameters), self._context():
            loss = self.objective.forward(piece, self.device) * piece.share
            if not loss.requires_grad:
                return loss, tuple(torch.zeros_like(p) for p in parameters)
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        return loss.detach(), gradient

    def _prepare(self) -> None:
        """Loss, gradient and the graphs worth keeping, at the current weights."""
        state = (*self.model.parameters(), *self.model.buffers())
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in state)
        if versions != self._versions:
            self.refresh()
        if self._loss is not None:
            return
        loss, total = 0.0, torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with random_states_kept(self.device):
            room = self._pieces_that_fit()
            for index, piece in enumerate(self.objective.pieces):
                value, gradient = self._build(piece)
                flat = self.space.flatten([g.detach() for g in gradient])
                self._check_finite(flat, f"the gradient of {piece.name}")
                loss += value.item()
                total += flat
                if index < room:
                    self._kept[index] = gradient
        self._loss, self._gradient, self._versions = loss, total, versions

    def _pieces_that_fit(self) -> int:
        pieces = self.objective.pieces
        if self.graph == "rebuild":
            return 0
        if self.graph == "keep" or len(pieces) == 1:  # a single graph has to fit whether it is kept or not
            return len(pieces)
        with memory.metering() as meter:
            self._build(max(pieces, key=lambda piece: piece.share))
        return int(memory.available(self.device) // 2 // max(meter.bytes, 1))

    def _check_finite(self, flat: torch.Tensor, what: str) -> None:
        bad = ~torch.isfinite(flat)
        if bad.any():
            name = self.space.name_at(int(bad.nonzero()[0]))
            raise NonFiniteError(
                f"{what} is not finite in parameter '{name}' ({int(bad.sum())} of {len(flat)} entries); "
                "check the model's weights, or measure in float64 with precision='float64'"
            )

    def _name_the_culprit(self, vector: tuple[torch.Tensor, ...]) -> None:
        for index, piece in enumerate(self.objective.pieces):
            product = self._piece_product(index, piece, vector)
            self._check_finite(product, f"the Hessian product of {piece.name}")
        raise NonFiniteError("the sum of the Hessian products over batches overflows; measure with precision='float64'")


def _in_precision(model: nn.Module, precision: str | None) -> nn.Module:
    if precision is None:
        return model
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    return copy.deepcopy(model).to(PRECISIONS[precision])


def _one_dtype(model: nn.Module, space: ParameterSpace) -> torch.dtype:
    narrow = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if narrow:
        raise InputError(
            f"the model holds {', '.join(sorted(map(str, narrow)))} weights, float32 or float64 is expected: their "
            "rounding drowns small eigenvalues; pass precision='float32' to measure a float32 copy"
        )
    chosen = {p.dtype for p in space.parameters}
    if len(chosen) > 1:
        raise InputError(
            f"the chosen parameters must share one dtype, got {', '.join(sorted(map(str, chosen)))}; "
            "pass precision='float32' or 'float64'"
        )
    return chosen.pop()
