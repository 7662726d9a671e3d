"""Parameters that stand in for a model's own while its loss is computed, so that the model itself is never written to.

A stand-in shares the memory of the parameter, unless it is in another precision or moved by an offset. Everything that
reads the parameter through the modules sees the stand-in: the forward pass, and a loss that walks `model.parameters()`.
Hooks on the parameter, its `requires_grad` and its `.grad` stay out of the measurement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectra.operators.hessian.parameters import ParameterSpace


class WeightsWritten(Exception):
    """A forward pass is about to write to a parameter, as an embedding with `max_norm` does."""


class Substitution:
    """Stand-ins for all parameters and floating-point buffers of a model.

    Args:
        model: the model.
        space: which parameters are differentiated. Their stand-ins alone require gradients.
        dtype: the floating-point type of the stand-ins, None for that of each parameter.
        offset: a vector (n,) added to the chosen parameters.
        copies: whether the stand-ins of parameters have memory of their own, for a forward pass that writes to them.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        *,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        copies: bool = False,
    ):
        self._model, self.dtype = model, dtype
        offsets = {} if offset is None else dict(zip(map(id, space.parameters), space.unflatten(offset), strict=True))
        chosen = {id(parameter) for parameter in space.parameters}
        self._stand_ins: dict[int, nn.Parameter] = {}
        self._originals: list[nn.Parameter] = []  # kept alive, since stand-ins are found by id
        for parameter in model.parameters():
            value = self._cast(parameter.detach())
            if parameter.is_inference() or (copies and value.data_ptr() == parameter.data_ptr()):
                value = value.clone()
            if id(parameter) in offsets:
                value = value + offsets[id(parameter)].to(value.dtype)
            self._originals.append(parameter)
            self._stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=id(parameter) in chosen)
        self.chosen: tuple[nn.Parameter, ...] = tuple(self._stand_ins[id(p)] for p in space.parameters)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model computes with the stand-ins, and with copies of its buffers; both are put back on exit."""
        put_back: list[tuple[Any, Any, Any]] = []
        buffers: dict[int, torch.Tensor] = {}
        try:
            for module in self._model.modules():
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

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.dtype)


class _WriteGuard(TorchDispatchMode):
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
