"""Batches in the forms that people have: read, cut, joined and moved without a change of their values."""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from oracles import random_state, same_random_state
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spectra import InputError
from spectra.operators.hessian import batches as module
from spectra.operators.hessian.batches import (
    as_batches,
    concatenated,
    constants_in,
    contents_of,
    evenly_spaced_rows,
    kind_of,
    mapped,
    moved,
    rows_between,
    rows_in,
    tensors_of,
    with_tensors,
)

CPU = torch.device("cpu")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
Named = collections.namedtuple("Named", "x y")


@dataclasses.dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "data"


class Settings(dict):
    """A mapping of its own class, as a BatchEncoding."""


SEQUENCES = [torch.randn(length, 2, generator=torch.Generator().manual_seed(length)) for length in (5, 3, 2, 4, 1, 6)]


def packed(sequences=SEQUENCES):
    return pack_sequence(sequences, enforce_sorted=False)


FORMS = [
    X,
    (X, Y),
    [X, Y],
    (X, Y, Y + 1),
    Named(X, Y),
    {"input_ids": X, "labels": Y},
    Settings(input_ids=X, labels=Y),
    {"a": {"b": X}, "labels": Y},
    ({"a": X, "b": 2 * X}, Y),
    ((X, 2 * X), {"a": Y, "b": Y}),
    Data(X, Y),
    (X.relu().to_sparse(), Y),
    (X.relu().to_sparse_csr(), Y),
    ([{"size": i} for i in range(6)], [{"label": y} for y in Y]),
    ([torch.randn(3 + i, 2, generator=torch.Generator().manual_seed(i)) for i in range(6)], Y),
    {"texts": list("abcdef"), "labels": Y},
    (packed(), Y),
]


def leaves(batch):
    """All tensors and plain values of a batch, dense, packed sequences one by one."""
    if isinstance(batch, PackedSequence):
        return unpack_sequence(batch)
    if isinstance(batch, torch.Tensor):
        return [batch if batch.layout == torch.strided else batch.to_dense()]
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    if isinstance(batch, list | tuple):
        return [leaf for value in batch for leaf in leaves(value)]
    if isinstance(batch, Data):
        return leaves((batch.x, batch.y, batch.name))
    return [batch]


def same(one, other):
    return type(one) is type(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves(one), leaves(other), strict=True)
    )


@pytest.mark.parametrize("batch", FORMS)
def test_rows_are_counted_and_cut(batch):
    assert rows_in(batch) == 6
    first, second = rows_between(batch, 0, 2, 6), rows_between(batch, 2, 6, 6)
    assert (rows_in(first), rows_in(second)) == (2, 4)
    assert rows_in(evenly_spaced_rows(batch, 3)) == 3
    assert evenly_spaced_rows(batch, 6) is batch
    assert kind_of(first, 2) == kind_of(second, 4)


@pytest.mark.parametrize("batch", FORMS)
def test_parts_joined_are_the_batch(batch):
    parts = [rows_between(batch, start, stop, 6) for start, stop in ((0, 1), (1, 3), (3, 6))]
    joined = concatenated(parts)
    if isinstance(batch, tuple) and isinstance(batch[0], torch.Tensor) and batch[0].layout == torch.sparse_csr:
        assert joined is None  # torch cannot
    else:
        assert same(joined, batch)


def test_spread_rows_are_those_of_all_members():
    x, y = evenly_spaced_rows((X, Y), 3)
    assert torch.equal(x, X[[0, 2, 4]])
    assert torch.equal(y, Y[[0, 2, 4]])


def test_nested_tensors_are_cut():
    nested = torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged)
    part = rows_between(nested, 1, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(part.unbind(), SEQUENCES[1:3], strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        [(X, Y), (X[:, :3], Y)],
        [{"x": X}, {"y": X}],
        [(X, 1), (X, 2)],
        [(X, torch.tensor(1.0)), (X, torch.tensor(2.0))],
        [(X, Y), (X, Y, Y)],
        [object(), object()],
    ],
)
def test_what_cannot_be_joined_is_not(parts):
    assert concatenated(parts) is None


def test_batches_along_the_second_axis():
    x = torch.randn(5, 6, 2)
    assert torch.equal(concatenated([(x[:, :2], Y), (x[:, 2:], Y)], axis=1)[0], x)


def test_what_is_one_for_all_rows_stays_one():
    mask = torch.ones(3, 3)
    parts = [{"x": X[:2], "mask": mask, "name": "a"}, {"x": X[2:], "mask": mask.clone(), "name": "a"}]
    joined = concatenated(parts)
    assert joined["mask"] is mask
    assert joined["name"] == "a"
    assert constants_in({"x": X, "n": 3, "scale": torch.tensor(2.0)}) == (3.0, 2.0)


@pytest.mark.parametrize("batch", [(), {}, {"a": "b"}, ("a", None), object()])
def test_a_batch_without_tensors_is_a_row(batch):
    assert rows_in(batch) == 1


