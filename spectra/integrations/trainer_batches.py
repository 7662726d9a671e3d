"""The first batches of a Trainer's training data, drawn so that the training does not notice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from spectra.backend.errors import InputError
from spectra.runs.kept import randomness_kept
from spectra.runs.object_state import held, kept
from spectra.runs.provenance import fingerprint

DRAWN = "the training data are drawn at random (collator or data set): one draw of them, fixed by the seed, is measured"


def first_batches(loader: DataLoader, count: int, *, rows: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Take the first batches of a loader's data set, in the data set's order.

    The loader itself is not iterated: that would advance its sampler and change the training data. Random numbers come
    from the seed, so that a training that goes on is measured on the same batches; every random state, and what data
    set and collator hold, is put back.

    Args:
        loader: The loader.
        count: How many batches.
        rows: How many rows each batch has; the last may have fewer.
        seed: Of the random numbers that data set and collator draw.

    Returns:
        The batches, collated as the loader does, and notes on them.

    Raises:
        InputError: If the data set can be read only once, or is empty.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not callable(getattr(loader, "collate_fn", None)):
        raise InputError(f"batches cannot be taken from a {type(loader).__name__}: pass batches=[...]")
    if _is_iterated(dataset):
        _refuse_what_is_read_once(dataset)
    batches = _draw(loader, count, rows, seed)
    if not batches:
        raise InputError("the training data hold no rows: pass batches=[...]")
    drawn = fingerprint(batches) != fingerprint(_draw(loader, count, rows, seed + 1))
    return batches, [DRAWN] if drawn else []


def _draw(loader: DataLoader, count: int, rows: int, seed: int) -> list[Any]:
    """The first batches, with the random numbers of a seed."""
    dataset, collate = loader.dataset, loader.collate_fn
    with randomness_kept(), kept(dataset, collate):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002, what collators draw from
        torch.manual_seed(seed)
        for generator in held(dataset, collate):  # those of their own are in the middle of a training that goes on
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        items = iter(dataset) if _is_iterated(dataset) else _in_order(dataset)
        if loader.batch_size is None and loader.batch_sampler is None:  # the data set yields whole batches
            return [collate(item) for item in itertools.islice(items, count)]
        chunks = (list(itertools.islice(items, rows)) for _ in range(count))
        return [collate(chunk) for chunk in chunks if chunk]


def _in_order(dataset: Any) -> Iterator[Any]:
    return (dataset[i] for i in range(len(dataset)))


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
