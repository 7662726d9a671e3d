"""Stochastic Lanczos quadrature: from an operator to its spectral density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch

from spectra.density import SpectralDensity
from spectra.errors import InputError
from spectra.lanczos import Tridiagonal, choose_policy, lanczos
from spectra.operators import LinearOperator
from spectra.vectors import probe


def slq(
    op: LinearOperator,
    *,
    probes: int = 10,
    steps: int = 100,
    seed: int = 0,
    reorthogonalize: str = "auto",
    progress: Callable[[int, int], Any] | None = None,
) -> SpectralDensity:
    """The spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Each of `probes` random unit vectors v gives a Gauss rule of `steps` nodes for the measure
    sum_k (u_k . v)^2 delta(lambda - lambda_k), whose mean over v is the density of eigenvalues (Golub and Meurant,
    1993; Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38, 2017). Probe i depends on (seed, i) alone.
    Costs probes * steps products. With steps >= n the whole matrix costs only n, so it is formed and diagonalised:
    the rows are then the eigenvalues with weight 1/n each, and every estimate is exact.

    reorthogonalize: "full", "none" or "auto" (full while the basis is small); see `spectra.lanczos`.
    progress: called as progress(products done, products in all).
    Raises InputError for counts below one, NonFiniteError for a product that is not finite.
    """
    if probes < 1 or steps < 1:
        raise InputError(f"probes and steps must be at least 1, got probes={probes}, steps={steps}")
    n = op.shape[0]
    if steps >= n:
        return _exact(op, probes, steps, progress)
    policy = choose_policy(op, steps, reorthogonalize)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, probes * steps)

    results = []
    for index in range(probes):
        start = probe(op, seed=seed, index=index)
        results.append(lanczos(op, start, steps, reorthogonalize=policy, on_step=advance))
        done = (index + 1) * steps  # a breakdown saves the rest
    return density_from(results, dimension=n, steps=steps)


def density_from(results: list[Tridiagonal], *, dimension: int, steps: int) -> SpectralDensity:
    """Stack Jacobi matrices, one a probe, padded to `steps` where a breakdown ended the recurrence early."""
    alphas, betas = np.zeros((len(results), steps)), np.zeros((len(results), steps))
    for row, result in enumerate(results):
        alphas[row, : result.steps], betas[row, : result.steps] = result.alphas, result.betas
    lengths = np.array([result.steps for result in results])
    return SpectralDensity.from_jacobi(alphas, betas, lengths, dimension=dimension)


def _exact(op: LinearOperator, probes: int, steps: int, progress: Callable[[int, int], Any] | None) -> SpectralDensity:
    n = op.shape[0]
    matrix = np.empty((n, n))
    unit = torch.zeros(n, dtype=op.dtype, device=op.device)
    for column in range(n):
        unit[column] = 1
        matrix[:, column] = (op @ unit).double().cpu().numpy()
        unit[column] = 0
        if progress is not None:
            progress(column + 1, n)
    eigenvalues = scipy.linalg.eigvalsh((matrix + matrix.T) / 2)
    return SpectralDensity.from_eigenvalues(eigenvalues, probes=probes, steps=steps)