def test_empty_and_0_dim_tensors():
    assert rows_in(torch.tensor(1.0)) == 1
    assert rows_in((X[:0], Y[:0])) == 0
    assert rows_between((X[:0], Y[:0]), 0, 1, 0)[0].shape == (0, 4)


# -- moved


@pytest.mark.parametrize("batch", FORMS)
def test_moved_batches_have_memory_of_their_own_in_the_same_containers(batch):
    copied = moved(batch, CPU, torch.float64)
    assert type(copied) is type(batch)
    for one, other in zip(leaves(batch), leaves(copied), strict=True):
        if isinstance(one, torch.Tensor):
            assert other.dtype == (torch.float64 if one.is_floating_point() else one.dtype)
            assert torch.equal(one.to(other.dtype), other)
            assert one.data_ptr() != other.data_ptr()


def test_moved_keeps_what_requires_gradients_and_takes_inference_tensors():
    assert moved(X.clone().requires_grad_(), CPU, None).requires_grad
    with torch.inference_mode():
        made = X.clone()
    assert not moved(made, CPU, None).is_inference()


def test_moved_does_not_move_an_object_itself():
    class Graph:
        place = "here"

        def to(self, device):
            self.place = str(device)
            return self

    graph = Graph()
    assert moved(graph, CPU, None).place == "cpu"
    assert graph.place == "here"


def test_attributes_of_a_mapping_stay():
    batch = Settings(x=X)
    batch.note = "kept"
    assert mapped(batch, lambda tensor: tensor + 1).note == "kept"
    assert torch.equal(next(tensors_of(batch)), X)


def test_arrays_and_lists_of_numbers_are_tensors():
    made = with_tensors(
        {"x": X.double().numpy(), "ids": [[1, 2], [3, 4]], "text": ["a"], "ragged": [[1], [2, 3]]}, torch.float32
    )
    assert made["x"].dtype == torch.float32
    assert torch.equal(made["ids"], torch.tensor([[1, 2], [3, 4]]))
    assert made["text"] == ["a"]
    assert [t.tolist() for t in made["ragged"]] == [[1], [2, 3]]


# -- what is given as batches


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return ((X[0], Y[0]) for _ in (itertools.count() if self.count is None else range(self.count)))


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ((X, Y), 1),
        ([X, Y], 1),
        (X, 1),
        ({"x": X}, 1),
        (Data(X, Y), 1),
        (X.numpy(), 1),
        ([(X, Y), (X, Y)], 2),
        ([[X, Y]], 1),
        ([X, X, X], 3),
        ([X, X[:2]], 2),
        (((X, Y), (X, Y)), 2),
        (zip([X, X], [Y, Y], strict=True), 2),
        (((X, Y) for _ in range(3)), 3),
        (DataLoader(TensorDataset(X, Y), batch_size=4), 2),
        (DataLoader(Stream(5), batch_size=2), 3),
    ],
)
def test_lists_of_batches(given, count):
    assert len(as_batches(given)) == count


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ([], "got none"),
        (iter(()), "got none"),
        ("wikitext", "got str"),
        (3.5, "got float"),
        (None, "got NoneType"),
        (TensorDataset(X, Y), "DataLoader"),
        (itertools.repeat((X, Y)), "at most 4096"),
        (DataLoader(Stream(None), batch_size=2), "at most 4096"),
        ([(X, Y)] * 5000, "got 5000"),
    ],
)
def test_what_is_no_list_of_batches_is_refused_in_a_line(given, cause):
    with pytest.raises(InputError, match=cause) as error:
        as_batches(given)
    assert "\n" not in str(error.value)


def test_an_iterator_that_fills_memory_is_refused(monkeypatch):
    monkeypatch.setattr(module.memory, "available", lambda device: 10 * X.nbytes)
    assert len(as_batches(iter([(X,), (X,)]))) == 2
    with pytest.raises(InputError, match="filled half"):
        as_batches(itertools.repeat((X,)))


class Augmented(torch.utils.data.Dataset):
    """Draws from every generator there is, and from its own."""

    def __init__(self):
        self.own = [np.random.default_rng(3), random.Random(4)]

    def __len__(self):
        return 6

    def __getitem__(self, i):
        drawn = torch.rand(1).item() + np.random.rand() + random.random()  # noqa: NPY002
        return X[i] + drawn + self.own[0].random() + self.own[1].random(), Y[i]


def test_reading_a_loader_changes_no_random_state():
    loader = DataLoader(Augmented(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))
    before = random_state()
    first = as_batches(loader)
    assert same_random_state(before, random_state())
    second = as_batches(loader)
    assert same(first, second)  # the generators of the loader and of the dataset are where they were
    assert not torch.equal(torch.cat([y for _, y in first]), Y)  # shuffled all the same


