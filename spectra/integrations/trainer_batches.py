"""The first batches of a Trainer's training data, drawn by its own loader so that the training does not notice."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from spectra.backend.errors import InputError
from spectra.runs.kept import randomness_kept
from spectra.runs.object_state import held, kept
from spectra.runs.provenance import fingerprint

DRAWN = "the training data are drawn at random (collator or data set): one draw of them, fixed by the seed, is measured"
EPOCH_DEPTH = 4  # objects between a loader and one that counts epochs
PARTS = ("batch_sampler", "sampler", "dataset", "collate_fn")


def first_batches(loader: Any, count: int, *, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Take the batches that a loader yields first, in the order of its own sampler or batch sampler.

    Order and content are those of the first epoch, with random numbers from the seed, so that a training that goes on
    is measured on the same batches. Every random state, and what loader, samplers, data set and collator hold, is put
    back. A DataLoader is not iterated, which would start its workers: its indices are drawn and collated here. A loader
    of another class, or with an `__iter__` of its own, is iterated.

    Args:
        loader: The loader.
        count: How many batches; fewer where it yields fewer.
        seed: Of the random numbers that samplers, data set and collator draw.

    Returns:
        The batches, and notes on them.

    Raises:
        InputError: If the data can be read only once, or are empty.
    """
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise InputError(f"batches cannot be taken from a {type(loader).__name__}: pass batches=[...]")
    draw = _way_to_draw(loader, count, seed)
    drawn = []
    for each in (seed, seed + 1):
        with _first_epoch(loader, each):
            drawn.append(draw())
    if not drawn[0]:
        raise InputError("the training data hold no rows: pass batches=[...]")
    return drawn[0], [DRAWN] if fingerprint(drawn[0]) != fingerprint(drawn[1]) else []


def _way_to_draw(loader: Any, count: int, seed: int) -> Callable[[], list[Any]]:
    """A function that draws the batches of a loader anew, for a map-style data set in one order."""
    if not _is_plain(loader):
        return lambda: _taken(loader, count)
    if _is_iterated(loader.dataset):
        _refuse_what_is_read_once(loader.dataset)
        return lambda: _of_rows_in_turn(loader, count)
    with _first_epoch(loader, seed):
        order = _taken(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, count)
    return lambda: [_of_rows(loader, indices) for indices in order]


def _is_plain(loader: Any) -> bool:
    """Whether a loader yields what its samplers, data set and collator make, and no `__iter__` changes that."""
    if type(loader).__module__ == "accelerate.data_loader":
        return _is_plain(getattr(loader, "base_dataloader", None))
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


@contextlib.contextmanager
def _first_epoch(loader: Any, seed: int) -> Iterator[None]:
    """Random states from a seed, and samplers and data sets in their first epoch; all is put back."""
    parts = [loader, *(getattr(loader, name, None) for name in PARTS)]
    with randomness_kept(), kept(*parts):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002, what collators draw from
        torch.manual_seed(seed)
        for item in held(*parts):  # those of their own are in the middle of a training that goes on
            _seed(item, seed)
        for item in held(*parts, depth=EPOCH_DEPTH):
            if not isinstance(item, type) and callable(getattr(item, "set_epoch", None)):
                item.set_epoch(0)
        yield


def _seed(generator: Any, seed: int) -> None:
    """Seed an object, if it is a random generator."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, random.Random | np.random.RandomState):
        generator.seed(seed % 2**32)


def _taken(items: Iterable[Any], count: int) -> list[Any]:
    """The first items. What an iterator does at its end it does here, while its state is put back afterwards."""
    iterator = iter(items)
    taken = list(itertools.islice(iterator, count))
    if callable(close := getattr(iterator, "close", None)):
        close()
    return taken


def _of_rows(loader: DataLoader, indices: Any) -> Any:
    """The batch of some indices; of one index where the loader does not batch."""
    dataset: Any = loader.dataset
    collate: Any = loader.collate_fn
    if loader.batch_sampler is None:
        return collate(dataset[indices])
    if hasattr(dataset, "__getitems__"):
        return collate(dataset.__getitems__(list(indices)))
    return collate([dataset[index] for index in indices])


def _of_rows_in_turn(loader: DataLoader, count: int) -> list[Any]:
    """The batches of a data set that is iterated."""
    dataset: Any = loader.dataset
    if loader.batch_size is None:  # the data set yields whole batches
        return [loader.collate_fn(item) for item in _taken(dataset, count)]
    size = loader.batch_size
    rows = _taken(dataset, count * size)
    chunks = (rows[start : start + size] for start in range(0, len(rows), size))
    return [loader.collate_fn(chunk) for chunk in chunks if len(chunk) == size or not loader.drop_last]


def _is_iterated(dataset: Any) -> bool:
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return isinstance(dataset, IterableDataset) or not indexed


def _refuse_what_is_read_once(dataset: Any) -> None:
    """Raise InputError if the data set holds an iterator, such as a generator or an open file: rows would be lost."""
    if any(isinstance(item, Iterator) for item in held(dataset)):
        raise InputError(
            "the training data hold an iterator that can be read only once, and the training would miss what is "
            "measured: pass batches=[...]"
        )
