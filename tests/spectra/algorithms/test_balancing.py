"""One step of balancing against the same step row by row in NumPy, and against the covariance it should take out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import generator

from spectra.algorithms.balancing import POWER, balanced
from spectra.algorithms.kronecker import KroneckerTransform, blocks_of

SHAPES = ((5, 40), (2, 9, 16), (6,), (1, 12), (7, 30))  # a matrix, a stack, a vector, one row


def image(seed=0, scale=3.0):
    """Rows and columns of unequal sizes, correlated with their neighbours, each block at another scale."""
    g, parts = generator(seed), []
    for index, block in enumerate(blocks_of(SHAPES)):
        matrices = torch.randn(block.count, block.rows, block.columns, generator=g, dtype=torch.float64)
        matrices = matrices + 0.7 * matrices.roll(1, -2)
        rows = torch.logspace(0, 1, block.rows, dtype=torch.float64)[:, None]
        each = torch.arange(1, block.count + 1, dtype=torch.float64)[:, None, None]
        parts.append((scale**index * each * rows * matrices).flatten())
    return torch.cat(parts)


def some_transform(seed=1):
    g, identity = generator(seed), KroneckerTransform.identity(blocks_of(SHAPES), torch.device("cpu"))
    left, right = (
        tuple(f + 0.1 * torch.randn(f.shape, generator=g, dtype=torch.float64) for f in factors)
        for factors in (identity.left, identity.right)
    )
    return replace(identity, left=left, right=right)


def symmetric_power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T


def new_factor(factor, y, kept, *, symmetric):
    """The factor of the rows of one matrix y, of which the entries `kept` are not masked."""
    rows, samples = y.shape
    if rows == 1:
        return factor
    share = np.array([row.mean() if row.any() else 1.0 for row in kept])
    squares = np.array([(row**2).mean() for row in y])
    nonzero = squares > 0
    if not nonzero.any():
        return symmetric_power(factor @ factor.T, 0.5)
    ratios = np.ones(rows)
    ratios[nonzero] = squares[nonzero] / share[nonzero] / (squares[nonzero] / share[nonzero]).mean()
    variance, sampling = ((ratios - 1) ** 2).mean(), 2 / (samples + 2) * (ratios**2).mean()
    ratios = 1 + max(1 - sampling / variance, 0.0) * (ratios - 1)
    roots = ratios ** (-POWER / 2)
    if factor.ndim == 1:
        return factor * roots
    unit = np.array([row / np.sqrt((row**2).mean()) if row.any() else row for row in y])
    correlations = unit @ unit.T / samples
    np.fill_diagonal(correlations, 1.0)
    traces = (correlations**2).sum(), np.trace(correlations) ** 2  # of C^2, and of C squared
    shrinkage = min((traces[0] + traces[1]) / ((samples + 1) * (traces[0] - traces[1] / rows)), 1.0)
    shrunk = (1 - shrinkage) * correlations + shrinkage * np.eye(rows)
    new = factor @ np.diag(roots) @ symmetric_power(shrunk, -POWER / 2)
    return symmetric_power(new @ new.T, 0.5) if symmetric else new


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_that_of_the_formulas(masked):
    transform, z = some_transform(), image()
    mask = torch.rand(len(z), generator=generator(2)) < 0.7 if masked else None
    if masked:
        mask[:40] = False  # the first row of the first matrix
        mask[200:344] = False  # the first matrix of the stack
        z = z * mask
    found = balanced(transform, z, mask)
    kept = np.ones(len(z)) if mask is None else mask.double().numpy()
    sides, squares = [], []
    for block, left, right in zip(transform.blocks, transform.left, transform.right, strict=True):
        part = slice(block.start, block.stop)
        sizes = (block.count, block.rows, block.columns)
        matrices, masks = z.numpy()[part].reshape(sizes), kept[part].reshape(sizes)
        for i, (y, ones) in enumerate(zip(matrices, masks, strict=True)):
            squares.append((y**2).sum() / max(ones.sum(), 1))
            sides.append(
                (
                    new_factor(left[i].numpy(), y, ones, symmetric=masked),
                    new_factor(right[i].numpy(), y.T, ones.T, symmetric=masked),
                )
            )
    squares = np.array(squares)
    middle = np.exp(np.log(squares[squares > 0]).mean())
    scales = np.where(squares > 0, squares / middle, 1.0) ** (-POWER / 2)
    assert (squares == 0).sum() == masked
    lefts, rights = ([f for factors in side for f in factors.numpy()] for side in (found.left, found.right))
    for left, right, (want_left, want_right), scale in zip(lefts, rights, sides, scales, strict=True):
        np.testing.assert_allclose(left, scale * want_left, rtol=1e-9, atol=1e-11 * np.abs(want_left).max() * scale)
        np.testing.assert_allclose(right, want_right, rtol=1e-9, atol=1e-11 * np.abs(want_right).max())


def test_with_many_samples_a_step_takes_out_a_power_of_the_covariance():
    """Y = R^(1/2) G with 20,000 columns and R a correlation matrix: from the identity, F = R^(-POWER / 2)."""
    print("seed = 3")
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0]
    covariance = (q * [0.3, 0.6, 1.2, 1.9]) @ q.T
    sizes = np.sqrt(np.diag(covariance))
    correlations = covariance / np.outer(sizes, sizes)
    y = symmetric_power(correlations, 0.5) @ np.random.default_rng(4).normal(size=(4, 20000))
    transform = KroneckerTransform.identity(blocks_of(((4, 20000),)), torch.device("cpu"))
    found = balanced(transform, torch.tensor(y).flatten(), None)
    np.testing.assert_allclose(found.left[0][0].numpy(), symmetric_power(correlations, -POWER / 2), atol=0.02)


def test_equal_rows_and_blocks_are_left_alone():
    """All entries of size one and orthogonal rows: the sampling explains what correlation there is, and more."""
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    transform = KroneckerTransform.identity(blocks_of(((4, 4), (4, 4))), torch.device("cpu"))
    found = balanced(transform, torch.cat([hadamard, hadamard]).flatten(), None)
    for side in (found.left, found.right):
        for factors in side:
            torch.testing.assert_close(factors[0], torch.eye(4, dtype=torch.float64))
