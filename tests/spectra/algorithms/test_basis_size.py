"""A search for eigenpairs in short memory holds fewer vectors, or keeps them on the host, and finds the same pairs."""

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms import krylov_search, topk
from spectra.algorithms.basis_size import (
    MEMORY_PART,
    WORK_VECTORS,
    Basis,
    choose_basis,
    comfortable,
    fewest,
    vectors_to_reserve,
)
from spectra.algorithms.topk import default_basis_size
from spectra.algorithms.wrapped import HostOperator
from spectra.backend import memory
from spectra.backend.memory import AllocationMeter

N = 100_000
OUTLIERS = np.array([9.0, -7.0, 5.5, 4.0, 3.0, -2.5, 2.0, 1.8])


def operator(n=N):
    values = np.random.default_rng(0).uniform(-1, 1, size=n)
    values[: len(OUTLIERS)] = OUTLIERS
    return spectra.DiagonalOperator(values)


def shorten(monkeypatch, op, vectors, host=None):
    """Make a search think that this many vectors fit in all, and another number in host memory."""

    def available(device):
        count = host if host is not None and device.type == "cpu" else vectors
        return int(count * op.vector_bytes / MEMORY_PART) + 8

    monkeypatch.setattr(memory, "available", available)


class OnDevice(spectra.LinearOperator):
    """Says that it is on a GPU."""

    def __init__(self, inner):
        self.inner, self.shape, self.dtype = inner, inner.shape, inner.dtype
        self.device = torch.device("cuda")


def test_what_fits_is_as_wanted(monkeypatch):
    op = operator()
    for k in (1, 8, 40):
        wanted = default_basis_size(k)
        shorten(monkeypatch, op, wanted + k + WORK_VECTORS)
        assert choose_basis(op, k, wanted) == Basis(k, wanted)
        shorten(monkeypatch, op, wanted + k + WORK_VECTORS - 1)
        assert choose_basis(op, k, wanted).size == wanted - 1


def test_a_basis_goes_to_the_host_before_it_gets_too_small(monkeypatch):
    op, k = OnDevice(operator()), 8
    least = comfortable(k) + k + WORK_VECTORS
    shorten(monkeypatch, op, least, host=1000)
    assert choose_basis(op, k, 40) == Basis(k, comfortable(k), can_move=True)
    shorten(monkeypatch, op, least - 1, host=1000)
    assert choose_basis(op, k, 40) == Basis(k, 40, on_host=True, can_move=True)
    shorten(monkeypatch, op, fewest(k) + k + WORK_VECTORS, host=1)
    assert choose_basis(op, k, 40) == Basis(k, fewest(k), can_move=True)
    op.spread = "batches"  # the host of one rank says nothing of the others'
    shorten(monkeypatch, op, k, host=1000)
    monkeypatch.setattr("spectra.backend.ranks.all_reduce_min", lambda count, device: count)
    with pytest.raises(spectra.InputError, match="use a device with more memory"):
        choose_basis(op, k, 40)


def test_bases_step_down_to_nothing():
    sizes, basis = [], Basis(20, 70, can_move=True)
    while basis is not None:
        sizes.append((basis.size, basis.on_host))
        basis = basis.smaller()
    assert sizes == [(70, False), (46, False), (30, False), (30, True), (25, True)]


@pytest.mark.parametrize("vectors", [8 + fewest(8) + WORK_VECTORS, 36])
def test_a_search_keeps_to_the_memory_there_is(monkeypatch, vectors):
    """All allocations are counted, those of restarts, of the search for missed pairs, and of the result among them."""
    op = operator()
    monkeypatch.setattr(krylov_search, "SLICE_BYTES", 1 << 20)
    shorten(monkeypatch, op, vectors)
    with AllocationMeter() as meter:
        pairs = spectra.topk(op, 8)
    assert meter.peak <= vectors * op.vector_bytes + (2 << 20)
    assert pairs.products > choose_basis(op, 8, 40).size  # it has restarted
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, np.sort(OUTLIERS), rtol=1e-6)


def test_rotation_in_slices_is_that_of_the_whole(monkeypatch):
    op = operator()
    want = spectra.topk(op, 8, basis=20)
    monkeypatch.setattr(krylov_search, "MEMORY_PART", 0.0)
    monkeypatch.setattr(krylov_search, "SLICE_BYTES", 1 << 20)
    got = spectra.topk(op, 8, basis=20)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-6)
    assert (want.vectors.T @ got.vectors).diagonal().abs().min() > 1 - 1e-5


