"""Random vectors depend on (seed, index, stream) alone, and their numbers are normal and independent."""

import numpy as np
import pytest
import scipy
import torch

import spectra
from spectra.backend import random_vectors, vectors


def ones(n, **options):
    return spectra.DiagonalOperator(torch.ones(n, dtype=torch.float32, **options))


def test_a_probe_vector_depends_on_seed_and_index_and_on_nothing_else(monkeypatch):
    op = ones(300_001)
    vector = random_vectors.probe_vector(op, seed=3, index=1)
    torch.manual_seed(1)
    assert torch.equal(vector, random_vectors.probe_vector(op, seed=3, index=1))
    assert vectors.norm(vector) == pytest.approx(1.0)
    for other in ({"seed": 4, "index": 1}, {"seed": 3, "index": 2}):
        assert abs(vectors.dot(vector, random_vectors.probe_vector(op, **other))) < 0.01
    assert abs(vectors.dot(vector[:150_000], vector[150_001:])) < 0.01
    monkeypatch.setitem(vectors.CHUNK_SIZES, "cpu", 1000)
    assert torch.allclose(vector, random_vectors.probe_vector(op, seed=3, index=1), atol=1e-9)


def test_the_hash_is_splitmix64():
    # the generator's published first outputs from the state 1234567; its first counter is 1
    words = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64)
    low, high = ((words >> np.uint64(shift)).astype(np.uint32).view(np.int32).astype(float) for shift in (0, 32))
    radius, angle = np.sqrt(-2 * np.log((np.abs(low) + 0.5) / 2**31)), np.pi * high / 2**31
    first, second = random_vectors._normal_pairs(1234567, 1, 4, torch.device("cpu"))
    assert np.allclose(first.numpy(), radius * np.cos(angle), atol=1e-5)
    assert np.allclose(second.numpy(), radius * np.sin(angle), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_numbers_are_normal_and_independent(seed):
    n = 1_000_001
    x = random_vectors.gaussian(ones(n), seed=seed, index=0, stream="test").double().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-4
    assert abs(x).max() > 4
    for other in (x[1:], x[n // 2 + 1 :]):  # neighbours, and the two halves of a pair
        same = x[: len(other)]
        assert abs(np.corrcoef(same, other)[0, 1]) < 4.5 / len(other) ** 0.5
        assert abs(np.corrcoef(same**2, other**2)[0, 1]) < 4.5 / len(other) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 7])
def test_short_vectors_and_other_dtypes_have_the_same_numbers(n):
    op = spectra.DiagonalOperator(torch.ones(n, dtype=torch.float64))
    doubles = random_vectors.gaussian(op, seed=5, index=2, stream="test")
    assert doubles.dtype == torch.float64
    assert torch.equal(doubles.float(), random_vectors.gaussian(ones(n), seed=5, index=2, stream="test"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_numbers():
    here = random_vectors.gaussian(ones(10_000_001), seed=5, index=2, stream="test")
    there = random_vectors.gaussian(ones(10_000_001, device="cuda"), seed=5, index=2, stream="test")
    assert torch.allclose(here, there.cpu(), atol=1e-5)
