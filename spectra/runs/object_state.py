"""Putting objects back: what a call changes in attributes, containers, tensors, generators and globals is undone.

A walk follows attributes, members of containers, closures, and the globals that functions of the user name. It stops
at modules, which are the task of the operator, at code of libraries, and at objects that threads or processes work on:
these change while a measurement runs. An iterator cannot be put back; while state is kept, another stands in its place,
which is a copy where one can be made, and refuses to be read where none can.
"""

from __future__ import annotations

import abc
import array
import contextlib
import copy
import functools
import itertools
import operator
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from spectra.backend.errors import InputError
from spectra.operators.hessian.batches import attributes_of

DEPTH = 6  # objects between the one that is given and one that it holds
MOST_OBJECTS = 1 << 14  # that a walk looks at
MOST_MEMBERS = 256  # of a container whose members are looked into; larger ones hold data
BUDGET = 1 << 26  # entries of tensors and arrays that are put back, all together; beyond they hold data
MUTABLE = (OrderedDict, dict, set, list, deque)  # the first that fits is asked, whatever a class of its own overrides
NUMBERS = (torch.Tensor, torch.Generator, np.ndarray, np.random.Generator, np.random.RandomState)  # hold no objects
PLAIN = (*NUMBERS, types.FunctionType, types.MethodType)
NO_STATE = (str, bytes, int, float, complex, bool, type(None), types.ModuleType, nn.Module, nn.Parameter)
NO_STATE += (torch.optim.Optimizer, _BaseDataLoaderIter)
SERVICES = ("_thread", "_queue", "threading", "queue", "multiprocessing", "concurrent", "asyncio", "logging", "socket")
SERVICES += ("subprocess", "spectra", "qat", "tqdm", "wandb", "mlflow", "tensorboard", "tensorboardX")
SERVICES += ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.distributed")
SERVICES += ("accelerate.accelerator", "accelerate.tracking", "accelerate.hooks", "torch.utils.tensorboard")
SERVICES += ("transformers.trainer_callback",)
WORKERS = (threading.Thread, Executor, BaseProcess)  # what these do to the object that holds them goes on meanwhile
LIBRARIES = sys.stdlib_module_names | {"torch", "torchvision", "torchaudio", "torchdata", "numpy", "scipy", "pandas"}
LIBRARIES |= {"sklearn", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "diffusers", "evaluate"}
LIBRARIES |= {"lightning", "pytorch_lightning", "deepspeed", "matplotlib", "PIL", "spectra", "qat", "tqdm", "wandb"}
# a copy of these starts where they are, and reading it leaves them there
COPIED = tuple({type(iter(each)) for each in ([], (), {}, {}.values(), {}.items(), set(), "", b"", range(0))})
COPIED += (type(reversed([])), itertools.count)
READ_ONCE = (
    "the measured function reads from a {} that can be read only once, and the training would miss what is measured: "
    "measure with a loss= or batches= that read from no iterator"
)


class Holder(abc.ABC):
    """An object that says itself what a walk is to look at, instead of all of its attributes."""

    @abc.abstractmethod
    def holds(self) -> Iterable[Any]:
        """What it holds."""


@contextlib.contextmanager
def kept(*objects: Any, budget: int = BUDGET) -> Iterator[None]:
    """Put back what is reachable from objects.

    Put back are attributes, those of classes and in slots too, closures, the globals that functions name, members of
    containers, tensors, arrays and random generators. Iterators cannot be read meanwhile, but for those of plain
    containers.

    Args:
        *objects: The objects.
        budget: How many entries of tensors and arrays are put back in all. Larger containers only lose what was added.
    """
    room = budget
    with contextlib.ExitStack() as stack:  # which calls all that is to be called, whatever raises
        iterators = []
        for item in held(*objects):
            size = _size(item)
            if size <= room:
                room -= size
                for put_back in _undo(item, budget):
                    stack.callback(put_back)
            iterators += [(put, value, item) for put, value in _places(item) if _is_read_once(value)]
        for put, iterator, owner in iterators:
            stack.callback(put, iterator)
            put(None if isinstance(owner, DataLoader) else _stand_in(iterator))  # a loader makes another
        yield


