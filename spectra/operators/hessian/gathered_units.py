"""Units of a sharded model whose weights are gathered when they compute, in each pass again, and dropped after it.

With f the unit, x its inputs, w its weights and c the gradient of its outputs, the first backward pass needs the
pullback p(x, w, c) = (df/d(x, w))^T c, and the second the pullback of p (`spectra.operators.hessian.recompute`). Here w
and its gradient are no tensors of the graph: w is asked for in each pass, the gradient in w is summed over the ranks
and cut at once, and the second pass asks for the part of the vector v that belongs to w. So the graph holds x and c
alone, and a scalar that links the units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from spectra.backend.errors import InputError
from spectra.operators.hessian.recompute import AttentionAndLossRecomputed, forwards_replaced, replaced
from spectra.operators.hessian.unit_exchange import IGNORED, Tensors, UnitExchange

# what can be asked of a parameter without its values
FACTS = ("__get__", "__set__", "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex")
FACTS += ("element_size", "get_device", "is_inference", "requires_grad_", "__len__", "data_ptr", "storage_offset")


class ReadElsewhere(Exception):
    """A parameter of a unit is read while the unit does not compute; the name of the parameter."""


class NotGathered(nn.Parameter):
    """In the place of a parameter of a unit while the unit does not compute: it has a shape, and no values.

    Attributes:
        owner: The name of the parameter.
    """

    owner: str

    @staticmethod
    def like(parameter: torch.Tensor, name: str, dtype: torch.dtype) -> NotGathered:
        """A stand-in of the shape of a parameter."""
        empty = torch.zeros((), dtype=dtype, device=parameter.device).expand(parameter.shape)
        found = NotGathered(empty, requires_grad=False)
        found.owner = name
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in FACTS:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        read = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)), None)
        raise ReadElsewhere(getattr(read, "owner", "a parameter"))


class _Call:
    """One call of a unit: its outputs as a function of the tensors among its inputs, and of its weights."""

    def __init__(self, exchange: UnitExchange, number: int, compute: Callable[[Tensors, Tensors], Tensors]):
        self.exchange, self.number, self.compute = exchange, number, compute

    def leaves(self, *, differentiated: bool) -> tuple[Tensors, list[torch.Tensor]]:
        """The whole weights, and those of them that are chosen, which require gradients."""
        chosen = [self.exchange.is_chosen(p) for p in self.exchange.units[self.number].parameters]
        weights = self.exchange.weights(self.number)
        found = tuple(w.requires_grad_(flag and differentiated) for w, flag in zip(weights, chosen, strict=True))
        return found, [w for w in found if w.requires_grad]


class _Gathered(torch.autograd.Function):
    """f(x, w), with x stored."""

    @staticmethod
    def forward(ctx: Any, call: _Call, link: torch.Tensor, *inputs: torch.Tensor) -> Tensors:  # type: ignore[override]
        ctx.call = call
        ctx.save_for_backward(link, *inputs)
        return call.compute(call.exchange.weights(call.number), inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        link, *inputs = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[2:])
        found = iter(_Pullback.apply(ctx.call, wanted, link, *inputs, *cotangents))  # type: ignore[arg-type]
        return (None, next(found), *(next(found) if flag else None for flag in wanted))


class _Pullback(torch.autograd.Function):
    """p(x, w, c) for the wanted inputs, with x and c stored. The gradient in w goes to the exchange."""

    @staticmethod
    def forward(ctx: Any, call: _Call, wanted: tuple[bool, ...], link: torch.Tensor, *tensors: torch.Tensor) -> Tensors:  # type: ignore[override]
        ctx.call, ctx.wanted, count = call, wanted, len(wanted)
        ctx.save_for_backward(*tensors)
        weights, chosen = call.leaves(differentiated=call.exchange.become != IGNORED)
        with torch.enable_grad():
            inputs = _leaves(tensors[:count], wanted)
            found = _pulled_back(
                call.compute(weights, inputs), [*_requiring(inputs), *chosen], tensors[count:], create_graph=False
            )
        del weights
        ends = len(_requiring(inputs))
        if chosen:
            call.exchange.add(call.number, found[ends:])
        pulled = (_or_zeros(f, i) for f, i in zip(found, _requiring(inputs), strict=False))
        return (torch.zeros_like(link), *pulled)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor, *vectors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        tensors, call, count = ctx.saved_tensors, ctx.call, len(ctx.wanted)
        weights, chosen = call.leaves(differentiated=True)
        with torch.enable_grad():
            inputs = _leaves(tensors[:count], ctx.wanted)
            cotangents = _leaves(tensors[count:], [t.is_floating_point() for t in tensors[count:]])
            pulled = _pulled_back(
                call.compute(weights, inputs), [*_requiring(inputs), *chosen], cotangents, create_graph=True
            )
            along = [*vectors, *(call.exchange.vector(call.number, chosen[0].dtype) if chosen else ())]
            pairs = [(p, v) for p, v in zip(pulled, along, strict=True) if p is not None and p.requires_grad]
            leaves = [*_requiring((*inputs, *cotangents)), *chosen]
            found: Sequence[torch.Tensor | None] = [None] * len(leaves)
            if pairs:
                found = torch.autograd.grad([p for p, _ in pairs], leaves, [v for _, v in pairs], allow_unused=True)
        del weights, pulled, along, pairs
        if chosen:
            call.exchange.add(call.number, found[-len(chosen) :])
        given = iter(found)
        return (None, None, None, *(next(given) if t.requires_grad else None for t in (*inputs, *cotangents)))


def _leaves(tensors: Sequence[torch.Tensor], wanted: Sequence[bool]) -> Tensors:
    return tuple(t.detach().requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True))


def _requiring(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if t.requires_grad]


def _or_zeros(found: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if found is None else found


def _pulled_back(
    outputs: Tensors, leaves: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], *, create_graph: bool
) -> Sequence[torch.Tensor | None]:
    """The gradient of the outputs along the cotangents in each leaf, None where it is not reached."""
    pairs = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs or not leaves:
        return [None] * len(leaves)
    return torch.autograd.grad(
        [out for out, _ in pairs], leaves, [c for _, c in pairs], create_graph=create_graph, allow_unused=True
    )


@contextlib.contextmanager
def units_gathered(
    model: nn.Module, exchange: UnitExchange, link: torch.Tensor, held: UnitsHeldFixed | None
) -> Iterator[None]:
    """A context in which the units of a model ask for their weights when they are called.

    Layers get no cache of keys and values, which a second call would extend.

    Args:
        model: The model.
        exchange: Where weights come from.
        link: A scalar that requires a gradient, through which the graphs of the units hang together.
        held: What units with straight-through derivatives hold fixed, for checks; else None.
    """
    modules = [unit.module for unit in exchange.units if unit.module is not None]
    with forwards_replaced(
        model, modules, lambda number, unit: _forward_gathered(exchange, number, unit.forward, link, held)
    ):
        yield


def _forward_gathered(
    exchange: UnitExchange,
    number: int,
    forward: Callable[..., Any],
    link: torch.Tensor,
    held: UnitsHeldFixed | None,
) -> Callable[..., Any]:
    """The forward pass of a unit, differentiated in its arguments and, by the exchange, in its parameters."""
    places = exchange.units[number].places

    def call(*args: Any, **kwargs: Any) -> Any:
        flat, structure = tree_flatten((args, kwargs))
        positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
        rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        outputs: list[Any] = []  # other things than tensors, and the structure that holds them

        def compute(weights: Tensors, tensors: Tensors) -> Tensors:
            given = list(rest)
            for position, tensor in zip(positions, tensors, strict=True):
                given[position] = tensor
            where = [(m._parameters, name) for holders in places for m, name in holders]
            values = [value for value, holders in zip(weights, places, strict=True) for _ in holders]
            with replaced(where, values), AttentionAndLossRecomputed():
                again_args, again_kwargs = tree_unflatten(given, structure)
                try:
                    returned, shape = tree_flatten(forward(*again_args, **again_kwargs))
                except ReadElsewhere as error:
                    raise InputError(
                        f"'{exchange.units[number].name}' reads '{error}', which belongs to another module, so that "
                        "layers cannot be gathered one at a time: use graph='keep' or engine='differences'"
                    ) from error
            outputs[:] = [returned, shape]
            return tuple(leaf for leaf in returned if isinstance(leaf, torch.Tensor))

        tensors = tuple(flat[i] for i in positions)
        if held is not None:
            held_fixed = held.wrapped(compute, tensors, lambda: exchange.weights(number, moved=False))
        else:
            held_fixed = compute
        found = iter(_Gathered.apply(_Call(exchange, number, held_fixed), link, *tensors))  # type: ignore[arg-type]
        returned, shape = outputs
        whole = [next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in returned]
        outputs.clear()  # the tensors of the call
        return tree_unflatten(whole, shape)

    return call


class UnitsHeldFixed:
    """What modules with straight-through derivatives hold fixed, of one unit at a time.

    The inputs of every call of a unit are recorded. In a replay the unit is run on those first, at the weights without
    an offset, to record what it holds fixed, and then with that on its own inputs.

    Args:
        recorder: Makes a `spectra.operators.hessian.checks.Linearization`.
    """

    def __init__(self, recorder: Callable[[], Any]):
        self._recorder = recorder
        self.is_recorded = False
        self._inputs: list[Tensors] = []
        self._calls = 0

    def wrapped(
        self,
        compute: Callable[[Tensors, Tensors], Tensors],
        tensors: Tensors,
        weights: Callable[[], Tensors],
    ) -> Callable[[Tensors, Tensors], Tensors]:
        """The next call of a unit, with what it holds fixed. After the last recorded one, the first comes again."""
        if not self.is_recorded:
            self._inputs.append(tuple(t.detach() for t in tensors))
            return compute
        inputs = self._inputs[self._calls % len(self._inputs)]
        self._calls += 1

        def held(values: Tensors, given: Tensors) -> Tensors:
            recorder = self._recorder()
            with torch.no_grad(), recorder.record():
                compute(weights(), inputs)
            with recorder.replay():
                return compute(values, given)

        return held
