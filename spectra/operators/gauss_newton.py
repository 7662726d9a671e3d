"""The Gauss-Newton and Fisher matrices of a model's loss as linear operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.operators.hessian.likelihoods import Categorical, generator, recognized, refused
from spectra.operators.hessian.objective import Piece
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.output_graphs import Curvature, OutputGraph, OutputGraphStore, Tensors, output_hessian
from spectra.operators.hessian.parameters import Selection

KINDS = ("empirical", "sampled", "exact")


class GaussNewtonOperator(HessianOperator):
    """G = J^T (d^2 L / dz^2) J of the mean loss L over batches, with z the model's outputs and J = dz / d theta.

    The (generalized) Gauss-Newton matrix is the part of the Hessian that the curvature of the loss in the outputs
    causes. It is positive semidefinite where the loss is convex in them (Schraudolph, Neural Computation 14, 2002). The
    rest, H - G, holds the curvature of the model: `spectra.DifferenceOperator(hessian, gauss_newton)`.

    The outputs are what a call of the model returns: a tensor, the logits of a Hugging Face output, or the tensors of a
    tuple from which the loss is computed. Batches, weights of tokens, padding and checks are those of
    `HessianOperator`. A product costs about 4/3 of a gradient.

    Args:
        model: See `HessianOperator`.
        batches: See `HessianOperator`.
        params: See `HessianOperator`.
        loss: See `HessianOperator`.
        **options: Further options of `HessianOperator`. The engine "forward" is not supported.

    Raises:
        InputError: As `HessianOperator`, and where the loss depends on the parameters in another way than through the
            outputs, as a penalty on weights does.

    Example:
        >>> import torch, spectra
        >>> model = torch.nn.Linear(3, 1)
        >>> batches = [(torch.randn(8, 3), torch.randn(8, 1))]
        >>> residual = spectra.DifferenceOperator(
        ...     spectra.HessianOperator(model, batches), spectra.GaussNewtonOperator(model, batches)
        ... )
        >>> float(residual.to_dense().abs().max()) < 1e-5  # a linear model has no curvature of its own
        True
    """

    graph_store = OutputGraphStore

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        params: Selection = None,
        loss: Callable[..., torch.Tensor] | None = None,
        **options: Any,
    ):
        if options.get("engine") == "forward":
            raise InputError("engine='forward' multiplies with Hessians only: use engine='auto'")
        super().__init__(model, batches, params, loss, **options)
        self.mode = f"{self.name}, ste" if self.mode == "ste" else self.name

    @property
    def name(self) -> str:
        """The name of the matrix, as records have it."""
        return "gauss-newton"


class FisherOperator(GaussNewtonOperator):
    """The Fisher information matrix of a model's outputs, F = sum_t s_t J_t^T E[g_t g_t^T] J_t.

    The loss is L = sum_t s_t l_t over counted terms t (tokens, or rows) of weight s_t, J_t is the Jacobian of the
    outputs of term t, and g_t = dl_t / dz_t. The kinds differ in the labels:

    * "empirical": the labels of the batches, without an expectation. At a minimum it need not resemble the Hessian
      (Kunstner, Balles and Hennig, NeurIPS 2019).
    * "sampled": labels drawn from the model's own distribution, `samples` for each term. The draws depend on the seed
      alone, and are the same in every product.
    * "exact": the expectation over that distribution. For a cross-entropy, a binary cross-entropy and a squared error
      it is the Gauss-Newton matrix (Martens, JMLR 21, 2020, section 9.2).

    Args:
        model: See `HessianOperator`.
        batches: See `HessianOperator`.
        params: See `HessianOperator`.
        loss: See `HessianOperator`. "sampled" and "exact" need a mean of cross-entropies, binary cross-entropies or
            squared errors, whoever computes it: it is recognized by its gradient. Class weights are refused.
        kind: "empirical", "sampled" or "exact".
        samples: How many labels are drawn for each term, for "sampled".
        seed: Seed of the draws.
        **options: Further options of `HessianOperator`.

    Raises:
        InputError: As `GaussNewtonOperator`, for an unknown kind, and for a loss whose distribution is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        params: Selection = None,
        loss: Callable[..., torch.Tensor] | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        seed: int = 0,
        **options: Any,
    ):
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not isinstance(samples, int) or samples < 1:
            raise InputError(f"samples must be a whole number, at least 1, got {samples!r}")
        self.kind, self.samples, self.seed = kind, samples, seed
        super().__init__(model, batches, params, loss, **options)
        graphs = self._graphs.local
        assert isinstance(graphs, OutputGraphStore)
        graphs.curvature_of = self._curvature_of

    @property
    def name(self) -> str:
        """The name of the matrix, as records have it."""
        return f"fisher, {self.kind}"

    def _curvature_of(self, graph: OutputGraph, piece: Piece, share: float) -> Curvature:
        """C of a piece: sum_t s_t g_t g_t^T for each term, or the Hessian of the loss in the outputs."""
        if len(graph.outputs) != 1:
            raise InputError(
                f"a Fisher matrix needs one tensor of outputs, the loss of {piece.name} uses {len(graph.outputs)}: "
                "use GaussNewtonOperator"
            )
        outputs, gradient = graph.outputs[0], graph.gradients[0]
        found = recognized(outputs, gradient, share)
        if self.kind == "empirical":
            axis = found.axis if isinstance(found, Categorical) else -1
            return _outer_products([gradient.detach() / share], axis, share)
        if found is None:
            raise refused(piece.name, self.kind)
        if self.kind == "exact":
            return output_hessian
        values = outputs.detach()
        draws = [found.sample(values, generator(self.seed, piece.name, draw)) for draw in range(self.samples)]
        return _outer_products(draws, found.axis, share / self.samples)


def _outer_products(gradients: list[torch.Tensor], axis: int, weight: float) -> Curvature:
    """The curvature u -> weight sum_m g_m (g_m . u), with the inner product along an axis of each term."""

    def curvature(graph: OutputGraph, moved: Tensors, batched: bool) -> Tensors:
        (vectors,) = moved
        if vectors.ndim - batched < 2:  # a number a term
            return (sum(weight * g * g for g in gradients) * vectors,)  # type: ignore[return-value]
        return (sum(weight * g * (g * vectors).sum(axis, keepdim=True) for g in gradients),)  # type: ignore[return-value]

    return curvature
