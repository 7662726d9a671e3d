"""Batches in the forms that users have (mappings, pairs, tuples, tensors, objects): read, moved, cut and joined."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from spectra.backend import memory
from spectra.backend.errors import InputError
from spectra.operators.hessian.isolation import random_states_kept

MOST_BATCHES = 4096  # batches read from an iterable: all are held in memory, and an iterator may be endless
MEMORY_SHARE = 0.5  # share of the free memory for the batches of an iterator of unknown length
SEARCH_DEPTH = 5  # most steps from a loader through the objects it holds to a random generator
CONTENT_DEPTH = 8  # most steps from a batch through the objects it holds to what a comparison sees


# -- from what is given to a list of batches


def as_batches(batches: Any) -> list[Any]:
    """A list of batches from a list, a DataLoader, any other iterable of them, or one batch alone.

    A DataLoader is read once, with its own order and augmentations. The random states that it draws from are restored,
    so that a training with the same loader is not affected.

    Args:
        batches: A list, a DataLoader, an iterable, or one batch. A mapping, a tensor, an array, a dataclass, a tuple
            with a tensor in it and a list of tensors with the same number of rows, as a DataLoader yields, are one
            batch. In a list of three or more tensors of the same dtype and row shape, each tensor is a batch.

    Returns:
        The batches.

    Raises:
        InputError: If there are no batches or more than 4096, or if `batches` is none of these.
    """
    if _is_one_batch(batches):
        return [batches]
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches must be a list of batches, a DataLoader or one batch, got {type(batches).__name__}: a batch is a "
            "mapping of tensors or a pair (inputs, targets); a dataset goes into torch.utils.data.DataLoader, and a "
            "batch of a class of its own into a list"
        )
    length = _length(batches)
    if length is not None and length > MOST_BATCHES:
        raise _too_many(f"got {length}")
    with random_states_kept(_device_of_random_states()), _generators_kept(batches):
        listed = list(batches) if isinstance(batches, list | tuple) else _read(batches, bounded=length is None)
    if not listed:
        raise InputError("at least one batch is expected, got none")
    return listed


def _read(batches: Iterable[Any], *, bounded: bool) -> list[Any]:
    """The batches of an iterable, which may be endless."""
    listed: list[Any] = []
    room = MEMORY_SHARE * memory.available(torch.device("cpu"))
    for batch in batches:
        if len(listed) == MOST_BATCHES:
            raise _too_many("got more")
        listed.append(batch)
        if bounded:
            room -= sum(t.nbytes for t in tensors_of(batch) if t.device.type == "cpu" and t.layout == torch.strided)
            if room < 0:
                raise _too_many(f"got an iterator of unknown length that filled half of it with {len(listed)}")
    return listed


def _too_many(got: str) -> InputError:
    return InputError(
        f"at most {MOST_BATCHES} batches are expected, since all of them are held in memory, {got}: take some, such as "
        "list(itertools.islice(batches, 8))"
    )


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except (TypeError, NotImplementedError):  # an iterator, a DataLoader of an IterableDataset
        return None


def _is_one_batch(batches: Any) -> bool:
    if isinstance(batches, Mapping | torch.Tensor | np.ndarray) or _is_dataclass(batches):
        return True
    if isinstance(batches, tuple):
        return any(isinstance(member, torch.Tensor | np.ndarray) for member in batches)
    if not isinstance(batches, list) or len(batches) < 2:
        return False
    if not all(isinstance(member, torch.Tensor | np.ndarray) and member.ndim for member in batches):
        return False
    if len({len(member) for member in batches}) > 1:
        return False
    return len(batches) == 2 or len({(tuple(member.shape[1:]), member.dtype) for member in batches}) > 1


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


# -- random generators


def _device_of_random_states() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")


class _generators_kept:
    """A context that restores the random generators that a DataLoader, its samplers and its dataset hold."""

    def __init__(self, loader: Any):
        self._generators = [] if isinstance(loader, list | tuple) else list(_generators_in(loader))

    def __enter__(self) -> None:
        self._states = [_state_of(generator) for generator in self._generators]

    def __exit__(self, *_: object) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)


def _generators_in(owner: Any) -> Iterator[Any]:
    """The random generators that an object holds, directly or through what it holds."""
    seen: set[int] = set()
    level = [owner]
    for _ in range(SEARCH_DEPTH):
        following: list[Any] = []
        for item in level:
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
                yield item
            else:
                following.extend(_held_by(item))
        level = following


def _held_by(item: Any) -> list[Any]:
    """What an object holds that may hold a random generator."""
    if isinstance(item, torch.Tensor | torch.nn.Module | np.ndarray | type | types.ModuleType | str | bytes):
        return []
    if isinstance(item, list | tuple):
        return list(item[:16])
    if isinstance(item, types.MethodType):
        return [item.__self__]
    if isinstance(item, types.FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
    held = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    return list(itertools.islice(held.values(), 64))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


# -- the tensors of a batch


def mapped(batch: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The batch with a function applied to each of its tensors, in containers of the same kind."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # its lengths are a tensor too, and belong on the CPU
        data, lengths, *orders = batch
        return PackedSequence(
            function(data), lengths, *(order if order is None else function(order) for order in orders)
        )
    if isinstance(batch, Mapping):
        return with_items(batch, {key: mapped(value, function) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return like(batch, [mapped(value, function) for value in batch])
    if _is_dataclass(batch):
        changed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(changed, field.name, mapped(getattr(batch, field.name), function))
        return changed
    return batch


def like(sequence: Any, members: Iterable[Any]) -> Any:
    """A tuple, a named tuple or a list of the members, as `sequence` is."""
    make = getattr(type(sequence), "_make", type(sequence))
    try:
        return make(members)
    except TypeError:  # a class of its own, such as torch.Size of what are no numbers
        return tuple(members)


def with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A copy of a mapping with other items, of the same class if possible, because a loss may read its attributes."""
    if type(mapping) is dict or set(mapping) - set(items):
        return items
    try:
        changed = copy.copy(mapping)
        for key, value in items.items():
            changed[key] = value  # type: ignore[index]
    except Exception:  # a class that cannot be written to, whatever error it has for that
        return items
    return changed


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)
    elif _is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def contents_of(batch: Any) -> Iterator[torch.Tensor | bytes]:
    """What two batches have to share to be the same: every tensor, and as bytes what they hold beside tensors.

    Args:
        batch: a batch of any form.

    Yields:
        Tensors, in the order of `tensors_of` and with those of other objects, nested ones row by row; for numbers,
        texts, arrays and objects their place, type and value.
    """
    yield from _contents(batch, "", CONTENT_DEPTH, {})


