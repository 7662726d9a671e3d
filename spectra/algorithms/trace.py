"""The trace of an operator from a few products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from spectra.algorithms.block_size import probes_together, vectors_that_fit
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.backend.vectors import gaussian, inner_products, orthonormal_rows, probe, row_dots, take_out_
from spectra.estimates.estimate import Estimate, certain, sampling_interval, student_interval
from spectra.operators.base import LinearOperator

METHODS = ("hutchinson", "hutch++", "xtrace")
# XTrace's samples share a sketch, so their spread understates the error of their mean: Student's interval covered 88 %
# over 2,800 spectra of benchmarks/trust, this much of it 97 % over 800.
XTRACE_INFLATION = 1.5
BLOCK = 10  # vectors at once, the most: a GPU gains little beyond, and products hold memory for each
LEARNING = 12  # of the products a block, the smallest part: two blocks show whether a dominant range is there
FADING = 0.5  # of the energy that a block of the Krylov space brought, what the next is taken to bring
NEGLIGIBLE = 1e3  # units of rounding: directions below were all rounding


@in_float32
def trace(op: LinearOperator, *, method: str = "hutchinson", probes: int = 30, seed: int = 0) -> Estimate:
    """tr A with a 95 % interval, from `probes` products.

    "hutchinson": n times the mean of v . A v over random unit vectors (Hutchinson, Commun. Stat. 18, 1989).
    "hutch++": a dominant range Q is found and its trace taken exactly, the rest of the products estimates what is left
    (Meyer, Musco, Musco and Woodruff, SOSA 2021). Q is a block Krylov space, whose products serve both purposes (Chen
    and Hallman, SIAM J. Matrix Anal. 44, 2023), and grows, up to half of the products, while that narrows the interval
    (as in Persson, Cortinovis and Kressner, SIAM J. Matrix Anal. 43, 2022): without a dominant range little is lost.
    "xtrace": half of the products finds a range that every test vector in turn is left out of, so that each serves
    both purposes (Epperly, Tropp and Webber, SIAM J. Matrix Anal. 45, 2024).
    The last two hold up to half of `probes` vectors and win where a few eigenvalues dominate. Where `probes` reaches
    what the exact trace costs (n products), the exact trace is returned.
    Raises InputError for an unknown method or too few products.
    """
    least = {"hutchinson": 1, "hutch++": 6, "xtrace": 4}
    if method not in METHODS:
        raise InputError(f"the method must be one of {', '.join(METHODS)}, got {method!r}")
    if probes < least[method]:
        raise InputError(f"{method} needs at least {least[method]} products, got probes={probes}")
    if probes >= op.shape[0]:
        return _exact(op)
    estimate = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
    return estimate(op, probes, seed)


def _exact(op: LinearOperator) -> Estimate:
    n = op.shape[0]
    unit = torch.zeros(n, dtype=op.dtype, device=op.device)
    diagonal = np.empty(n)
    for index in range(n):
        unit[index] = 1
        diagonal[index] = float((op @ unit)[index])
        unit[index] = 0
    slack = 100 * torch.finfo(op.dtype).eps * float(np.abs(diagonal).sum())
    return replace(certain(float(diagonal.sum()), rounding=slack), products=n)


def _hutchinson(op: LinearOperator, probes: int, seed: int) -> Estimate:
    forms, squares = _quadratic_forms(op, probes, lambda index: probe(op, seed=seed, index=index))
    return replace(_sphere_interval(forms, squares, op.shape[0]), products=probes)


def _quadratic_forms(
    op: LinearOperator, count: int, draw: Callable[[int], torch.Tensor], basis: torch.Tensor | None = None
) -> tuple[list[float], list[float]]:
    """v . A v and ||A v||^2 for the unit vectors v that `draw` gives; with a basis (k, n) those of the operator
    restricted to its complement, from which v is taken."""
    forms: list[float] = []
    squares: list[float] = []
    group = _block(op, basis)
    for first in range(0, count, group):
        vectors = torch.stack([draw(index) for index in range(first, min(first + group, count))])
        if basis is not None:
            take_out_(vectors, basis)  # a random vector has next to nothing there: once is enough
            vectors /= row_dots(vectors, vectors).sqrt()[:, None].to(vectors.dtype)
        images = op.finite_rows(vectors)
        forms += row_dots(vectors, images).tolist()
        inside = 0.0 if basis is None else (images @ basis.T).double().square().sum(dim=1)
        squares += (row_dots(images, images) - inside).tolist()
    return forms, squares


def _block(op: LinearOperator, basis: torch.Tensor | None = None) -> int:
    """Vectors at once: several where each pass over a basis serves them all."""
    return min(probes_together(op, 0, deflated=basis is not None), BLOCK)


def _images(op: LinearOperator, vectors: torch.Tensor) -> torch.Tensor:
    """A applied to each row of `vectors`, as many at once as fit. (k, n)"""
    group = _block(op)
    images = torch.empty_like(vectors)
    for first in range(0, len(vectors), group):
        images[first : first + group] = op.finite_rows(vectors[first : first + group])
    return images


def _sphere_interval(forms: list[float], squares: list[float], n: int) -> Estimate:
    """n times the mean of v . A v over unit vectors.

    The variance of each is 2 (mean ||A v||^2 - mean(v . A v)^2) / (n + 2); the larger of this and of what the samples
    show counts. Skewness and degrees of freedom are the samples'.
    """
    samples, count = n * np.array(forms), len(forms)
    spread = max(float(np.mean(squares) - np.mean(forms) ** 2), 0.0)
    deviation = n * math.sqrt(2 * spread / (n + 2))
    if count == 1:
        return sampling_interval(float(samples[0]), deviation, 0.0)
    seen = float(samples.std(ddof=1))
    centred = samples - samples.mean()
    skewness = float((centred**3).mean() / (centred**2).mean() ** 1.5) if seen > 0 else 0.0
    root = math.sqrt(count)
    return sampling_interval(float(samples.mean()), max(deviation, seen) / root, skewness / root, freedom=count - 1)


def _hutch_plus_plus(op: LinearOperator, probes: int, seed: int) -> Estimate:
    basis, captured = _dominant_space(op, probes, seed)
    forms, squares = _quadratic_forms(
        op, probes - len(basis), lambda index: gaussian(op, seed=seed, index=index, stream="rest"), basis
    )
    left = _sphere_interval(forms, squares, op.shape[0] - len(basis))
    return Estimate(
        captured + left.value, captured + left.low, captured + left.high, left.resolved, left.reason, probes
    )


def _dominant_space(op: LinearOperator, probes: int, seed: int) -> tuple[torch.Tensor, float]:
    """Q, orthonormal rows (m, n) of a block Krylov space that cost m products, and tr(Q A Q^T).

    The variance of the whole estimate is in proportion to (||A||_F^2 - E) / (probes - m), with the energy captured
    E = 2 ||A Q^T||_F^2 - ||Q A Q^T||_F^2. So another block pays where it captures more than its part of the products
    left of the energy left.
    """
    size = max(min(probes // LEARNING, BLOCK), 1)
    most = max(min(probes // 2, vectors_that_fit(op)), 2 * size)
    basis = torch.empty(most, op.shape[0], dtype=op.dtype, device=op.device)
    block = _filled_up(op, basis[:0], basis[:0], size, seed)
    captured = energy = total = scale = 0.0
    filled = 0
    while True:
        images = _images(op, block)
        basis[filled : filled + size] = block
        squares = row_dots(images, images)
        inside = images @ basis[: filled + size].T
        doubled = inside[:, :filled]  # what couples to earlier blocks stands on both sides of the diagonal
        gain = float(2 * squares.sum() - inside.double().square().sum() - doubled.double().square().sum())
        captured += float(row_dots(block, images).sum())
        energy += gain
        scale = max(scale, float(squares.max().sqrt()))
        if filled == 0:  # random vectors still: their images show ||A||_F^2
            total = op.shape[0] * float(squares.sum()) / size
        filled += size
        pays = FADING * gain * (probes - filled) > size * max(total - energy, 0.0)
        if filled + size > most or not (pays or filled == size):
            return basis[:filled], captured
        images.addmm_(inside, basis[:filled], alpha=-1)
        lower, block = orthonormal_rows(take_out_(images, basis[:filled]))
        rounding = NEGLIGIBLE * torch.finfo(op.dtype).eps * scale
        block = _filled_up(op, block[torch.diagonal(lower).abs() > rounding], basis[:filled], size, seed)


def _filled_up(op: LinearOperator, block: torch.Tensor, basis: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """`size` rows, orthonormal and orthogonal to the basis: those of `block` and random ones."""
    missing = range(len(basis) + len(block), len(basis) + size)
    if not missing:
        return block
    rows = torch.cat([block, _test_vectors(op, missing, seed)])
    for _ in range(2):
        take_out_(rows, basis)
    return orthonormal_rows(rows)[1]


def _xtrace(op: LinearOperator, probes: int, seed: int) -> Estimate:
    """Leave each test vector w_i out of the sketch Y = A W = Q R in turn. The basis without it is Q (I - s_i s_i^T),
    with s_i the unit vector along column i of R^-T; the trace on that basis is taken exactly and w_i, projected onto
    the complement and scaled to the sphere, estimates the rest. Vectors are rows here, so that R is the transpose of
    the factor."""
    n, count = op.shape[0], probes // 2
    tests = _test_vectors(op, range(count), seed)
    lower, basis = orthonormal_rows(_images(op, tests))
    images = _images(op, basis)
    small = (lower.T, inner_products(basis, images), inner_products(basis, tests), inner_products(images, tests))
    r, h, w, t = (matrix.cpu().numpy() for matrix in small)
    h = (h + h.T) / 2
    diagonal = np.abs(np.diag(r))
    if diagonal.min() <= 1e3 * torch.finfo(op.dtype).eps * max(diagonal.max(), 1e-300):
        exact = float(np.trace(h))  # the sketch holds the whole range of A
        slack = 1e3 * torch.finfo(op.dtype).eps * float(np.abs(h).sum())
        return Estimate(exact, exact - slack, exact + slack, products=2 * count)
    s = np.linalg.inv(r).T
    s /= np.linalg.norm(s, axis=0)
    lengths = row_dots(tests, tests).cpu().numpy()
    samples = np.empty(count)
    for i in range(count):
        x = w[:, i] - s[:, i] * (s[:, i] @ w[:, i])
        captured = np.trace(h) - s[:, i] @ h @ s[:, i]
        residual = w[:, i] @ r[:, i] - 2 * (t[:, i] @ x) + x @ h @ x
        samples[i] = captured + (n - count + 1) * residual / (lengths[i] - x @ x)
    naive = student_interval(samples)
    half = XTRACE_INFLATION * naive.half_width
    return Estimate(naive.value, naive.value - half, naive.value + half, products=2 * count)


def _test_vectors(op: LinearOperator, indices: range, seed: int) -> torch.Tensor:
    return torch.stack([gaussian(op, seed=seed, index=index, stream="sketch") for index in indices])
