"""Spectral measures with known eigenvalues and weights, by a Lanczos recurrence written here a second time."""

import numpy as np

from spectra.estimates.measure import JacobiMatrices, KnownEigenvalues, SpectralMeasure


def jacobi_matrix(values, weights, steps):
    """alphas, betas (m,) of the measure sum_k weights_k delta(lambda - values_k); betas[-1] = 0 after a breakdown."""
    values, vector = np.asarray(values, dtype=float), np.sqrt(np.asarray(weights) / np.sum(weights))
    basis, alphas, betas = [], [], []
    for _ in range(steps):
        basis.append(vector)
        image = values * vector
        alphas.append(vector @ image)
        for _ in range(2):
            image = image - np.array(basis).T @ (np.array(basis) @ image)
        norm = np.linalg.norm(image)
        if norm <= 1e-10 * np.abs(values).max():
            return np.array(alphas), np.array([*betas, 0.0])
        betas.append(norm)
        vector = image / norm
    return np.array(alphas), np.array(betas)


def sphere_weights(n, *, probes, seed):
    """(probes, n) squared coordinates of random unit vectors."""
    print(f"seed = {seed}")
    squares = np.random.default_rng(seed).normal(size=(probes, n)) ** 2
    return squares / squares.sum(axis=1, keepdims=True)


def even_weights(n, *, probes=1):
    """(probes, n) weights of vectors that see every eigenvalue equally: what is measured is then exact."""
    return np.full((probes, n), 1 / n)


def stacked(matrices, steps):
    """Jacobi matrices of different sizes, padded to rows of one array."""
    alphas, betas = np.zeros((len(matrices), steps)), np.zeros((len(matrices), steps))
    for row, (diagonal, off_diagonal) in enumerate(matrices):
        alphas[row, : len(diagonal)], betas[row, : len(diagonal)] = diagonal, off_diagonal
    return JacobiMatrices(alphas, betas, np.array([len(diagonal) for diagonal, _ in matrices], dtype=int))


def known_eigenvalues(values, counts=None, errors=None):
    values = np.asarray(values, dtype=float)
    counts = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=float)
    errors = np.zeros(len(values)) if errors is None else np.asarray(errors, dtype=float)
    return KnownEigenvalues(values, counts, errors)


def measure_of(values, weights, *, steps=40, known=None, rounding_error=0.0):
    """The measure of eigenvalues (n,) from probe vectors whose squared components are these weights (probes, n)."""
    jacobi = stacked([jacobi_matrix(values, row, steps) for row in weights], steps)
    return SpectralMeasure(jacobi, len(values), known or KnownEigenvalues(), rounding_error)


def only_known(values, counts=None, errors=None):
    """A spectrum of which every eigenvalue is known."""
    return SpectralMeasure(stacked([], 1), 0, known_eigenvalues(values, counts, errors))