def held(*objects: Any, depth: int = DEPTH) -> Iterator[Any]:
    """Objects and what they hold, each once.

    Args:
        *objects: The objects.
        depth: How many objects may lie between.

    Yields:
        The objects themselves, then those that they hold.
    """
    seen: dict[int, Any] = {}  # with the objects, so that no id is used twice
    level = list(objects)
    for _ in range(depth):
        following = []
        for item in level:
            if id(item) not in seen and len(seen) < MOST_OBJECTS and not _is_passed_by(item):
                seen[id(item)] = item
                yield item
                following += _members(item)
        level = following


def modules_in(*objects: Any) -> list[nn.Module]:
    """The modules among objects and what they hold.

    Args:
        *objects: The objects.

    Returns:
        The modules, without what is inside of them.
    """
    direct = [item for item in objects if isinstance(item, nn.Module)]
    members = (member for item in held(*objects) for member in _members(item))
    return list({id(module): module for module in (*direct, *members) if isinstance(module, nn.Module)}.values())


# -- what an object holds


def _is_passed_by(item: Any) -> bool:
    """Whether a walk does not look at an object."""
    if isinstance(item, NO_STATE):
        return True
    if isinstance(item, type):
        return _is_of_library(item)
    if isinstance(item, PLAIN):
        return False
    if _is_service(type(item).__module__):
        return not isinstance(item, Holder)
    return any(isinstance(value, WORKERS) for value in attributes_of(item).values())


@functools.cache
def _is_service(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in SERVICES)


def _members(item: Any) -> list[Any]:
    """What an object holds."""
    if isinstance(item, NUMBERS):
        return []
    if isinstance(item, dict | list | tuple | set | frozenset | deque):
        if len(item) > MOST_MEMBERS:
            return []
        return [*(item.values() if isinstance(item, dict) else item), *attributes_of(item).values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        defaults = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        inside = [cell.cell_contents for cell in _filled_cells(item)]
        return [*inside, *defaults, *vars(item).values(), *_globals_of(item).values()]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, type):
        functions = (getattr(value, "__func__", getattr(value, "fget", value)) for value in vars(item).values())
        return [*functions, *item.__bases__]
    if isinstance(item, Holder):
        return list(item.holds())
    return [*attributes_of(item).values(), type(item)]


def _filled_cells(function: types.FunctionType) -> list[types.CellType]:
    """The cells of a closure that hold something."""
    return [cell for cell in function.__closure__ or () if cell != types.CellType()]


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function of the user names, by name."""
    if _is_of_library(function):
        return {}
    table = function.__globals__
    return {name: table[name] for name in _names_in(function.__code__) if name in table}


@functools.cache
def _names_in(code: types.CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function and those defined in it."""
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _is_of_library(item: type | types.FunctionType) -> bool:
    """Whether a class or a function is no code of the user."""
    return (getattr(item, "__module__", None) or "").partition(".")[0] in LIBRARIES


# -- putting back


def _size(item: Any) -> int:
    """How many entries a copy of a tensor or an array has; 0 for other objects."""
    if isinstance(item, torch.Tensor) and item.layout == torch.strided and not item.is_nested:
        return item.numel()
    return item.size if isinstance(item, np.ndarray) else 0


def _undo(item: Any, budget: int) -> list[Callable[[], Any]]:
    """What to call to put one object back."""
    if isinstance(item, torch.Generator | np.random.RandomState):
        return [functools.partial(item.set_state, item.get_state())]
    if isinstance(item, np.random.Generator | np.random.BitGenerator):
        bits = item.bit_generator if isinstance(item, np.random.Generator) else item
        return [functools.partial(setattr, bits, "state", bits.state)]
    if isinstance(item, random.Random):
        return [] if isinstance(item, random.SystemRandom) else [functools.partial(item.setstate, item.getstate())]
    if isinstance(item, torch.Tensor):
        if item.layout != torch.strided or item.is_nested or item.is_meta or item.is_inference() or not item.is_leaf:
            return []
        put_back = functools.partial(_write_back, item, item._version, item.detach().clone())
        return [put_back, functools.partial(setattr, item, "grad", item.grad)] if item.requires_grad else [put_back]
    if isinstance(item, np.ndarray):
        return [functools.partial(np.copyto, item, item.copy())] if item.flags.writeable else []
    if isinstance(item, array.array | bytearray):
        return [functools.partial(item.__setitem__, slice(None), item[:])]
    if isinstance(item, types.FunctionType):
        cells = [functools.partial(setattr, cell, "cell_contents", cell.cell_contents) for cell in _filled_cells(item)]
        attributes = functools.partial(_refill, vars(item), dict(vars(item)))
        return [*cells, attributes, functools.partial(_rebind, item, _globals_of(item))]
    if isinstance(item, type):
        return [functools.partial(_give_back, item, dict(vars(item)))]
    undo: list[Callable[[], Any]] = []
    kind: Any = next((kind for kind in MUTABLE if isinstance(item, kind)), None)
    if kind is not None:
        if len(item) > budget:
            undo.append(functools.partial(_shorten, item, len(item)))
        else:
            undo.append(functools.partial(_refill, item, kind.copy(item)))
    table = getattr(item, "__dict__", None)
    if type(table) is dict:
        undo.append(functools.partial(_refill, table, dict(table)))
    slots = {name: value for name, value in attributes_of(item).items() if name not in (table or {})}
    undo += [functools.partial(_set_slot, item, name, value) for name, value in slots.items()]
    return undo


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=False)
        same = len(container) == len(before) and all(a is c and b is d for (a, b), (c, d) in pairs)
    else:
        same = len(container) == len(before) and all(map(operator.is_, container, before))
    if same:
        return
    kind: Any = next(kind for kind in MUTABLE if isinstance(container, kind))
    kind.clear(container)
    if isinstance(container, dict | set):
        kind.update(container, before)
    else:
        kind.extend(container, before)


