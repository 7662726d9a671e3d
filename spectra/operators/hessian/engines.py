"""Engines: ways to compute Hessian-vector products (HVPs), which give the same numbers at different speeds.

With g the gradient of the loss and its graph kept, H v is the gradient of g . v ("reverse"; Pearlmutter, Neural
Computation 6, 1994). Several vectors can share one pass through that graph ("batched"), which is faster where launching
operations takes longer than their arithmetic. "forward" (forward over reverse) differentiates the gradient along v
without keeping a graph, and can be compiled as a whole. On a GPU the first two can be captured once as a CUDA graph and
replayed ("captured", "captured batched").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from spectra.backend.errors import first_line

ENGINES = ("auto", "reverse", "batched", "forward", "captured", "captured batched")
Tensors = tuple[torch.Tensor, ...]
Multiply = Callable[[torch.Tensor], torch.Tensor]


def reverse(gradient: Tensors, parameters: Tensors, vectors: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """The gradient of g . v for each row v of `vectors`, one pass through the graph a row.

    Args:
        gradient: The gradient g with its graph, a tensor for each parameter.
        parameters: The parameters that g is the gradient in.
        vectors: The vectors v, (k, n).
        keep: Whether to keep the graph for another call.

    Returns:
        The products, (k, n).
    """
    products = torch.empty_like(vectors)
    sizes = [parameter.numel() for parameter in parameters]
    for row, vector in enumerate(vectors):
        last = row == len(vectors) - 1
        cotangents = [_shaped(part, p.shape) for part, p in zip(vector.split(sizes), parameters, strict=True)]
        parts = _differentiated(gradient, parameters, cotangents, keep=keep or not last, batched=False)
        torch.cat([part.reshape(-1) for part in parts], out=products[row])
    return products


def batched(gradient: Tensors, parameters: Tensors, vectors: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """The same as `reverse`, in one pass through the graph for all k rows, which takes k times the memory."""
    k, sizes = len(vectors), [parameter.numel() for parameter in parameters]
    split = zip(vectors.split(sizes, dim=1), parameters, strict=True)
    cotangents = [_shaped(part, torch.Size((k, *p.shape))) for part, p in split]
    parts = _differentiated(gradient, parameters, cotangents, keep=keep, batched=True)
    # the zeros of a parameter that the loss does not use come without the dimension of the block
    whole = [part.expand(k, *p.shape).reshape(k, -1) for part, p in zip(parts, parameters, strict=True)]
    return torch.cat(whole, dim=1)


def _shaped(part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A part of vectors in the shape of its parameter. Pairs of numbers are copied, as complex ones are aligned."""
    part = part.view(shape)
    return part.clone(memory_format=torch.contiguous_format) if shape[-1:] == (2,) else part


def _differentiated(
    gradient: Tensors, parameters: Tensors, cotangents: Sequence[torch.Tensor], *, keep: bool, batched: bool
) -> Tensors:
    """The gradient of g . v, one tensor for each parameter, where `cotangents` are the parts of v."""
    outputs = [(g, v) for g, v in zip(gradient, cotangents, strict=True) if g.requires_grad]
    if not outputs:  # a loss linear in the parameters
        return tuple(torch.zeros_like(p) for p in parameters)
    return torch.autograd.grad(
        [g for g, _ in outputs],
        parameters,
        [v for _, v in outputs],
        retain_graph=keep,
        materialize_grads=True,
        is_grads_batched=batched,
    )


class _Loss(nn.Module):
    """A loss as a module that holds the model, so that functional_call can put other parameters into it."""

    def __init__(self, model: nn.Module, evaluate: Callable[[], torch.Tensor]):
        super().__init__()
        self.model, self.evaluate = model, evaluate

    def forward(self) -> torch.Tensor:
        return self.evaluate()


class ForwardOverReverse:
    """Forward over reverse: the derivative of theta -> dL/d theta along several directions, by torch.func.

    It is compiled by torch.compile where that works.

    Args:
        model: The model.
        names: The names of the parameters theta.
        parameters: The values of the parameters.
        evaluate: Computes the loss of the model from its current parameters, without reading a number out of a tensor.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], parameters: Tensors, evaluate: Callable[[], torch.Tensor]
    ):
        self._names = [f"model.{name}" for name in names]
        self._shapes = [parameter.shape for parameter in parameters]
        module = _Loss(model, evaluate)
        values = {name: p.detach() for name, p in zip(self._names, parameters, strict=True)}

        def loss(chosen: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(module, chosen, ())

        def product(direction: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return torch.func.jvp(torch.func.grad(loss), (values,), (direction,))[1]

        self._eager = torch.func.vmap(product)
        # by default a second shape makes shapes symbolic, and through those torch cannot differentiate an embedding
        self._compiled: Callable | None = torch.compile(self._eager, dynamic=False)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products of the rows of `vectors`, (k, n)."""
        k = len(vectors)
        parts = vectors.split([shape.numel() for shape in self._shapes], dim=1)
        directions = {
            name: _shaped(part.reshape(k, *shape), torch.Size((k, *shape)))
            for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }
        products = self._products(directions)
        return torch.cat([products[name].reshape(k, -1) for name in self._names], dim=1)

    def _products(self, directions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The products by name of the parameter, compiled until compiling fails once."""
        if self._compiled is not None:
            try:
                return self._compiled(directions)
            except Exception as error:  # the compiler raises many classes; eager execution gives the same numbers
                reason = first_line(error)
                warnings.warn(f"the model cannot be compiled ({reason}): running it eagerly", stacklevel=2)
                self._compiled = None
        return self._eager(directions)


class CapturedProducts:
    """A product recorded once as a CUDA graph and replayed: the same kernels, without the time to launch each.

    Args:
        multiply: Computes the products of a block of vectors (k, n).
        example: A block of the shape to come, (k, n).
        stream: The CUDA stream to record on, on which the autograd graphs were built.
    """

    def __init__(self, multiply: Multiply, example: torch.Tensor, stream: torch.cuda.Stream):
        self._vectors = example.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose algorithms and allocate workspaces at their first calls
                multiply(self._vectors)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._products = multiply(self._vectors)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products of the rows of `vectors`, (k, n)."""
        self._vectors.copy_(vectors)
        self._graph.replay()
        return self._products.clone()
