"""Putting objects back: what a call changes in attributes, containers, tensors and generators is undone afterwards."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

DEPTH = 5  # objects between the one that is given and one that it holds
MOST_ENTRIES = 1 << 16  # of a tensor that is put back; larger ones hold data
MOST_MEMBERS = 256  # of a container whose members are looked into; larger ones hold data
NO_STATE = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, nn.Module)


@contextlib.contextmanager
def kept(*objects: Any) -> Iterator[None]:
    """Put back what is reachable from objects: attributes, members of containers, small tensors, random generators.

    Modules are left alone: they are the task of the operator.

    Args:
        *objects: The objects.
    """
    undo: list[Callable[[], Any]] = []
    for item in held(*objects):
        undo += _undo(item)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


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
            if id(item) not in seen and not isinstance(item, NO_STATE):
                seen[id(item)] = item
                yield item
                following += _members(item)
        level = following


def _members(item: Any) -> list[Any]:
    if isinstance(item, torch.Tensor | torch.Generator | np.ndarray):
        return []
    if isinstance(item, dict | list | tuple | set | deque):
        if len(item) > MOST_MEMBERS:
            return []
        return list(item.values()) if isinstance(item, dict) else list(item)
    if isinstance(item, types.MethodType):
        return [item.__self__]
    if isinstance(item, types.FunctionType):
        return _members_of_function(item)
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    return list(getattr(item, "__dict__", {}).values())


def _members_of_function(function: types.FunctionType) -> list[Any]:
    """What a function closes over, and the modules and random generators among the globals that it names."""
    closed = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return closed + [value for value in named if isinstance(value, nn.Module | torch.Generator)]


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


def _undo(item: Any) -> list[Callable[[], Any]]:
    """What to call to put one object back."""
    if isinstance(item, torch.Generator):
        return [functools.partial(item.set_state, item.get_state())]
    if isinstance(item, np.random.RandomState):
        return [functools.partial(item.set_state, item.get_state())]
    if isinstance(item, np.random.Generator):
        return [functools.partial(setattr, item.bit_generator, "state", item.bit_generator.state)]
    if isinstance(item, random.Random):
        return [functools.partial(item.setstate, item.getstate())]
    if isinstance(item, torch.Tensor):
        if item.layout != torch.strided or item.requires_grad or item.is_meta or item.is_inference():
            return []
        if item.numel() > MOST_ENTRIES:
            return []
        return [functools.partial(_write_back, item, item._version, item.clone())]
    if isinstance(item, np.ndarray):
        if item.size > MOST_ENTRIES or not item.flags.writeable:
            return []
        return [functools.partial(np.copyto, item, item.copy())]
    undo: list[Callable[[], Any]] = []
    if isinstance(item, dict | set | list | deque):
        undo.append(functools.partial(_refill, item, item.copy()))
    attributes = getattr(item, "__dict__", None)
    if type(attributes) is dict:
        undo.append(functools.partial(_refill, attributes, dict(attributes)))
    return undo


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        same = container.keys() == before.keys() and all(container[key] is before[key] for key in before)
    else:
        same = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
    if same:
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(before)
    else:
        container.extend(before)


def _write_back(tensor: torch.Tensor, version: int, before: torch.Tensor) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(before)
