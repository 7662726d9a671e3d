"""What a call may change is put back: one case a kind of state, each changed for good without the guard."""

import array
import collections
import dataclasses
import functools
import itertools
import queue
import random
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import spectra
from spectra.runs.object_state import BUDGET, Holder, held, kept, modules_in

history = []
count = 0
names = iter(["a", "b", "c"])
lines = (line for line in ["a", "b", "c"])
helper_log = []


def helper():
    helper_log.append(1)


class Slotted:
    __slots__ = ("__hidden", "value")

    def __init__(self):
        self.value, self.__hidden = 0, 0

    def change(self):
        self.value += 1
        self.__hidden += 1

    def state(self):
        return self.value, self.__hidden


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: int = 0

    def change(self):
        object.__setattr__(self, "value", self.value + 1)

    def state(self):
        return self.value


class Shared:
    """Counts on its class."""

    total = 0
    seen = []  # noqa: RUF012, the mistake that people make

    def change(self):
        Shared.total += 1
        self.seen.append(1)
        Shared.last = self.total

    def state(self):
        return Shared.total, list(self.seen), hasattr(Shared, "last")


class Global:
    """Changes globals, by functions and by a class of this module."""

    def change(self):
        global count
        count += 1
        history.append(count)
        (lambda: helper())()

    def state(self):
        return count, list(history), list(helper_log)


class Wary(dict):
    """Counts what is written to it."""

    def __init__(self, *given):
        super().__init__(*given)
        self.writes = 0

    def __setitem__(self, key, value):
        self.writes += 1
        super().__setitem__(key, value)

    def update(self, *_):
        raise AssertionError


class Holding:
    """Holds one object, and changes it."""

    def __init__(self, value, change, state):
        self.value, self._change, self._state = value, change, state

    def change(self):
        self._change(self.value)

    def state(self):
        return self._state(self.value)


def closure():
    calls, total, rest = [], 0, iter([1, 2, 3])

    def change():
        nonlocal total
        total += next(rest)
        calls.append(total)

    change.change, change.state = change, lambda: (list(calls), total)
    return change


def defaults():
    def change(seen=[], *, table={}):  # noqa: B006, the mistake that people make
        change.calls += 1
        seen.append(1)
        table[len(table)] = 1

    change.calls = 0
    change.change = change
    change.state = lambda: (list(change.__defaults__[0]), dict(change.__kwdefaults__["table"]), change.calls)
    return change


def bound_weights():
    return types.SimpleNamespace(inner=[{"weights": torch.ones(3)}])