class Noisy:
    """A dataset that draws from generators of its own, held in several ways."""

    def __init__(self):
        state, self.legacy, self.plain = np.random.default_rng(3), np.random.RandomState(4), random.Random(5)
        self.generators = {"torch": torch.Generator().manual_seed(6)}
        empty = None

        def draw():
            return float(state.normal()) + (empty or 0)

        self.draw, self.shake = draw, Shaker().shake

    def __len__(self):
        return 4

    def __getitem__(self, index):
        drawn = torch.randn(1, generator=self.generators["torch"])
        return X[index] + self.draw() + self.legacy.normal() + self.plain.random() + self.shake() + drawn, Y[index]


class Shaker:
    def __init__(self):
        self.state = np.random.default_rng(7)

    def shake(self):
        return float(self.state.normal())


def test_every_kind_of_generator_of_a_dataset_is_put_back():
    loader = DataLoader(Noisy(), batch_size=2)
    one, other = as_batches(loader), as_batches(loader)
    assert same(one, other)
    plain, _ = next(iter(loader))
    assert torch.equal(plain, one[0][0])
    again, _ = next(iter(loader))
    assert not torch.equal(plain, again)


class Frozen(dict):
    """A mapping that cannot be written to."""

    def __setitem__(self, key, value):
        raise TypeError("frozen")


def test_containers_that_cannot_be_made_again_become_plain_ones():
    assert type(mapped(torch.Size([2, 3]), lambda t: t)) is torch.Size
    made = rows_between((torch.Size([2]), X), 0, 2, 6)
    assert torch.equal(made[1], X[:2])
    found = mapped(Frozen(x=X), lambda tensor: 2 * tensor)
    assert torch.equal(found["x"], 2 * X)
    odd = module.like(torch.Size([1]), ["a", X])
    assert odd == ("a", X)


def test_a_packed_sequence_alone_has_a_row_for_each_sequence():
    assert rows_in(packed()) == 6
    assert rows_in(packed(SEQUENCES[:4])) == 4
    assert rows_in(({"x": X}, packed(SEQUENCES[:2]))) == 2


def test_constants_are_the_numbers_that_belong_to_no_row():
    assert constants_in({"x": X, "scale": 2, "size": torch.tensor(3.0), "part": 0.5, "name": "a"}) == (2.0, 3.0, 0.5)
    assert constants_in((X, 2.0)) == ()


def test_lists_with_an_item_a_row_are_joined():
    parts = [{"texts": list("ab"), "labels": Y[:2]}, {"texts": list("cde"), "labels": Y[2:5]}]
    joined = concatenated(parts)
    assert joined["texts"] == list("abcde")
    assert torch.equal(joined["labels"], Y[:5])
    sizes = concatenated([([{"size": 1}], Y[:1]), ([{"size": 2}, {"size": 3}], Y[1:3])])
    assert [item["size"] for item in sizes[0]] == [1, 2, 3]


def test_numbers_in_lists_of_lists_become_tensors_and_others_stay():
    assert torch.equal(with_tensors([[1.5, 2.0], [0.0, 1.0]], torch.float64), torch.tensor([[1.5, 2], [0, 1]]).double())
    assert with_tensors([["a"], ["b"]], torch.float64) == [["a"], ["b"]]
    assert with_tensors([1, "a"], torch.float64) == [1, "a"]


def test_generators_are_looked_for_in_so_many_places_and_no_more():
    """Sixteen members of a list, 64 attributes, and so deep."""
    many = [random.Random(i) for i in range(80)]
    assert list(module._generators_in([many])) == many[:16]
    holder = type("Holder", (), {})()
    holder.__dict__.update({f"a{i}": generator for i, generator in enumerate(many)})
    assert list(module._generators_in(holder)) == many[:64]
    nested = many[0]
    for _ in range(module.SEARCH_DEPTH - 1):
        nested = [nested]
    assert list(module._generators_in(nested)) == many[:1]
    assert list(module._generators_in([nested])) == []


class Image:
    """An object that numpy reads as an array, without one among its attributes."""

    __slots__ = ("_size",)

    def __init__(self, size):
        self._size = size

    def __array__(self, dtype=None, copy=None):
        return np.arange(self._size, dtype=dtype)


def test_contents_are_told_apart_by_numbers_texts_and_arrays():
    def contents(*members):
        return [item if isinstance(item, bytes) else item.tolist() for item in contents_of((X, *members))]

    same_again = [("a", 1, 2.5, b"b"), (np.arange(3),), (Image(3),)]
    for members in same_again:
        assert contents(*members) == contents(*members)
        assert contents(*members)[0] == X.tolist()
        assert len(contents(*members)) == 1 + len(members) + isinstance(members[0], Image)
    others = [("a", 1, 2.5, b"c"), ("a", 2, 2.5, b"b"), (np.arange(4),), (np.arange(3.0),), (Image(4),)]
    found = [contents(*members) for members in same_again + others]
    assert all(one != other for one, other in itertools.combinations(found, 2))
