"""The graphs of a model's outputs, through which products J^T C J v are computed without the model's second derivative.

With z the outputs on a piece of the batches, J = dz/d theta and w a vector of the shape of z, J^T w is linear in w. Its
graph is kept. J v is its derivative in w along v, so that all three factors of a product are reverse passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.backend.vectors import norm
from spectra.operators.hessian import engines
from spectra.operators.hessian.graphs import GraphStore, Part, gradient_of, second_derivatives_named
from spectra.operators.hessian.isolation import differentiating, random_states_kept
from spectra.operators.hessian.losses import outputs_of
from spectra.operators.hessian.objective import Piece
from spectra.operators.hessian.substitution import Substitution

SAME_GRADIENT = 1e-3  # relative difference of the gradient through the outputs from that of the loss

Tensors = tuple[torch.Tensor, ...]


class OutputGraph(tuple[torch.Tensor, ...]):
    """The gradient of the loss of a piece, a tensor for each parameter, with what products J^T C J v need.

    Attributes:
        outputs: z, with their graph.
        gradients: dL/dz, with the graph of the loss.
        weights: w.
        pulled: J^T w for each parameter, with its graph; None for parameters that the outputs do not depend on.
        curvature: J v -> C J v, for tensors of the shapes of z, with a leading axis for several vectors.
    """

    outputs: Tensors
    gradients: Tensors
    weights: Tensors
    pulled: tuple[torch.Tensor | None, ...]
    curvature: Curvature


# (graph, tensors of the shapes of z, whether they have a leading axis) -> tensors of the same shapes
Curvature = Callable[[OutputGraph, Tensors, bool], Tensors]
# (graph without its curvature, piece, what the weight of a term in the loss is) -> the curvature of this piece
CurvatureOf = Callable[[OutputGraph, Piece, float], Curvature]


def output_hessian(graph: OutputGraph, moved: Tensors, batched: bool) -> Tensors:
    """The Hessian of the loss in the outputs, applied to tensors of their shapes: C of the Gauss-Newton matrix."""
    pairs = [(g, v) for g, v in zip(graph.gradients, moved, strict=True) if g.requires_grad]
    if not pairs:  # a loss that is linear in the outputs
        return tuple(torch.zeros_like(v) for v in moved)
    found = torch.autograd.grad(
        [g for g, _ in pairs],
        graph.outputs,
        [v for _, v in pairs],
        retain_graph=True,
        materialize_grads=True,
        is_grads_batched=batched,
    )
    return tuple(part.expand_as(v) for part, v in zip(found, moved, strict=True))


class OutputGraphStore(GraphStore):
    """A `GraphStore` whose products are J^T C J v instead of H v.

    Attributes:
        curvature_of: Makes C for a piece; None for the Hessian of the loss in the outputs.
    """

    curvature_of: CurvatureOf | None = None
    _outputs: Sequence[torch.Tensor] = ()  # of the model, in the forward pass that is under way

    def in_float64(self, notes: list[str]) -> OutputGraphStore:
        """See `GraphStore.in_float64`."""
        store = super().in_float64(notes)
        assert isinstance(store, OutputGraphStore)
        store.curvature_of = self.curvature_of
        return store

    def build(
        self,
        piece: Piece,
        substitution: Substitution,
        *,
        second_order: bool = True,
        guarded: bool = False,
        part: Part = None,
    ) -> tuple[torch.Tensor, engines.Tensors]:
        """See `GraphStore.build`; with `second_order` the gradient is an `OutputGraph`."""
        with _captured(self.model) as self._outputs:
            try:
                return super().build(piece, substitution, second_order=second_order, guarded=guarded, part=part)
            finally:
                self._outputs = ()

    def _differentiated(
        self, loss: torch.Tensor, parameters: engines.Tensors, piece: Piece, part: Part, *, second_order: bool
    ) -> engines.Tensors:
        if not second_order:
            return super()._differentiated(loss, parameters, piece, part, second_order=False)
        gradient = self._filled(
            gradient_of(loss, parameters, part, create_graph=False, retain_graph=True), parameters, piece, part
        )
        graph = OutputGraph(gradient)
        graph.outputs, graph.gradients = _used(loss, self._outputs, piece)
        with torch.no_grad():
            graph.weights = tuple(torch.zeros_like(z).requires_grad_() for z in graph.outputs)
        graph.pulled = gradient_of(
            graph.outputs, parameters, part, cotangents=graph.weights, create_graph=True, retain_graph=True
        )
        self._check_split(graph, parameters, piece, part)
        share = 1.0 if self.objective.adds_up else piece.share / (self.objective.terms(piece.batch) or 1.0)
        graph.curvature = output_hessian if self.curvature_of is None else self.curvature_of(graph, piece, share)
        return graph

    def _check_split(self, graph: OutputGraph, parameters: engines.Tensors, piece: Piece, part: Part) -> None:
        """Refuse a loss that depends on the parameters in another way than through the outputs."""
        cotangents = tuple(g.detach() for g in graph.gradients)
        through = self._filled(
            gradient_of(graph.outputs, parameters, part, cotangents=cotangents, create_graph=False, retain_graph=True),
            parameters,
            piece,
            part,
        )
        own, found = self._flat(graph), self._flat(through)
        error = norm(found - own)
        if error > SAME_GRADIENT * max(norm(own), norm(found)):
            raise InputError(
                f"the loss of {piece.name} depends on the parameters in another way than through the model's outputs "
                f"(their gradients differ by {error / max(norm(own), norm(found)):.0%}), as a penalty on the weights "
                "does: its Gauss-Newton matrix is not defined; take the penalty out of loss="
            )

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
        """The products J^T C J v of the rows of `vectors`, in the shape of `vectors`."""
        assert isinstance(gradient, OutputGraph)
        positions = tuple(range(len(substitution.chosen))) if part is None else part
        with substitution.active(), differentiating(self.device), self._arithmetic(), second_derivatives_named():
            if batched:
                return _products(gradient, substitution.chosen, positions, vectors, batched=True)
            rows = [_products(gradient, substitution.chosen, positions, row, batched=False) for row in vectors]
            return torch.stack(rows)

    def differentiated_at(self, *, dtype: torch.dtype, offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss and J^T c at other weights, where J is that of the current ones. Its derivative is J^T C J.

        For the Gauss-Newton matrix c is dL/dz, whose derivative along v is C J v; with another C it is C z.

        Args:
            dtype: The precision.
            offset: A vector (n,) added to the chosen parameters.

        Returns:
            The loss and the vector.
        """
        loss, images, total = 0.0, [], torch.zeros(self.space.dimension, dtype=dtype, device=self.device)
        with random_states_kept(self.device), self.on_stream():
            there = self.substitution(dtype=dtype, offset=offset)
            for piece in self.objective.pieces:
                value, moved = self.build(piece, there, part=self._within)
                assert isinstance(moved, OutputGraph)
                loss += value.item()
                kept = moved.gradients if self.curvature_of is None else moved.outputs
                images.append(tuple(tensor.detach() for tensor in kept))
                del moved, kept
            here = self.substitution(dtype=dtype)
            for piece, image in zip(self.objective.pieces, images, strict=True):
                graph = self.build(piece, here, part=self._within)[1]
                assert isinstance(graph, OutputGraph)
                cotangents = image if self.curvature_of is None else graph.curvature(graph, image, False)
                pulled = gradient_of(
                    graph.outputs, here.chosen, self._within, cotangents=cotangents, create_graph=False
                )
                filled = zip(pulled, here.chosen, strict=True)
                total += self._flat([torch.zeros_like(p) if g is None else g for g, p in filled])
        return self._over_ranks(loss, total)