KINDS = {
    "closure": closure,
    "defaults": defaults,
    "slots": Slotted,
    "frozen": Frozen,
    "class": Shared,
    "globals": Global,
    "list": lambda: Holding([1], lambda x: x.append(2), list),
    "order of a list": lambda: Holding(list(range(9)), random.Random(0).shuffle, list),
    "dict": lambda: Holding({"a": 1}, lambda x: x.update(a=2, b=3), dict),
    "order of a dict": lambda: Holding({"a": 1, "b": 2}, lambda x: x.update(a=x.pop("a")), lambda x: list(x.items())),
    "ordered dict": lambda: Holding(
        collections.OrderedDict(a=1, b=2), lambda x: x.move_to_end("a"), lambda x: list(x.items())
    ),
    "default dict": lambda: Holding(collections.defaultdict(list), lambda x: x["new"].append(1), dict),
    "counter": lambda: Holding(collections.Counter("ab"), lambda x: x.update("b"), dict),
    "set": lambda: Holding({1}, lambda x: x.add(2), sorted),
    "deque": lambda: Holding(collections.deque([1, 2], maxlen=2), lambda x: x.append(3), lambda x: (list(x), x.maxlen)),
    "dict of its own": lambda: Holding(
        Wary({"a": 1}), lambda x: x.__setitem__("a", 2), lambda x: (list(x.items()), x.writes)
    ),
    "user list": lambda: Holding(collections.UserList([1]), lambda x: x.append(2), list),
    "array": lambda: Holding(array.array("d", [1.0]), lambda x: x.append(2.0), list),
    "bytes": lambda: Holding(bytearray(b"a"), lambda x: x.extend(b"b"), bytes),
    "tensor": lambda: Holding(torch.ones(3), lambda x: x.mul_(2), torch.Tensor.tolist),
    "learned tensor": lambda: Holding(
        torch.ones(3, requires_grad=True),
        lambda x: (x.sum().backward(), x.data.mul_(2), x.detach().add_(1)),
        lambda x: (x.tolist(), x.grad),
    ),
    "numpy": lambda: Holding(np.ones(3), lambda x: x.__imul__(2), list),
    "deep": lambda: Holding(bound_weights(), lambda x: x.inner[0]["weights"].mul_(2), lambda x: repr(x)),
    "partial": lambda: functools.partial(Holding([1], lambda x: x.append(2), list).change),
    "torch generator": lambda: Holding(
        torch.Generator().manual_seed(0), lambda x: torch.rand(2, generator=x), lambda x: x.get_state().tolist()
    ),
    "numpy generator": lambda: Holding(
        np.random.default_rng(0), lambda x: x.random(), lambda x: str(x.bit_generator.state)
    ),
    "numpy bits": lambda: Holding(np.random.PCG64(0), lambda x: x.random_raw(), lambda x: str(x.state)),
    "numpy random state": lambda: Holding(
        np.random.RandomState(0), lambda x: x.rand(), lambda x: [*x.get_state()[1].tolist(), x.get_state()[2]]
    ),
    "python generator": lambda: Holding(random.Random(0), lambda x: x.random(), lambda x: x.getstate()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_is_put_back(kind):
    item = KINDS[kind]()
    owner = item.func.__self__ if kind == "partial" else item
    change = item if kind == "partial" else item.change
    before = owner.state()
    with kept(item):
        change()
        change()
        assert owner.state() != before
    assert owner.state() == before
    change()
    assert owner.state() != before  # and the case is one that can fail


def test_everything_is_put_back_also_where_the_call_raises():
    item, other = KINDS["list"](), KINDS["numpy"]()

    def call():
        with kept(item, other):
            item.change()
            other.change()
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert (item.state(), other.state()) == ([1], [1, 1, 1])


def test_what_cannot_be_put_back_keeps_nothing_else_from_it():
    class Stubborn(random.Random):
        def setstate(self, state):
            raise OSError("no")

    first, last = KINDS["list"](), KINDS["dict"]()

    def call():
        with kept(first, Stubborn(), last):
            first.change()
            last.change()

    with pytest.raises(OSError, match="no"):
        call()
    assert (first.state(), last.state()) == ([1], {"a": 1})


def test_a_tensor_that_was_not_written_to_keeps_its_version():
    """A graph that holds it stays valid."""
    tensor = torch.ones(3)
    with kept([tensor]):
        pass
    assert tensor._version == 0


# -- large state


def test_large_tensors_hold_data_and_the_budget_is_for_all_together():
    tensors = [torch.zeros(40), torch.zeros(100), torch.zeros(40)]
    with kept(tensors, budget=90):
        for tensor in tensors:
            tensor.add_(1)
    assert [float(tensor[0]) for tensor in tensors] == [0, 1, 0]


def test_arrays_of_a_sampler_are_within_the_budget():
    order = np.arange(1_000_000)
    with kept(types.SimpleNamespace(order=order)):
        np.random.default_rng(0).shuffle(order)
    assert np.array_equal(order, np.arange(1_000_000))
    assert order.size < BUDGET


def test_large_containers_lose_what_was_added():
    items, table = list(range(100)), dict.fromkeys(range(100))
    with kept([items, table], budget=50):
        items.append(1)
        table["new"] = 1
    assert (len(items), len(table)) == (100, 100)


def test_members_of_large_containers_are_not_walked_through():
    rows = [types.SimpleNamespace(x=i) for i in range(1000)]
    assert len(list(held(rows))) == 1


# -- what is left alone


def test_objects_that_threads_work_on_go_on():
    """A batch that a thread hands over meanwhile is not lost."""

    class Prefetcher:
        def __init__(self):
            self.ready, self.queue = collections.deque(), queue.Queue()
            self.thread = threading.Thread(target=self.run)

        def run(self):
            self.ready.append(1)
            self.queue.put(1)

    prefetcher = Prefetcher()
    with kept(prefetcher, prefetcher.queue):
        prefetcher.thread.start()
        prefetcher.thread.join()
    assert (len(prefetcher.ready), prefetcher.queue.qsize()) == (1, 1)


def test_records_of_a_probe_are_no_state_of_a_loss():
    def loss(model, batch):
        return (watching[0] and 0.0) or model(batch).square().mean()

    model = nn.Linear(3, 2)
    watching = [None]
    watching[0] = spectra.SpectrumProbe(model, [torch.randn(5, 3)], loss=loss, probes=1, steps=2)
    assert len(watching[0].measure(0)) == len(watching[0].records) == 1


def test_modules_are_found_and_left_to_others():
    inner, outer = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    owner = types.SimpleNamespace(parts=[{"a": inner}], outer=outer)
    assert set(modules_in(owner)) == {inner, outer}
    assert modules_in(outer) == [outer]
    assert not any(isinstance(item, nn.Module) for item in held(owner))


def test_a_holder_says_what_is_looked_at():
    class Chosen(Holder):
        def __init__(self):
            self.data, self.other = [1], [1]

        def holds(self):
            return [self.data]

    chosen = Chosen()
    with kept(chosen):
        chosen.data.append(2)
        chosen.other.append(2)
    assert (chosen.data, chosen.other) == ([1], [1, 2])


# -- iterators

COPIED = {
    "list": lambda: iter([1, 2, 3]),
    "reversed": lambda: reversed([1, 2, 3]),
    "tuple": lambda: iter((1, 2, 3)),
    "dict": lambda: iter({1: 1, 2: 2, 3: 3}),
    "values": lambda: iter({1: 1, 2: 2}.values()),
    "items": lambda: iter({1: 1, 2: 2}.items()),
    "set": lambda: iter({1, 2, 3}),
    "text": lambda: iter("abc"),
    "range": lambda: iter(range(3)),
    "count": lambda: itertools.count(3),
}
REFUSED = {
    "generator": lambda: (i for i in range(3)),
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "map": lambda: map(abs, [1, 2, 3]),
    "zip": lambda: zip([1, 2], [3, 4], strict=True),
    "loader": lambda: iter(DataLoader([1, 2, 3])),
}
PLACES = {
    "attribute": lambda it: types.SimpleNamespace(at=it),
    "dict": lambda it: {"at": it},
    "list": lambda it: [it],
    "closure": lambda it: lambda: next(it),
    "deep": lambda it: types.SimpleNamespace(inner=[{"at": it}]),
}


def read(place):
    """The next item of the iterator that an owner holds somewhere inside."""
    if callable(place):
        return place()
    while not hasattr(place, "__next__"):
        members = (
            place if isinstance(place, list) else place.values() if isinstance(place, dict) else vars(place).values()
        )
        (place,) = members
    return next(place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", COPIED)
def test_iterators_over_plain_containers_are_read_in_copy(kind, place):
    make = COPIED[kind]
    expected = list(itertools.islice(make(), 3))
    iterator = make()
    next(iterator)
    owner = PLACES[place](iterator)
    with kept(owner):
        assert read(owner) == expected[1]
    assert list(itertools.islice(iterator, len(expected) - 1)) == expected[1:]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REFUSED)
def test_other_iterators_refuse_to_be_read(kind, place):
    iterator = REFUSED[kind]()
    owner = PLACES[place](iterator)
    with kept(owner), pytest.raises(spectra.InputError, match="can be read only once") as caught:
        read(owner)
    assert "\n" not in str(caught.value)
    assert len(list(itertools.islice(iterator, 2))) == 2  # nothing was lost
    assert owner is not None


def test_iterators_among_globals():
    def copied():
        return next(names)

    def refused():
        return next(lines)

    with kept(copied, refused):
        assert copied() == "a"
        with pytest.raises(spectra.InputError, match="generator"):
            refused()
    assert (next(names), next(lines)) == ("a", "a")


def test_an_iterator_with_attributes_is_put_back_as_an_object():
    class Counting:
        def __init__(self):
            self.n = 0

        def __next__(self):
            self.n += 1
            return self.n

        def __iter__(self):
            return self

    counting = Counting()
    with kept(counting):
        assert next(counting) == 1
    assert next(counting) == 1


def test_a_loader_with_persistent_workers_gives_others_meanwhile():
    loader = DataLoader(list(range(6)), num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    first = next(iterator)
    workers = [worker.pid for worker in iterator._workers]
    with kept(loader):
        assert len(list(loader)) == 6
    assert len(list(iterator)) == 5
    assert first == 0
    assert [worker.pid for worker in loader._iterator._workers] == workers
