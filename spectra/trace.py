"""The trace of an operator from a few products."""

from __future__ import annotations

import math

import numpy as np
import torch

from spectra.errors import InputError
from spectra.estimates import Estimate, certain, sampling_interval, student_interval, union
from spectra.operators import LinearOperator
from spectra.vectors import dot, gaussian, norm, probe

METHODS = ("hutchinson", "hutch++", "xtrace")
# XTrace's samples share a sketch, so their spread understates the error of their mean: Student's interval covered 88 %
# over 2,800 spectra of benchmarks/trust.
XTRACE_INFLATION = math.sqrt(2)


def trace(op: LinearOperator, *, method: str = "hutchinson", probes: int = 30, seed: int = 0) -> Estimate:
    """tr A with a 95 % interval, from `probes` products.

    "hutchinson": n times the mean of v . A v over random unit vectors (Hutchinson, Commun. Stat. 18, 1989).
    "hutch++": a third of the products finds the dominant range Q, a third takes its trace exactly, the rest estimates
    what is left (Meyer, Musco, Musco and Woodruff, SOSA 2021).
    "xtrace": half of the products finds a range that every test vector in turn is left out of, so that each serves
    both purposes (Epperly, Tropp and Webber, SIAM J. Matrix Anal. 45, 2024).
    The last two hold a third or a half of `probes` vectors and win where a few eigenvalues dominate. Where `probes`
    reaches what the exact trace costs (n products), the exact trace is returned.
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
    return _with_products(certain(float(diagonal.sum()), rounding=slack), n)


def _hutchinson(op: LinearOperator, probes: int, seed: int) -> Estimate:
    forms, squares = [], []
    for index in range(probes):
        v = probe(op, seed=seed, index=index)
        image = op @ v
        forms.append(dot(v, image))
        squares.append(dot(image, image))
    return _with_products(_sphere_interval(forms, squares, op.shape[0]), probes)


def _sphere_interval(forms: list[float], squares: list[float], n: int) -> Estimate:
    """n times the mean of v . A v over unit vectors, whose variance is 2 (mean ||A v||^2 - mean(v . A v)^2) / (n + 2).

    The wider of Student's interval and the normal one with that variance: the first is too short where a single
    eigenvalue dominates a few probes, the second knows the variance better than the samples' spread does.
    """
    samples = n * np.array(forms)
    spread = max(float(np.mean(squares) - np.mean(forms) ** 2), 0.0)
    known = sampling_interval(float(samples.mean()), n * math.sqrt(2 * spread / ((n + 2) * len(forms))), 0.0)
    return known if len(forms) < 2 else union(known, student_interval(samples))


def _hutch_plus_plus(op: LinearOperator, probes: int, seed: int) -> Estimate:
    n, sketch = op.shape[0], probes // 3
    range_basis = _orthonormal(op @ _test_matrix(op, sketch, seed, "sketch"))
    captured = float((range_basis * (op @ range_basis)).sum(dtype=torch.float64))
    forms, squares = [], []
    dimension_left = n - range_basis.shape[1]
    for index in range(probes - 2 * sketch):
        v = gaussian(op, seed=seed, index=index, stream="rest")
        for _ in range(2):
            v -= range_basis @ (range_basis.T @ v)
        v /= norm(v)
        image = op @ v
        forms.append(dot(v, image))
        image -= range_basis @ (range_basis.T @ image)
        squares.append(dot(image, image))
    left = _sphere_interval(forms, squares, dimension_left)
    return Estimate(
        captured + left.value, captured + left.low, captured + left.high, left.resolved, left.reason, probes
    )


def _xtrace(op: LinearOperator, probes: int, seed: int) -> Estimate:
    """Leave each test vector w_i out of the sketch Y = A W = Q R in turn. The basis without it is Q (I - s_i s_i^T),
    with s_i the unit vector along column i of R^-T; the trace on that basis is taken exactly and w_i, projected onto
    the complement and scaled to the sphere, estimates the rest."""
    n, count = op.shape[0], probes // 2
    tests = _test_matrix(op, count, seed, "sketch")
    images = op @ tests
    basis, triangle = torch.linalg.qr(images)
    image_of_basis = op @ basis
    small = [
        m.double().cpu().numpy()
        for m in (triangle, basis.T @ image_of_basis, basis.T @ tests, image_of_basis.T @ tests)
    ]
    r, h, w, t = small
    h = (h + h.T) / 2
    diagonal = np.abs(np.diag(r))
    if diagonal.min() <= 1e3 * torch.finfo(op.dtype).eps * max(diagonal.max(), 1e-300):
        exact = float(np.trace(h))  # the sketch holds the whole range of A
        slack = 1e3 * torch.finfo(op.dtype).eps * float(np.abs(h).sum())
        return Estimate(exact, exact - slack, exact + slack, products=2 * count)
    s = np.linalg.inv(r).T
    s /= np.linalg.norm(s, axis=0)
    lengths = (tests.double() ** 2).sum(dim=0).cpu().numpy()
    samples = np.empty(count)
    for i in range(count):
        x = w[:, i] - s[:, i] * (s[:, i] @ w[:, i])
        captured = np.trace(h) - s[:, i] @ h @ s[:, i]
        residual = w[:, i] @ r[:, i] - 2 * (t[:, i] @ x) + x @ h @ x
        samples[i] = captured + (n - count + 1) * residual / (lengths[i] - x @ x)
    naive = student_interval(samples)
    half = XTRACE_INFLATION * naive.half_width
    return Estimate(naive.value, naive.value - half, naive.value + half, products=2 * count)


def _test_matrix(op: LinearOperator, count: int, seed: int, stream: str) -> torch.Tensor:
    return torch.stack([gaussian(op, seed=seed, index=i, stream=stream) for i in range(count)], dim=1)


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns' span; directions at rounding level are dropped."""
    q, r = torch.linalg.qr(matrix)
    sizes = torch.diagonal(r).abs()
    return q[:, sizes > math.sqrt(matrix.shape[1]) * torch.finfo(matrix.dtype).eps * sizes.max()]


def _with_products(estimate: Estimate, products: int) -> Estimate:
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.resolved, estimate.reason, products)