def _shorten(container: Any, length: int) -> None:
    """Take away what was added to a large container; only its length is known."""
    if isinstance(container, dict):
        for key in list(itertools.islice(container, length, None)):
            del container[key]
    elif isinstance(container, list):
        del container[length:]


def _write_back(tensor: torch.Tensor, version: int, before: torch.Tensor) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(before)


def _rebind(function: types.FunctionType, before: dict[str, Any]) -> None:
    """Give the globals that a function names their objects back."""
    table = function.__globals__
    for name, value in _globals_of(function).items():
        if name not in before:
            del table[name]
        elif value is not before[name]:
            table[name] = before[name]


def _give_back(owner: type, before: dict[str, Any]) -> None:
    """Give a class the attributes back that it had."""
    for name, value in dict(vars(owner)).items():
        if name.startswith("__") and name.endswith("__"):
            continue
        if name not in before:
            delattr(owner, name)
        elif value is not before[name]:
            setattr(owner, name, before[name])


def _set_slot(item: Any, name: str, value: Any) -> None:
    if getattr(item, name, None) is not value:
        object.__setattr__(item, name, value)  # also where the class is frozen


# -- iterators


def _is_read_once(value: Any) -> bool:
    """Whether reading an object changes what no attribute shows. Iterators with attributes are put back as objects."""
    if isinstance(value, _BaseDataLoaderIter):
        return True
    return isinstance(value, Iterator) and not hasattr(value, "__dict__") and not hasattr(value, "read")


def _places(item: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Where an object holds others, and another could stand: a function that puts it there, and what is there."""
    if isinstance(item, NUMBERS):
        return
    if isinstance(item, types.FunctionType):
        for cell in _filled_cells(item):
            yield functools.partial(setattr, cell, "cell_contents"), cell.cell_contents
        for name, value in _globals_of(item).items():
            yield functools.partial(item.__globals__.__setitem__, name), value
        for name, value in vars(item).items():
            yield functools.partial(setattr, item, name), value
        return
    if isinstance(item, type):
        for name, value in vars(item).items():
            yield functools.partial(setattr, item, name), value
        return
    if isinstance(item, dict | list) and len(item) <= MOST_MEMBERS:
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            yield functools.partial(item.__setitem__, key), value
    table: Any = getattr(item, "__dict__", None)
    for name, value in attributes_of(item).items():
        if type(table) is dict and name in table:
            yield functools.partial(table.__setitem__, name), value
        else:
            yield functools.partial(object.__setattr__, item, name), value


def _stand_in(iterator: Any) -> Any:
    if isinstance(iterator, COPIED):
        with contextlib.suppress(TypeError):  # a later Python may not copy it
            return copy.copy(iterator)
    return _Unread(iterator)


class _Unread:
    """An iterator that refuses to be read."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def __iter__(self) -> _Unread:
        return self

    def __next__(self) -> NoReturn:
        of_loader = isinstance(self._iterator, _BaseDataLoaderIter)
        raise InputError(READ_ONCE.format("DataLoader's iterator" if of_loader else type(self._iterator).__name__))

    send = throw = close = lambda self, *_: self.__next__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)
