"""Parts of a forward pass whose graphs are not kept: every product computes them again from their inputs.

A kept graph of attention holds several matrices of tokens x tokens for each head, and that of a cross-entropy several
of tokens x vocabulary. Recomputed, each holds its inputs and the gradient that came back. torch's activation
checkpointing does not save this memory here: what it computes again in the first backward pass is kept by the graph of
that pass.

Let f be the part, x its inputs and c the gradient of its outputs. The first backward pass needs the pullback
p(x, c) = (df/dx)^T c, and the second the pullback of p. Both are functions of (x, c), so no more than these is stored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Tensors = tuple[torch.Tensor, ...]
Run = Callable[..., Tensors]
# What is recomputed: nothing, attention and cross-entropy, or every layer as well, which makes a product cost three
# gradients instead of two.
NOTHING, ATTENTION_AND_LOSS, LAYERS = "", "attention and loss", "layers"
SCORES_BYTES = 256 << 20  # size of the attention scores that are computed at once; with more, heads are computed apart


def recomputed(run: Run, inputs: Sequence[torch.Tensor]) -> Tensors:
    """`run(*inputs)`, differentiable twice, with a graph that holds the inputs alone.

    Args:
        run: A function of tensors that computes the same numbers at every call. It may read other tensors, which are
            not differentiated.
        inputs: What it is differentiated in.

    Returns:
        The outputs.
    """
    if not any(tensor.requires_grad for tensor in inputs):
        return run(*inputs)
    return _Recomputed.apply(run, *inputs)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    """f(x), with the inputs stored."""

    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: torch.Tensor) -> Tensors:  # type: ignore[override]
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[1:])
        found = iter(_Pullback.apply(ctx.run, wanted, len(inputs), *inputs, *cotangents))  # type: ignore[arg-type]
        return (None, *(next(found) if flag else None for flag in wanted))


class _Pullback(torch.autograd.Function):
    """p(x, c) = (df/dx)^T c for the wanted inputs, with x and c stored."""

    @staticmethod
    def forward(ctx: Any, run: Run, wanted: tuple[bool, ...], count: int, *tensors: torch.Tensor) -> Tensors:  # type: ignore[override]
        ctx.run, ctx.wanted, ctx.count = run, wanted, count
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            inputs = _leaves(tensors[:count], wanted)
            return _pulled_back(run(*inputs), inputs, tensors[count:], create_graph=False)

    @staticmethod
    def backward(ctx: Any, *vectors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        tensors, count = ctx.saved_tensors, ctx.count
        with torch.enable_grad():
            inputs = _leaves(tensors[:count], ctx.wanted)
            cotangents = _leaves(tensors[count:], [t.is_floating_point() for t in tensors[count:]])
            pulled_back = _pulled_back(ctx.run(*inputs), inputs, cotangents, create_graph=True)
            leaves = [tensor for tensor in (*inputs, *cotangents) if tensor.requires_grad]
            pairs = [(p, v) for p, v in zip(pulled_back, vectors, strict=True) if p.requires_grad]
            found = iter(
                torch.autograd.grad([p for p, _ in pairs], leaves, [v for _, v in pairs], materialize_grads=True)
                if pairs
                else [torch.zeros_like(leaf) for leaf in leaves]
            )
        return (None, None, None, *(next(found) if t.requires_grad else None for t in (*inputs, *cotangents)))


def _leaves(tensors: Sequence[torch.Tensor], wanted: Sequence[bool]) -> Tensors:
    return tuple(t.detach().requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True))


def _pulled_back(
    outputs: Tensors, inputs: Tensors, cotangents: Sequence[torch.Tensor], *, create_graph: bool
) -> Tensors:
    """The gradient of the outputs along the cotangents, in each input that requires one."""
    pairs = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if out.requires_grad]
    return torch.autograd.grad(
        [out for out, _ in pairs],
        [tensor for tensor in inputs if tensor.requires_grad],
        [c for _, c in pairs],
        create_graph=create_graph,
        materialize_grads=True,
    )


# -- attention and cross-entropy


class AttentionAndLossRecomputed(TorchFunctionMode):
    """A context in which attention and cross-entropy, called as functions of torch, are recomputed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention`, recomputed; by groups of heads where the scores of all take much memory."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Tensors:
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return (out,)

    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if dropout_p > 0:  # another call would drop other entries
        return attend(*tensors)[0]
    parts = [recomputed(attend, part)[0] for part in _by_heads(tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)


def _by_heads(tensors: Tensors) -> Iterator[Tensors]:
    """The inputs of attention, cut along the heads so that the scores of a part take at most `SCORES_BYTES`."""
    query, key, value, *mask = tensors
    size = query[..., 0].numel() * key.shape[-2] * query.element_size()
    if query.dim() < 3 or size <= SCORES_BYTES or key.shape[-3] != value.shape[-3]:
        yield tensors
        return
    groups = math.gcd(query.shape[-3], key.shape[-3])  # the queries of a group share keys and values
    parts = min(groups, math.ceil(size / SCORES_BYTES))
    bounds = [groups * part // parts for part in range(parts + 1)]
    for low, high in itertools.pairwise(bounds):
        of_all_heads = [t.dim() < 3 or t.shape[-3] == 1 for t in mask]
        yield (
            *(_heads(t, low, high, groups) for t in (query, key, value)),
            *(t if whole else _heads(t, low, high, groups) for t, whole in zip(mask, of_all_heads, strict=True)),
        )


def _heads(tensor: torch.Tensor, low: int, high: int, groups: int) -> torch.Tensor:
    """The heads of the groups from `low` up to `high`."""
    heads = tensor.shape[-3] // groups
    return tensor.narrow(-3, low * heads, (high - low) * heads)


def _cross_entropy(input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`cross_entropy`, recomputed."""

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> Tensors:
        return (functional.cross_entropy(logits, classes, *args, **kwargs),)

    return recomputed(loss, (input, target))[0]


REPLACEMENTS: dict[Any, Any] = {
    functional.scaled_dot_product_attention: _attention,
    functional.cross_entropy: _cross_entropy,
}


# -- layers


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats: members of lists and sequences of two modules or more, outermost ones alone."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        members = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(members) < 2 or id(module) in inside:
            continue
        found += [member for member in members if _has_a_forward(member)]
        inside |= {id(part) for member in members for part in member.modules()}
    return found


def _has_a_forward(module: nn.Module) -> bool:
    """Whether a module has a forward pass that can be replaced, which a scripted one does not allow."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return not scripted and type(module).forward is not nn.Module.forward


@contextlib.contextmanager
def layers_recomputed(model: nn.Module) -> Iterator[None]:
    """A context in which the layers of a model are recomputed, and attention inside them too.

    Layers get no cache of keys and values, which a second call would extend.

    Args:
        model: The model, in evaluation mode: a layer that draws random numbers cannot be recomputed.
    """
    with forwards_replaced(model, layers_of(model), lambda _, layer: _forward_recomputed(layer, layer.forward)):
        yield


@contextlib.contextmanager
def forwards_replaced(
    model: nn.Module, modules: Sequence[nn.Module], replacement: Callable[[int, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """A context in which modules of a model have another forward pass, and layers get no cache of keys and values.

    Args:
        model: The model.
        modules: The modules.
        replacement: (position, module) -> the forward pass it has inside.
    """
    before = [vars(module).get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = replacement(number, module)
        with caches_off(model):
            yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """A context in which layers get no cache of keys and values."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _forward_recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a layer, recomputed: differentiated in its arguments and in its parameters."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        places = [(m._parameters, name) for m in layer.modules() for name, p in m._parameters.items() if p is not None]
        parameters = {id(table[name]): table[name] for table, name in places}
        index = {key: number for number, key in enumerate(parameters)}
        numbers = [index[id(table[name])] for table, name in places]
        rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        outputs: list[Any] = []  # other things than tensors, and the structure that holds them

        def run(*tensors: torch.Tensor) -> Tensors:
            given = list(rest)
            for position, tensor in zip(positions, tensors, strict=False):
                given[position] = tensor
            values = tensors[len(positions) :]
            with replaced(places, [values[number] for number in numbers]), AttentionAndLossRecomputed():
                again_args, again_kwargs = tree_unflatten(given, structure)
                returned, shape = tree_flatten(forward(*again_args, **again_kwargs))
            outputs[:] = [returned, shape]
            return tuple(leaf for leaf in returned if isinstance(leaf, torch.Tensor))

        found = iter(recomputed(run, [*(leaves[i] for i in positions), *parameters.values()]))  # type: ignore[list-item]
        returned, shape = outputs
        whole = [next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in returned]
        outputs.clear()  # the tensors of the call
        return tree_unflatten(whole, shape)

    return call


@contextlib.contextmanager
def replaced(places: Sequence[tuple[dict[str, Any], str]], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context with other tensors in the places of parameters."""
    before = [table[name] for table, name in places]
    try:
        for (table, name), value in zip(places, values, strict=True):
            table[name] = value
        yield
    finally:
        for (table, name), value in zip(places, before, strict=True):
            table[name] = value
