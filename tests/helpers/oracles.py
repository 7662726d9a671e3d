"""Slow and certain answers to check against: dense Hessians, matrices with a prescribed spectrum, distances."""

import random

import numpy as np
import pytest
import scipy.stats
import torch


def generator(seed):
    """A torch generator; the seed is printed, and pytest shows it when the test fails."""
    print(f"seed = {seed}")
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def dense_hessian(loss, parameters, chunk=64):
    """All second derivatives of a scalar, row by row, in the order of `parameters`: (n, n)."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = flat(gradients)
    rows = []
    for selector in torch.eye(len(gradient), dtype=gradient.dtype).split(chunk):
        columns = torch.autograd.grad(
            gradient, parameters, selector, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        # where a parameter takes no part the zeros come without the dimension of the batch
        columns = [column.expand(len(selector), *p.shape) for column, p in zip(columns, parameters, strict=True)]
        rows.append(torch.cat([column.reshape(len(selector), -1) for column in columns], dim=1))
    return torch.cat(rows)


def dense_gradient(loss, parameters):
    return flat(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))


def relative_error(got, want):
    return (torch.linalg.norm(torch.as_tensor(got) - want) / torch.linalg.norm(want)).item()


def agree(op, model, loss, parameters=None, tolerance=1e-10, seed=7):
    """Three columns at once and one vector alone against the dense Hessian of `loss`, and the gradient too."""
    parameters = list(model.parameters()) if parameters is None else parameters
    dense = dense_hessian(loss, parameters)
    n = len(dense)
    assert tuple(op.shape) == (n, n)
    assert dense.norm() > 1e-3  # else anything agrees
    v = normal(n, 3, seed=seed)
    assert relative_error(op @ v, dense @ v) < tolerance
    assert relative_error(op @ v[:, 0].contiguous(), dense @ v[:, 0]) < tolerance
    assert relative_error(op.gradient(), dense_gradient(loss, parameters)) < tolerance
    assert op.loss() == pytest.approx(loss.item(), rel=tolerance)
    assert op.symmetry_gap() < tolerance


def matrix_with_spectrum(values, seed):
    """A dense symmetric float64 matrix Q diag(values) Q^T with a random orthogonal Q."""
    values = torch.as_tensor(np.asarray(values, dtype=float))
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def wasserstein(density, values):
    """Wasserstein-1 distance from the pooled quadrature rules of a SpectralDensity to the true spectrum."""
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    assert nodes.shape == weights.shape
    return scipy.stats.wasserstein_distance(nodes.ravel(), values, weights.ravel())


def random_state():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the global states


def same_random_state(one, other):
    (torch_one, numpy_one, python_one), (torch_other, numpy_other, python_other) = one, other
    same_numpy = all(np.array_equal(a, b) for a, b in zip(numpy_one, numpy_other, strict=True))
    return torch.equal(torch_one, torch_other) and same_numpy and python_one == python_other
