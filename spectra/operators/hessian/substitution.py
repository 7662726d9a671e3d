"""Stand-ins: parameters that replace a model's own while its loss is computed, so that a measurement never changes it.

A stand-in shares the memory of the parameter, unless it is in another precision or moved by an offset. Code that reads
the parameter through the modules gets the stand-in: the forward pass, and a loss that iterates over
`model.parameters()`. Code that holds the parameter itself, such as a loss with a list of parameters, is redirected to
the stand-in. Hooks on the parameter, its `requires_grad` and its `.grad` have no effect on the measurement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from spectra.operators.hessian.isolation import experts_in
from spectra.operators.hessian.parameters import ParameterSpace


class WeightsWritten(Exception):
    """A forward pass is about to write to a parameter, as an embedding with `max_norm` does."""


class Substitution:
    """Stand-ins for all parameters and floating-point buffers of a model.

    Args:
        model: The model.
        space: Which parameters are differentiated. Their stand-ins alone require gradients.
        loss: The loss where it is a module: its parameters and buffers are replaced too, and never differentiated.
        dtype: The dtype of floating-point stand-ins, None for that of each parameter.
        offset: A vector (n,) added to the chosen parameters.
        copies: Whether the stand-ins of parameters have memory of their own, for a forward pass that writes to them.
        values: Values of parameters by id, where a forward pass wrote to parameters: those that it left. Embeddings
            then do not apply their max_norm again.
        redirected: Whether tensors that were not read through a module are replaced too: a parameter by its stand-in,
            and a constant in another precision by one in that of the stand-ins. `torch._weight_norm` is then computed
            by plain operations, because torch's second derivative of the fused operation is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        *,
        loss: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        copies: bool = False,
        values: Mapping[int, torch.Tensor] | None = None,
        redirected: bool = False,
    ):
        self._model, self._loss, self.dtype, self._redirected = model, loss, dtype, redirected
        self._written = values is not None
        offsets = {} if offset is None else dict(zip(map(id, space.parameters), space.unflatten(offset), strict=True))
        chosen = {id(parameter) for parameter in space.parameters}
        self._stand_ins: dict[int, nn.Parameter] = {}
        self._originals: list[nn.Parameter] = []  # kept alive, since stand-ins are found by id
        for parameter in {id(p): p for module in self._modules() for p in module.parameters(recurse=False)}.values():
            value = self._cast((values or {}).get(id(parameter), parameter).detach())
            if parameter.is_inference() or (copies and value.data_ptr() == parameter.data_ptr()):
                value = value.clone()
            if id(parameter) in offsets:
                value = value + offsets[id(parameter)].to(value.dtype)
            self._originals.append(parameter)
            self._stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=id(parameter) in chosen)
        self.chosen: tuple[nn.Parameter, ...] = tuple(self._stand_ins[id(p)] for p in space.parameters)

    def values(self) -> dict[int, torch.Tensor]:
        """The current values of the stand-ins, by the ids of the parameters."""
        return {id(p): self._stand_ins[id(p)].detach().clone() for p in self._originals}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the model computes with the stand-ins and with copies of its buffers."""
        put_back: list[tuple[Any, Any, Any]] = []
        buffers: dict[int, torch.Tensor] = {}
        try:
            for module in self._modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in self._stand_ins:
                        put_back.append((module._parameters, name, parameter))
                        module._parameters[name] = self._stand_ins[id(parameter)]
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        put_back.append((module._buffers, name, buffer))
                        module._buffers[name] = buffers.setdefault(id(buffer), self._cast(buffer).clone())
                for name, value in list(vars(module).items()):
                    # such as the list of weights that a recurrent layer passes to its kernel
                    if isinstance(value, list) and any(id(item) in self._stand_ins for item in value):
                        put_back.append((module.__dict__, name, value))
                        module.__dict__[name] = [self._stand_ins.get(id(item), item) for item in value]
                if self._written and vars(module).get("max_norm") is not None:
                    put_back.append((module.__dict__, "max_norm", module.max_norm))
                    module.__dict__["max_norm"] = None
            with self._redirect(), experts_in(self._model, self.chosen[0].dtype):
                yield
        finally:
            for table, name, value in put_back:
                table[name] = value

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Raise `WeightsWritten` before an operation inside would write to memory that a stand-in shares."""
        shared = {
            parameter.untyped_storage()._cdata
            for parameter in self._originals
            if self._stand_ins[id(parameter)].data_ptr() == parameter.data_ptr() and parameter.numel()
        }
        with _WriteGuard(shared):
            yield

    def reached_past(self, loss: torch.Tensor) -> bool:
        """Whether the graph of a loss leads to a parameter itself instead of its stand-in."""
        originals = {id(parameter) for parameter in self._originals}
        return any(id(getattr(node, "variable", None)) in originals for node in nodes_of(loss))

    @staticmethod
    def has_plain_form(loss: torch.Tensor) -> bool:
        """Whether the graph of a loss has an operation of `PLAIN_FORMS`, whose second derivative in torch is wrong."""
        return any(node.name().startswith("WeightNormInterfaceBackward") for node in nodes_of(loss))

    def _modules(self) -> Iterator[nn.Module]:
        """The modules of the model, and those of a loss that is a module."""
        yield from self._model.modules()
        if self._loss is not None:
            yield from self._loss.modules()

    def _redirect(self) -> contextlib.AbstractContextManager[Any]:
        """The context that replaces tensors which were not read through a module, if that was asked for."""
        if not self._redirected:
            return contextlib.nullcontext()
        places: dict[int, tuple[dict[str, Any], str]] = {}
        stand_ins = {id(self._stand_ins[id(p)]): id(p) for p in self._originals}
        for module in self._modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in stand_ins:
                    places[stand_ins[id(parameter)]] = (module._parameters, name)  # type: ignore[assignment]
        return _Redirect(places, self.dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the dtype of the stand-ins."""
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.dtype)


def unwritten(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context that raises `WeightsWritten` before an operation writes to a parameter of the model."""
    return _WriteGuard({p.untyped_storage()._cdata for p in model.parameters() if p.numel()})


def nodes_of(loss: torch.Tensor) -> Iterable[Any]:
    """Every node of the graph of a tensor, once."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return seen


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`torch._weight_norm` by plain operations: v g / ||v||, with norms over all dimensions but `dim`."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


# Operations whose second derivative in torch is wrong, and plain operations that compute the same.
PLAIN_FORMS: dict[Any, Any] = {torch._weight_norm: _weight_norm}  # pyright: ignore[reportPrivateImportUsage]


class _Redirect(TorchFunctionMode):
    """Replaces parameters that were not read through a module by their stand-ins, and casts constants."""

    def __init__(self, places: Mapping[int, tuple[dict[str, Any], str]], dtype: torch.dtype | None):
        super().__init__()
        self._places, self._dtype = places, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__", "requires_grad_"):  # attributes, such as p.shape
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, self._current, (args, kwargs or {}))
        return PLAIN_FORMS.get(func, func)(*args, **kwargs)

    def _current(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of a parameter, a constant in the dtype of the stand-ins, or the tensor itself."""
        place = self._places.get(id(tensor))
        if place is not None:
            return place[0][place[1]]
        other = self._dtype is not None and tensor.dtype != self._dtype
        # some models compute parts in another precision on purpose; a tensor is a constant only if it has no graph
        if other and tensor.is_floating_point() and tensor.grad_fn is None and not tensor.requires_grad:
            return tensor.to(self._dtype)
        return tensor


class _WriteGuard(TorchDispatchMode):
    """Raises `WeightsWritten` before an operation writes to one of these storages."""

    def __init__(self, storages: Collection[int]):
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._storages:
                    raise WeightsWritten(str(func))
        return func(*args, **kwargs)