def _products(
    graph: OutputGraph, parameters: Tensors, positions: Sequence[int], vectors: torch.Tensor, *, batched: bool
) -> torch.Tensor:
    """J^T C J v for one vector (n,), or for the rows of (k, n)."""
    leading = vectors.shape[:-1]
    chosen = [parameters[i] for i in positions]
    parts = vectors.split([p.numel() for p in chosen], dim=-1)
    pairs = [
        (graph.pulled[i], part.reshape(*leading, *p.shape))
        for i, part, p in zip(positions, parts, chosen, strict=True)
        if graph.pulled[i] is not None
    ]
    if not pairs:
        return torch.zeros_like(vectors)
    moved = torch.autograd.grad(
        [pulled for pulled, _ in pairs],  # type: ignore[misc]
        graph.weights,
        [v for _, v in pairs],
        retain_graph=True,
        materialize_grads=True,
        is_grads_batched=batched,
    )
    moved = tuple(m.expand(*leading, *z.shape) for m, z in zip(moved, graph.outputs, strict=True))
    found = torch.autograd.grad(
        graph.outputs,
        chosen,
        graph.curvature(graph, moved, batched),
        retain_graph=True,
        materialize_grads=True,
        is_grads_batched=batched,
    )
    return torch.cat(
        [f.expand(*leading, *p.shape).reshape(*leading, -1) for f, p in zip(found, chosen, strict=True)], -1
    )


@contextlib.contextmanager
def _captured(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A context that lists the outputs of the model's forward passes inside it."""
    found: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda module, arguments, output: found.extend(outputs_of(output)))
    try:
        yield found
    finally:
        handle.remove()


def _used(loss: torch.Tensor, outputs: Sequence[torch.Tensor], piece: Piece) -> tuple[Tensors, Tensors]:
    """The outputs that a loss is computed from, and its gradient in them with its graph."""
    outputs = list({id(z): z for z in outputs}.values())
    found = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True) if outputs else ()
    used = [(z, g) for z, g in zip(outputs, found, strict=True) if g is not None]
    if not used:
        raise InputError(
            f"the loss of {piece.name} is not computed from outputs that a call of the model returns (a model that "
            "returns nothing but its loss has none): give loss=lambda outputs, targets: ..., or let the model return "
            "its outputs too"
        )
    tensors = tuple(z for z, _ in used)
    for i, z in enumerate(tensors):
        others = [other for j, other in enumerate(tensors) if j != i]
        if others and any(
            g is not None
            for g in torch.autograd.grad(z, others, torch.zeros_like(z), retain_graph=True, allow_unused=True)
        ):
            raise InputError(
                f"one output of the model is computed from another one that the loss of {piece.name} uses too, so "
                "where the outputs end and the loss begins cannot be told: let loss= use one of them"
            )
    return tensors, tuple(g for _, g in used)
