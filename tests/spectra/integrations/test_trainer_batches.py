"""The first batches of a loader, drawn by its own samplers, and the loader as it was."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import random_state, same_random_state
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import spectra

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from spectra.integrations.trainer_batches import DRAWN, first_batches  # noqa: E402


class Rows(Dataset):
    """Row i is i, and what the random numbers asked for add."""

    def __init__(self, count=24, draws=(), many=False):
        self.count, self.draws, self.reads = count, draws, 0
        self.own = {"numpy": np.random.default_rng(0), "torch": torch.Generator().manual_seed(0)}
        if many:
            self.__getitems__ = lambda indices: [self[i] for i in indices]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.reads += 1
        value = float(i)
        if "global" in self.draws:
            value += random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        if "own" in self.draws:
            value += self.own["numpy"].random() + float(torch.rand((), generator=self.own["torch"]))
        return torch.tensor([value])


class ByLength(Sampler):
    """Batches of several sizes, in another order in every epoch, from a state of its own."""

    def __init__(self):
        self.epoch, self.order = 0, np.arange(100_000)

    def __len__(self):
        return 3

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        np.random.default_rng(self.epoch).shuffle(self.order)
        chosen = [int(i) % 24 for i in self.order[:9]]
        yield from (chosen[:2], chosen[2:3], chosen[3:])


class Stream(IterableDataset):
    def __init__(self, count=24):
        self.count, self.opened = count, 0

    def __iter__(self):
        self.opened += 1
        return (torch.tensor([float(i)]) for i in range(self.count))


class Blocks(IterableDataset):
    """Whole batches."""

    def __iter__(self):
        return (torch.full((3, 1), float(i)) for i in range(4))


class Twice(DataLoader):
    """Yields what its own `__iter__` makes of the batches."""

    def __iter__(self):
        for batch in super().__iter__():
            yield 2 * batch


class Bare:
    """No DataLoader, and without a data set."""

    def __init__(self, loader):
        self.loader, self.epochs = loader, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epochs += 1
        for batch in self.loader:
            yield {"x": batch}


def shuffled(*_):
    return DataLoader(Rows(), batch_size=4, shuffle=True)


LOADERS = {
    "in order": lambda: DataLoader(Rows(), batch_size=4),
    "several at once": lambda: DataLoader(Rows(many=True), batch_size=4),
    "sampler": lambda: DataLoader(Rows(), batch_size=4, sampler=[5, 3, 1, 2, 0, 4, 9]),
    "batch sampler": lambda: DataLoader(Rows(), batch_sampler=BatchSampler([7, 6, 5, 4, 3], 2, drop_last=False)),
    "epochs of its own": lambda: DataLoader(Rows(), batch_sampler=ByLength()),
    "no batches": lambda: DataLoader(Rows(), batch_size=None, sampler=[3, 1, 2]),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "short stream": lambda: DataLoader(Stream(6), batch_size=4),
    "short stream, drop last": lambda: DataLoader(Stream(6), batch_size=4, drop_last=True),
    "whole batches": lambda: DataLoader(Blocks(), batch_size=None),
    "own __iter__": lambda: Twice(Rows(), batch_size=4),
    "bare": lambda: Bare(DataLoader(Rows(), batch_size=4)),
    "accelerate": lambda: accelerate.Accelerator(cpu=True).prepare(DataLoader(Rows(), batch_size=4)),
    "accelerate, stream": lambda: accelerate.Accelerator(cpu=True).prepare(DataLoader(Stream(), batch_size=4)),
    "accelerate, epochs": lambda: accelerate.Accelerator(cpu=True).prepare(
        DataLoader(Rows(), batch_sampler=ByLength())
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_batches_are_those_that_the_loader_yields_first(kind):
    expected = list(itertools.islice(LOADERS[kind](), 3))
    batches, notes = first_batches(LOADERS[kind](), 3)
    assert len(batches) == len(expected) > 0
    for one, other in zip(batches, expected, strict=True):
        one, other = (batch["x"] if isinstance(batch, dict) else batch for batch in (one, other))
        assert torch.equal(one, other)
    assert notes == []


RANDOM = {
    "shuffled": shuffled,
    "generator": lambda: DataLoader(Rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "workers": lambda: DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True),
    "bare": lambda: Bare(shuffled()),
    "augmented": lambda: DataLoader(Rows(draws=("global",)), batch_size=4, shuffle=True),
    "own generators": lambda: DataLoader(Rows(draws=("own",)), batch_size=4, shuffle=True),
    "accelerate": lambda: accelerate.Accelerator(cpu=True).prepare(shuffled()),
    "accelerate, seedable": lambda: accelerate.Accelerator(
        cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
    ).prepare(shuffled()),
    "epochs of its own": LOADERS["epochs of its own"],
    "stream": LOADERS["stream"],
}


def values(batches):
    return torch.cat([batch["x"] if isinstance(batch, dict) else batch for batch in batches])


@pytest.mark.parametrize("kind", RANDOM)
def test_the_loader_yields_what_it_would_have_before_and_in_the_middle_of_an_epoch(kind):
    seen = []
    for watched in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        loader = RANDOM[kind]()
        if watched:
            states = random_state()
            first_batches(loader, 2)
            assert same_random_state(random_state(), states)
        iterator = iter(loader)
        got = [next(iterator)]
        if watched and kind != "workers":  # these start another process for what is drawn meanwhile
            first_batches(loader, 2)
        got += list(iterator)
        seen.append(values(got + list(loader)))
    assert torch.equal(*seen)


@pytest.mark.parametrize("kind", RANDOM)
def test_a_training_that_goes_on_draws_the_same_batches(kind):
    """Whatever was drawn before, in this process or in another; a sampler's own order only in another."""
    torch.manual_seed(1)
    loader = RANDOM[kind]()
    before = values(first_batches(loader, 3)[0])
    list(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(3)
    torch.rand(7)
    if kind != "epochs of its own":
        assert torch.equal(values(first_batches(loader, 3)[0]), before)
    torch.manual_seed(1)
    assert torch.equal(values(first_batches(RANDOM[kind](), 3)[0]), before)


def test_a_shuffled_loader_is_shuffled_by_the_seed():
    one, other = (values(first_batches(shuffled(), 6, seed=seed)[0]).flatten().tolist() for seed in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other) == list(range(24))


@pytest.mark.parametrize("draws", ["global", "own"])
def test_random_content_is_said_and_random_order_is_not(draws):
    assert first_batches(DataLoader(Rows(draws=(draws,)), batch_size=4), 2)[1] == [DRAWN]
    assert first_batches(shuffled(), 2)[1] == []


def test_only_what_is_taken_is_read():
    class Endless(Sampler):
        def __iter__(self):
            return itertools.cycle([2, 1])

    data = Rows()
    batches, _ = first_batches(DataLoader(data, batch_size=2, sampler=Endless()), 2)
    assert [batch.flatten().tolist() for batch in batches] == [[2, 1], [2, 1]]
    assert data.reads == 0  # counted, and put back


def test_what_an_iterator_does_at_its_end_is_put_back():
    class Closing(Sampler):
        def __init__(self):
            self.closed = 0

        def __iter__(self):
            try:
                yield from range(24)
            finally:
                self.closed += 1

    sampler = Closing()
    first_batches(DataLoader(Rows(), batch_size=4, sampler=sampler), 2)
    assert sampler.closed == 0


class Once(IterableDataset):
    def __init__(self):
        self.rows = iter([torch.ones(1)] * 8)

    def __iter__(self):
        return self.rows


REFUSED = {
    "generator": lambda: (torch.ones(2) for _ in range(3)),
    "iterator": lambda: iter(DataLoader(Rows(), batch_size=4)),
    "no loader": lambda: SimpleNamespace(),
    "data read once": lambda: DataLoader(Once(), batch_size=4),
    "bare, read once": lambda: Bare(x for x in range(3)),
    "empty": lambda: DataLoader(Stream(0), batch_size=4),
    "empty sampler": lambda: DataLoader(Rows(), batch_size=4, sampler=[]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_drawn_from_is_refused(kind):
    loader = REFUSED[kind]()
    with pytest.raises(spectra.InputError, match=r"pass batches=|batches= that read") as caught:
        first_batches(loader, 2)
    assert "\n" not in str(caught.value)
    if kind in ("generator", "iterator"):
        assert len(list(loader)) == (3 if kind == "generator" else 6)
    if kind == "data read once":
        assert len(list(loader.dataset)) == 8


def test_a_random_sampler_in_a_batch_sampler_of_a_library():
    """As transformers and accelerate nest them."""
    sampler = BatchSampler(RandomSampler(range(24), generator=torch.Generator().manual_seed(3)), 4, drop_last=True)
    loader = DataLoader(Rows(), batch_sampler=sampler)
    before = sampler.sampler.generator.get_state()
    first_batches(loader, 2)
    assert torch.equal(sampler.sampler.generator.get_state(), before)
