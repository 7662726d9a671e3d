"""PyHessian's class and the two functions of its tutorial, on this engine.

A script changes its import, and nothing else:

    from spectra.integrations.pyhessian import get_esd_plot, hessian, normalization
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from spectra.algorithms.slq import slq
from spectra.algorithms.topk import Eigenpairs, topk
from spectra.algorithms.trace import hutchinson_samples
from spectra.backend.errors import InputError
from spectra.backend.extras import need
from spectra.estimates.curves import kernel_widths, smoothed_density
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.operators.hessian.operator import HessianOperator

MOST_SEED = 2**62


class hessian:
    """PyHessian's `hessian`, with its arguments, its methods and the shapes of its results, on this engine.

    PyHessian is that of Yao, Gholami, Keutzer and Mahoney (arXiv 1912.07145); the calls are those of version 0.1. What
    it lacks is kept beside the result of each call: residuals in `last_eigenpairs`, intervals in `last_trace` and
    `last_density`.

    What differs, because it is a fault there:

    * Nothing is left in the model: neither evaluation mode, which PyHessian sets and keeps, nor gradients, whose graph
      it leaves in `.grad`. There a second object made with `data` adds its gradient to the first's, and its products
      are twice too large. The loss is still measured in evaluation mode.
    * Several batches count by their targets, as the loss over all of them would; PyHessian counts rows. The loader is
      read once, so every product sees the same batches, also with shuffling and augmentation.
    * `trace` has an interval that decides when to stop. PyHessian stops where its running mean moves little from one
      sample to the next, and at the next sample where that mean is negative.
    * `eigenvalues` come from a Krylov space, with residuals, instead of power iteration, and a warning says which have
      not converged. Two eigenvalues of the same magnitude and opposite signs do not mislead it.
    * `density` works with today's torch, from which the function that PyHessian calls, torch.eig, is gone. Nodes are in
      ascending order; PyHessian's are in none.
    * A change of the weights is noticed. PyHessian, with `data`, keeps the graph of when it was made.

    Random vectors follow from `torch.manual_seed`, and another call draws others, as with PyHessian. They are uniform
    on the unit sphere instead of random signs, so that intervals hold whatever the eigenvectors are.

    Args:
        model: The model. All parameters that require a gradient are measured.
        criterion: (outputs, targets) -> the mean loss of a batch.
        data: One batch, (inputs, targets).
        dataloader: An iterable of such batches, instead of `data`.
        cuda: Whether a GPU is expected. The loss is computed where the model is, and batches go there; a warning says
            so where that is not what was asked for.

    Attributes:
        model: The model.
        criterion: The loss function.
        data: `data` or `dataloader`.
        full_dataset: Whether a loader was given.
        device: The type of the device that the model is on, "cpu" or "cuda".
        params: The parameters that are measured, in the order of the parts of every vector.
        operator: The Hessian, for `spectra.topk`, `spectra.trace`, `spectra.slq` and `spectra.resolve`.
        last_eigenpairs: The pairs that `eigenvalues` found last, with residuals; None before.
        last_trace: The trace that `trace` found last, with its interval; None before.
        last_density: The density that `density` found last; its shares, sums and ends have intervals. None before.

    Raises:
        InputError: If not exactly one of `data` and `dataloader` is given, or the model, the loss or a batch cannot be
            used.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., torch.Tensor],
        data: Any = None,
        dataloader: Any = None,
        cuda: bool = True,
    ):
        if (data is None) == (dataloader is None):
            given = "neither" if data is None else "both"
            raise InputError(f"data=(inputs, targets) or dataloader= is expected, got {given}: give one of them")
        if criterion is None:
            raise InputError("criterion must be a function of (outputs, targets), got None: give the loss function")
        self.model, self.criterion = model, criterion
        self.full_dataset = data is None
        self.data: Any = dataloader if data is None else data
        if data is not None and not isinstance(data, tuple | list):
            raise InputError(
                f"data= is one batch, (inputs, targets), got a {type(data).__name__}: give a loader as dataloader=, "
                "and batches of another form to spectra.HessianOperator"
            )
        batches = dataloader if data is None else [tuple(data)]
        self.operator = HessianOperator(model, batches, loss=criterion)
        self.device = self.operator.device.type
        self.params = list(self.operator.space.parameters)
        self.last_eigenpairs: Eigenpairs | None = None
        self.last_trace: Estimate | None = None
        self.last_density: SpectralDensity | None = None
        _say_where(self.device, cuda)

    @property
    def gradsH(self) -> list[torch.Tensor]:
        """The gradient, a tensor for each parameter. Unlike PyHessian's it holds no graph to differentiate."""
        return list(self.operator.space.unflatten(self.operator.gradient()))

    def dataloader_hv_product(self, v: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """A Hessian-vector product, whether a loader was given or a batch.

        Args:
            v: A tensor for each parameter.

        Returns:
            v . H v, and H v as a list of tensors like the parameters.
        """
        vector = self.operator.space.flatten(list(v))
        product = self.operator @ vector
        return float(vector.double() @ product.double()), list(self.operator.space.unflatten(product))

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[torch.Tensor]]]:
        """The eigenvalues of largest magnitude, and their eigenvectors, from `spectra.topk`.

        Args:
            maxIter: The largest number of Hessian-vector products for each eigenvalue.
            tol: A pair has converged when ||H x - lambda x|| <= tol |lambda|. Its eigenvalue is then about tol^2 off.
            top_n: How many.

        Returns:
            The eigenvalues, a float each, the largest magnitude first; and for each its eigenvector, a list of tensors
            like the parameters, of norm 1 together.

        Raises:
            InputError: If a number is out of its range.
        """
        _at_least_one(maxIter=maxIter, top_n=top_n)
        pairs = topk(self.operator, top_n, tol=tol, seed=_seed(), max_products=maxIter * top_n)
        self.last_eigenpairs = pairs
        if not pairs.converged.all():
            warnings.warn(
                f"{int((~pairs.converged).sum())} of {top_n} eigenvalues did not converge in {pairs.products} products "
                f"(residuals up to {pairs.residuals.max():.1e}): raise maxIter or tol",
                stacklevel=2,
            )
        order = np.argsort(-np.abs(pairs.values), kind="stable")
        unflatten = self.operator.space.unflatten
        vectors = [list(unflatten(pairs.vectors[:, int(i)].contiguous())) for i in order]
        return [float(pairs.values[i]) for i in order], vectors

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Samples of the trace, whose mean is Hutchinson's estimate.

        Args:
            maxIter: How many samples at most, a Hessian-vector product each. With as many as parameters or more there
                is one sample: the exact trace.
            tol: End earlier, at 10, 20, 40, ... samples, where the half-width of the 95 % interval of the mean is at
                most tol |mean|.

        Returns:
            The samples. `last_trace` has their mean with its interval.

        Raises:
            InputError: If `maxIter` is below 1.
        """
        _at_least_one(maxIter=maxIter)
        samples, self.last_trace = hutchinson_samples(self.operator, probes=maxIter, seed=_seed(), tol=tol)
        return samples.tolist()

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[np.floating]], list[list[np.floating]]]:
        """The nodes and weights of stochastic Lanczos quadrature, from `spectra.slq`.

        Args:
            iter: Lanczos steps. With as many as parameters or more, the nodes are the eigenvalues themselves.
            n_v: Random vectors.

        Returns:
            The nodes of each random vector, and their weights: two lists of `n_v` lists of `iter` NumPy numbers, the
            nodes ascending and the weights adding up to 1. A recurrence that ended early repeats its last node with
            weight 0.

        Raises:
            InputError: If a number is below 1.
        """
        _at_least_one(iter=iter, n_v=n_v)
        density = slq(self.operator, probes=n_v, steps=iter, seed=_seed())
        self.last_density = density
        return [list(row) for row in density.nodes], [list(row) for row in density.weights]


def normalization(v: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a vector, scaled to norm 1 together; zeros stay zeros. That of `pyhessian.utils`.

    Args:
        v: A tensor for each parameter.

    Returns:
        As many tensors.
    """
    size = sum(float(part.detach().double().square().sum()) for part in v) ** 0.5
    return [part / (size or 1.0) for part in v]


