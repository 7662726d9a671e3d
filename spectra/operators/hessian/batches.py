"""What people call batches, brought to one form: a list of mappings or of (inputs, targets) pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from spectra.backend.errors import InputError
from spectra.operators.hessian.isolation import random_states_kept

MOST_BATCHES = 4096  # of an iterable: a measurement holds all of its batches, and an endless iterator never ends


def as_batches(batches: Any) -> list[Any]:
    """A list of batches from a list, a DataLoader, any other iterable of them, or one batch alone.

    A DataLoader is read as it is: its order and its augmentations are drawn once, and the random states that it draws
    from are put back, so that a training that uses the same loader goes on as if nothing had been read.

    Args:
        batches: a list, a DataLoader, an iterable, or one batch.

    Returns:
        The batches.

    Raises:
        InputError: for no batches, for more than 4096 of them, and for what is not a batch.
    """
    if isinstance(batches, Mapping) or _is_pair(batches):
        return [batches]
    if isinstance(batches, torch.Tensor):
        return [batches]
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise InputError(f"batches must be a list of batches, got {type(batches).__name__}")
    with random_states_kept(_device_of_random_states()), _generators_kept(batches):
        listed = list(itertools.islice(batches, MOST_BATCHES + 1))
    if not listed:
        raise InputError("at least one batch is expected, got none")
    if len(listed) > MOST_BATCHES:
        raise InputError(
            f"at most {MOST_BATCHES} batches are expected, since all of them are held in memory, got more: take some, "
            "such as list(itertools.islice(batches, 8))"
        )
    return listed


def _is_pair(batch: Any) -> bool:
    """Whether it is one (inputs, targets) pair: a tuple with a tensor in it, or a list of two tensors."""
    if isinstance(batch, tuple):
        return any(isinstance(member, torch.Tensor) for member in batch)
    return isinstance(batch, list) and len(batch) == 2 and all(isinstance(member, torch.Tensor) for member in batch)


def _device_of_random_states() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")


class _generators_kept:
    """Put back the states of the torch generators that a DataLoader and its samplers own."""

    def __init__(self, loader: Any):
        sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        self._generators = [generator for generator in found if isinstance(generator, torch.Generator)]

    def __enter__(self) -> None:
        self._states = [generator.get_state() for generator in self._generators]

    def __exit__(self, *_: object) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


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


def rows_in(batch: Any) -> int:
    """How many rows a batch has.

    Args:
        batch: a mapping, or inputs and targets.

    Returns:
        The number of rows.

    Raises:
        InputError: for a batch without a tensor.
    """
    if isinstance(batch, Mapping):
        leading = batch.get("labels", batch.get("input_ids"))
    else:
        leading = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
    first = leading if isinstance(leading, torch.Tensor) else next(tensors_of(batch), None)
    if first is None:
        raise InputError("a batch holds no tensor; expected input_ids and labels, or (inputs, targets)")
    return first.shape[0] if first.ndim else 1


def rows_between(batch: Any, start: int, stop: int, rows: int) -> Any:
    """The rows from start to stop of a batch of `rows`. A member without as many rows stays whole."""
    if isinstance(batch, torch.Tensor):
        if batch.layout != torch.strided:
            return batch.index_select(0, torch.arange(start, stop)) if batch.shape[0] == rows else batch
        return batch[start:stop] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {key: rows_between(value, start, stop, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(rows_between(value, start, stop, rows) for value in batch)
    return batch


def concatenated(batches: Sequence[Any]) -> Any:
    """All batches as one, rows after rows, or None where their shapes or members do not allow that."""
    first = batches[0]
    if all(isinstance(batch, torch.Tensor) for batch in batches):
        tails = {(batch.shape[1:], batch.dtype, batch.layout, batch.device) for batch in batches}
        return torch.cat(list(batches)) if len(tails) == 1 and first.ndim else None
    if all(isinstance(batch, Mapping) for batch in batches):
        if len({tuple(batch) for batch in batches}) > 1:
            return None
        members = {key: concatenated([batch[key] for batch in batches]) for key in first}
        return None if any(member is None for member in members.values()) else members
    if all(isinstance(batch, tuple | list) for batch in batches):
        if len({len(batch) for batch in batches}) > 1:
            return None
        members = [concatenated(parts) for parts in zip(*batches, strict=True)]
        return None if any(member is None for member in members) else tuple(members)
    return None


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on a device, its floating-point tensors in `dtype` unless that is None."""
    if isinstance(batch, torch.Tensor):
        batch = batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
        return batch.clone() if batch.is_inference() else batch.detach()
    if isinstance(batch, Mapping):
        return {key: moved(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device, dtype) for value in batch)
    return batch