def test_a_failed_allocation_makes_the_basis_smaller(monkeypatch):
    op, sizes = operator(2000), []
    limit = 30

    class Search(krylov_search.KrylovSearch):
        def __init__(self, op, basis_size, *arguments, **options):
            sizes.append(basis_size)
            if basis_size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(op, basis_size, *arguments, **options)

    monkeypatch.setattr(topk, "KrylovSearch", Search)
    pairs = spectra.topk(op, 8)
    np.testing.assert_allclose(pairs.values, np.sort(OUTLIERS), rtol=1e-6)
    assert sizes == [40, 26]
    limit = 0
    with pytest.raises(spectra.InputError, match="ask for fewer") as caught:
        spectra.topk(op, 8)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_products_of_a_failed_search_count(monkeypatch):
    class Once(spectra.DiagonalOperator):
        failed = False

        def _multiply_rows(self, vectors):
            if self.products > 12 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._multiply_rows(vectors)

    op = Once(operator(2000).values)
    pairs = spectra.topk(op, 8)
    assert pairs.products == op.products
    np.testing.assert_allclose(pairs.values, np.sort(OUTLIERS), rtol=1e-6)


def test_a_search_in_host_memory_finds_the_same(monkeypatch):
    op = operator(2000)
    want = spectra.topk(op, 8)
    monkeypatch.setattr(topk, "choose_basis", lambda op, k, wanted: Basis(k, wanted, on_host=True))
    got = spectra.topk(op, 8)
    assert np.array_equal(got.values, want.values)
    assert torch.equal(got.vectors, want.vectors)
    assert got.products == want.products


class OnMeta(spectra.LinearOperator):
    """Says that it is on a device other than its vectors', and multiplies them where they are."""

    def __init__(self, inner):
        self.inner, self.shape, self.dtype = inner, inner.shape, inner.dtype
        self.device = torch.device("meta")

    def _multiply_rows(self, vectors):
        return self.inner.multiply_rows(vectors)


@pytest.mark.parametrize(("room", "device"), [(16, "meta"), (15, "cpu")])
def test_vectors_from_a_search_on_the_host_go_to_the_device_where_it_has_room(monkeypatch, room, device):
    """Twice the eight vectors: the move needs both copies."""
    op = OnMeta(operator(2000))
    host = HostOperator(op)
    host._multiply_rows = op._multiply_rows  # without a move to a device that holds no numbers
    monkeypatch.setattr(topk, "HostOperator", lambda op: host)
    monkeypatch.setattr(
        memory, "available", lambda device: room * op.vector_bytes if device.type == "meta" else 1 << 40
    )
    pairs = topk._search(op, Basis(8, 40, on_host=True), "LM", 1e-6, 0, max_products=1000, verify=False, start=None)
    np.testing.assert_allclose(pairs.values, np.sort(OUTLIERS), rtol=1e-6)
    assert pairs.vectors.device.type == device


def test_the_usual_basis():
    assert [default_basis_size(k) for k in (1, 10, 11, 40)] == [40, 40, 43, 130]


def test_vectors_on_the_host_are_multiplied_on_the_device():
    inner = operator(50)
    host = HostOperator(inner)
    vector = torch.ones(50, dtype=torch.float64)
    assert torch.equal(host @ vector, inner.values)
    assert inner.products == host.products == 1
    assert host.rounding() == inner.rounding()
    assert host.precision_error() == 0.0


def test_deflation_that_does_not_fit_is_refused_in_one_line(monkeypatch):
    op = operator(2000)

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("spectra.algorithms.probe_space.DeflatedOperator", fail)
    with pytest.raises(spectra.InputError, match="deflate fewer") as caught:
        spectra.slq(op, probes=2, steps=10, deflate=4)
    assert "\n" not in str(caught.value)


def test_a_search_for_more_than_fits_is_refused_in_one_line(monkeypatch):
    op = operator()
    monkeypatch.setattr(memory, "available", lambda device: 2**24)  # 1/64 GiB, a quarter of which products need
    bytes_needed = (12 + 8 + 6) * 8 * 100_000 / (3 / 4)  # a basis of 12, 8 results, and 6 vectors to work with
    words = f"8 eigenpairs of 100,000 parameters need {bytes_needed / 2**30:.2g} GiB of .* 0.016 GiB are free"
    with pytest.raises(spectra.InputError, match=words) as caught:
        spectra.topk(op, 8)
    assert "\n" not in str(caught.value)


def test_what_is_reserved_is_what_a_comfortable_search_holds():
    assert [vectors_to_reserve(k) for k in (1, 8, 100)] == [Basis(k, comfortable(k)).vectors for k in (1, 8, 100)]
    assert vectors_to_reserve(0) == 0