def get_esd_plot(eigenvalues: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> Any:
    """Draw what `density` returned, on a logarithmic axis. That of density_plot.py in PyHessian's repository.

    Each node is a Gaussian as wide as half the distance between its neighbours, which is what the recurrence resolves;
    PyHessian's all have the variance 1e-5 times the width of the spectrum. `spectra.plots.density(comp.last_density)`
    draws more: intervals and what is not resolved.

    Args:
        eigenvalues: (n_v, iter) nodes.
        weights: (n_v, iter) their weights.

    Returns:
        The Axes. Nothing is saved; PyHessian's saves example.pdf.

    Raises:
        InputError: If the two differ in shape.
    """
    need("matplotlib")
    from matplotlib import pyplot

    nodes, masses = np.array(eigenvalues, dtype=float), np.array(weights, dtype=float)
    if nodes.ndim != 2 or nodes.shape != masses.shape:
        raise InputError(
            f"two lists of n_v lists are expected, as density() returns, got {nodes.shape}, {masses.shape}"
        )
    order = np.argsort(nodes, axis=1)
    nodes, masses = (np.take_along_axis(values, order, axis=1) for values in (nodes, masses))
    widths = kernel_widths(nodes)
    grid = np.linspace((nodes - 4 * widths).min(), (nodes + 4 * widths).max(), 4096)
    figure, axes = pyplot.subplots()
    axes.semilogy(grid, smoothed_density(nodes, masses, widths, grid) + 1e-7)
    axes.set(xlabel="eigenvalue", ylabel="density (log scale)")
    figure.tight_layout()
    return axes


def _seed() -> int:
    """A seed from torch's random state, which goes on, so that another call draws other vectors."""
    return int(torch.randint(MOST_SEED, ()))


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")


def _say_where(device: str, cuda: bool) -> None:
    """Warn where the loss is not computed on the device that `cuda` names."""
    if cuda == (device == "cuda"):
        return
    if not cuda:
        reason = "cuda=False was given, but the model is on a GPU: it is measured there"
    elif torch.cuda.is_available():
        reason = f"cuda=True was given, but the model is on the {device}: it is measured there; call model.cuda() first"
    else:
        reason = f"cuda=True was given, but there is no GPU here: the model is measured on the {device}"
    warnings.warn(reason, stacklevel=3)