def _contents(value: Any, path: str, depth: int, seen: dict[int, Any]) -> Iterator[torch.Tensor | bytes]:
    """The contents of what stands at a place of a batch."""
    if isinstance(value, torch.Tensor):
        yield from value.unbind() if value.is_nested else (value,)
        return
    members = _members_by_name(value) if depth and id(value) not in seen else None
    if members is None:
        yield f"{path}: {_type_and_value(value)!r}".encode()
        return
    if not isinstance(value, Mapping | tuple | list) and not _is_dataclass(value):
        seen[id(value)] = value  # objects may hold one another
        yield f"{path}: {type(value).__qualname__}".encode()
    for name, member in members:
        yield from _contents(member, f"{path}.{name}", depth - 1, seen)


def _members_by_name(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or an object consists of, by name or position; None for a plain value."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.dtype == object and value.ndim):
        return list(enumerate(value))
    if _is_dataclass(value):
        fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        return [(field.name, getattr(value, field.name)) for field in fields]
    if isinstance(value, str | bytes | int | float | complex | np.generic | type | types.ModuleType):
        return None
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return None
    array = _array_in(value)
    if array is not None:
        return None if array is value else [("array", array)]
    attributes = attributes_of(value)
    return list(attributes.items()) if attributes else None


def _array_in(value: Any) -> np.ndarray | None:
    """An array, also that of a table or an image."""
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        return None
    try:
        return np.asarray(value)
    except Exception:  # whatever a class of others raises
        return None


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object has of its own, in its `__dict__` and in slots."""
    table = getattr(value, "__dict__", None)
    found = dict(table) if type(table) is dict else {}
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _type_and_value(value: Any) -> tuple[Any, ...]:
    """Type and value of what is no container."""
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), np.ascontiguousarray(value).tobytes())
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, str | bytes | int | float | complex | np.generic | type(None)):
        return (kind, repr(value))
    if isinstance(value, set | frozenset):
        return (kind, sorted(map(repr, value)))
    return (kind, getattr(value, "__qualname__", ""))  # nothing that differs from one process to another


def with_tensors(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with arrays and lists of numbers as tensors, those of floating-point numbers in `dtype`."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        tensor = torch.tensor(batch)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    if isinstance(batch, Mapping):
        return with_items(batch, {key: with_tensors(value, dtype) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        numbers = _array_of_numbers(batch) if isinstance(batch, list) else None
        if numbers is not None:
            return with_tensors(numbers, dtype)
        return like(batch, [with_tensors(member, dtype) for member in batch])
    return batch


def _array_of_numbers(values: list[Any]) -> np.ndarray | None:
    """A list of numbers, or of equally long lists of them, as an array."""
    first: Any = values
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(first, int | float | np.number):
        return None
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A copy of the batch on a device, its floating-point tensors in `dtype` unless that is None.

    The tensors have memory of their own, since a model or a loss may write to them.
    """
    if not isinstance(batch, Mapping | tuple | list | torch.Tensor) and not _is_dataclass(batch):
        return copy.copy(batch).to(device) if callable(getattr(batch, "to", None)) else batch

    def move(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(device, dtype if tensor.is_floating_point() else None)
        changed = changed.clone() if changed is tensor or changed.is_inference() else changed
        return changed.detach().requires_grad_() if tensor.requires_grad else changed.detach()

    return mapped(batch, move)


# -- rows


def rows_in(batch: Any) -> int:
    """The number of rows of a batch; 1 if it holds no tensor.

    Args:
        batch: A batch of any form.

    Returns:
        The number of rows.
    """
    if isinstance(batch, Mapping):
        leading = batch.get("labels", batch.get("input_ids"))
    else:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch, PackedSequence)
        leading = batch[1] if is_pair else batch
    if isinstance(leading, PackedSequence):
        return int(leading.batch_sizes[0])
    if isinstance(leading, list) and leading is not batch and _has_item_per_row(leading):
        return len(leading)
    first = leading if isinstance(leading, torch.Tensor) else next(tensors_of(batch), None)
    return _leading(first) if first is not None else 1


def _leading(tensor: torch.Tensor) -> int:
    return tensor.size(0) if tensor.ndim else 1


def _has_item_per_row(members: list[Any]) -> bool:
    """Whether a list holds an item for each row, as only mappings, scalars and tensors of several lengths show."""
    if all(isinstance(member, torch.Tensor) for member in members):
        return not any(m.ndim for m in members) or len({_leading(m) for m in members}) > 1
    return all(isinstance(member, Mapping) for member in members)


def _is_list_of_rows(value: Any, rows: int) -> bool:
    if not isinstance(value, list) or len(value) != rows:
        return False
    return _has_item_per_row(value) or not any(_leading(t) == rows for t in tensors_of(value))


def rows_between(batch: Any, start: int, stop: int, rows: int) -> Any:
    """The rows from start to stop of a batch with `rows` rows. A member with another length stays whole."""
    return _cut(batch, slice(start, stop), rows)


def evenly_spaced_rows(batch: Any, count: int) -> Any:
    """At most `count` rows of a batch, evenly spaced."""
    rows = rows_in(batch)
    return batch if rows <= count else _cut(batch, [i * rows // count for i in range(count)], rows)


def _cut(batch: Any, chosen: slice | list[int], rows: int) -> Any:
    indices = list(range(rows)[chosen]) if isinstance(chosen, slice) else chosen
    if _is_list_of_rows(batch, rows):
        return [batch[i] for i in indices]
    if isinstance(batch, PackedSequence):
        sequences = unpack_sequence(batch)
        return pack_sequence([sequences[i] for i in indices], enforce_sorted=False) if len(sequences) == rows else batch
    if isinstance(batch, Mapping):
        return with_items(batch, {key: _cut(value, chosen, rows) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return like(batch, [_cut(value, chosen, rows) for value in batch])

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or tensor.size(0) != rows:
            return tensor
        if tensor.layout == torch.strided and isinstance(chosen, slice) and not tensor.is_nested:
            return tensor[chosen]
        if tensor.is_nested:
            parts = tensor.unbind()
            return torch.nested.nested_tensor([parts[i] for i in indices], layout=tensor.layout)
        positions = torch.tensor(indices, device=tensor.device)
        if tensor.layout in (torch.sparse_csr, torch.sparse_csc):  # which have no index_select
            return tensor.to_sparse().index_select(0, positions).to_sparse(layout=tensor.layout)
        return tensor.index_select(0, positions)

    return mapped(batch, cut)


# -- several batches as one


def kind_of(batch: Any, rows: int) -> Hashable:
    """A key that is equal for batches that can be joined: their members, with the shapes beyond the rows."""
    if isinstance(batch, torch.Tensor):
        shape = tuple(batch.shape[1:]) if _leading(batch) == rows else tuple(batch.shape)
        return (shape, batch.dtype, batch.layout, batch.device)
    if isinstance(batch, PackedSequence):
        return (PackedSequence, batch.data.shape[1:], batch.data.dtype, batch.data.device)
    if _is_list_of_rows(batch, rows):
        return list
    if _is_dataclass(batch):
        return (type(batch), *(kind_of(getattr(batch, field.name), rows) for field in dataclasses.fields(batch)))
    if isinstance(batch, Mapping):
        return tuple((key, kind_of(value, rows)) for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return tuple(kind_of(value, rows) for value in batch)
    return type(batch)


def constants_in(batch: Any) -> tuple[float, ...]:
    """The numbers in a batch that belong to no row, such as a number that its loss is divided by."""
    if not isinstance(batch, Mapping):
        return ()
    numbers = [v for v in batch.values() if isinstance(v, int | float) or (isinstance(v, torch.Tensor) and not v.ndim)]
    return tuple(map(float, numbers))


def concatenated(batches: Sequence[Any], axis: int = 0) -> Any:
    """All batches joined to one, or None if their members cannot be joined.

    Args:
        batches: The batches, at least one.
        axis: The axis along which the examples lie: 0, or 1 for (time, batch) layouts. Members with one axis are joined
            along that axis.

    Returns:
        One batch with the rows of all.
    """
    rows = [rows_in(batch) for batch in batches]
    try:
        return _joined(batches, axis, rows)
    except _CannotJoin:
        return None


class _CannotJoin(Exception):
    """These members cannot be joined."""


def _joined(members: Sequence[Any], axis: int, rows: Sequence[int]) -> Any:
    first = members[0]
    if all(isinstance(member, torch.Tensor) for member in members):
        per_row = all(m.ndim and (m.size(0) == count or axis) for m, count in zip(members, rows, strict=True))
        if per_row:
            try:
                return torch.cat(list(members), dim=min(axis, first.ndim - 1))
            except (RuntimeError, TypeError, NotImplementedError) as error:  # other shapes, devices, layouts
                raise _CannotJoin from error
        if all(m.shape == first.shape and torch.equal(m, first) for m in members):
            return first
        raise _CannotJoin
    if all(isinstance(member, Mapping) for member in members) and len({tuple(member) for member in members}) == 1:
        return with_items(first, {key: _joined([m[key] for m in members], axis, rows) for key in first})
    if all(isinstance(member, PackedSequence) for member in members):
        return pack_sequence([row for m in members for row in unpack_sequence(m)], enforce_sorted=False)
    if _is_dataclass(first) and all(type(member) is type(first) for member in members):
        joined = copy.copy(first)
        for field in dataclasses.fields(first):
            parts = [getattr(member, field.name) for member in members]
            object.__setattr__(joined, field.name, _joined(parts, axis, rows))
        return joined
    if all(_is_list_of_rows(member, count) for member, count in zip(members, rows, strict=True)):
        return list(itertools.chain.from_iterable(members))
    alike = all(isinstance(member, tuple | list) and len(member) == len(first) for member in members)
    if alike and any(True for _ in tensors_of(first)):
        return like(first, [_joined(parts, axis, rows) for parts in zip(*members, strict=True)])
    if all(isinstance(m, list) and len(m) == count for m, count in zip(members, rows, strict=True)):
        return list(itertools.chain.from_iterable(members))
    if all(type(member) is type(first) and member == first for member in members):
        return first
    raise _CannotJoin
