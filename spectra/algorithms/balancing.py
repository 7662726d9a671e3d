"""One step of a Sinkhorn iteration on Kronecker factors, which brings covariances nearer to multiples of the identity.

If a matrix Y has independent columns, Y Y^T is the covariance of its rows up to a factor. A step multiplies the factor
of the rows by a negative power of this covariance, so that it comes nearer to a multiple of the identity. The columns
of Y are the samples from which the covariance is estimated. Its diagonal and its correlations are shrunk to remove what
is due to sampling.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from spectra.algorithms.kronecker import Block, KroneckerTransform

POWER = 0.4  # exponent of the covariance in a step: 1 would suit a T^2 of off-diagonal blocks, 1/4 a diagonal T
RESOLVED = 1e-14  # ratio of the smallest to the largest eigenvalue of F F^T that float64 resolves
SMALLEST = 1e-12  # smallest eigenvalue of a correlation matrix; rounding may make it smaller


def balanced(transform: KroneckerTransform, image: torch.Tensor, mask: torch.Tensor | None) -> KroneckerTransform:
    """The transform after one step.

    The step brings the mean squares of rows, of columns and of whole blocks nearer to each other, all by the same
    power. It also makes the correlations of rows and of columns smaller.

    Args:
        transform: P.
        image: (n,), T^2 z for a random z.
        mask: (n,), False for coordinates in which T is zero; None if there are none. The new factors of a block
            with masked coordinates are symmetric positive definite, so that its principal submatrix on the others is
            nonsingular.

    Returns:
        The new P.
    """
    image = image.double()
    kept = None if mask is None else mask.double()
    sides = [
        _step_of_block(block, left, right, image, kept)
        for block, left, right in zip(transform.blocks, transform.left, transform.right, strict=True)
    ]
    scales = _scales([square for _, _, square in sides])
    left = tuple(factor * _over_sides(scale, factor) for (factor, _, _), scale in zip(sides, scales, strict=True))
    return replace(transform, left=left, right=tuple(factor for _, factor, _ in sides))


def positive_definite(transform: KroneckerTransform) -> KroneckerTransform:
    """The transform with (F F^T)^(1/2) in place of each factor F, which changes T by a rotation only."""
    left, right = (tuple(map(_polar, factors)) for factors in (transform.left, transform.right))
    return replace(transform, left=left, right=right)


def _step_of_block(
    block: Block, left: torch.Tensor, right: torch.Tensor, image: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new factors of a block, and the mean squares (count,) of its matrices."""
    matrices = block.matrices(image[None])[0]
    ones = torch.ones_like(matrices) if kept is None else block.matrices(kept[None])[0]
    symmetric = kept is not None and not bool(ones.all())  # a block that is kept whole needs no principal submatrix
    square = matrices.square().sum((-1, -2)) / ones.sum((-1, -2)).clamp(min=1)
    new_left = _step(left, matrices, ones.mean(-1), symmetric=symmetric)
    new_right = _step(right, matrices.mT, ones.mean(-2), symmetric=symmetric)
    return new_left, new_right, square


def _step(factor: torch.Tensor, matrices: torch.Tensor, share: torch.Tensor, *, symmetric: bool) -> torch.Tensor:
    """The new factor of the rows of `matrices` (count, rows, columns); `share` is the share of each row not masked."""
    samples = matrices.shape[-1]
    if matrices.shape[-2] == 1:
        return factor
    share = torch.where(share > 0, share, 1.0)
    squares = matrices.square().mean(-1) / share
    roots = _shrunk_squares(squares, samples).pow(-POWER / 2)
    if factor.ndim == 2:
        return factor * roots
    inverse = torch.where(squares > 0, squares * share, 1.0).rsqrt()
    if samples < matrices.shape[-2] and not symmetric:
        rows = matrices * (inverse / samples**0.5)[..., None]
        return factor @ (roots[..., :, None] * _power_of_few_samples(rows, -POWER / 2))
    correlations = matrices @ matrices.mT / samples
    correlations = correlations * inverse[..., :, None] * inverse[..., None, :]
    new = factor @ (roots[..., :, None] * _power(_shrunk_correlations(correlations, samples), -POWER / 2))
    return _polar(new) if symmetric else new


def _shrunk_squares(squares: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean squares (count, rows) over their mean, shrunk to 1 by the part of their variance that is due to sampling.

    A mean of `samples` squares of a normal variable has the relative variance 2 / samples. Rows of zeros get 1.
    """
    known = squares > 0
    mean = squares.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    ratios = torch.where(known, squares / mean, 1.0)
    variance = (ratios - 1).square().mean(-1, keepdim=True)
    sampling = 2 / (samples + 2) * ratios.square().mean(-1, keepdim=True)
    return 1 + (1 - sampling / variance.clamp(min=sampling)) * (ratios - 1)


def _shrunk_correlations(correlations: torch.Tensor, samples: int) -> torch.Tensor:
    """Correlation matrices (count, rows, rows) shrunk to the identity by oracle approximating shrinkage.

    Chen, Wiesel, Eldar and Hero, IEEE Trans. Signal Process. 58, 2010, equation 23, for a mean variance of 1.
    """
    rows = correlations.shape[-1]
    diagonal = correlations.diagonal(dim1=-2, dim2=-1)
    diagonal.fill_(1)
    shrinkage = _shrinkage(correlations.square().mean((-1, -2)), rows, samples)
    shrunk = (1 - shrinkage)[..., None, None] * correlations
    shrunk.diagonal(dim1=-2, dim2=-1).fill_(1)
    return shrunk


def _shrinkage(mean_square: torch.Tensor, rows: int, samples: int) -> torch.Tensor:
    """The weight (count,) of the identity, from the mean square of the correlations."""
    return ((mean_square + 1) / ((samples + 1) * (mean_square - 1 / rows).clamp(min=SMALLEST))).clamp(max=1)


def _power_of_few_samples(samples: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of the shrunk correlation matrices X X^T of X (count, rows, samples) with fewer samples than rows.

    (s I + (1 - s) X X^T)^e = s^e I + X V ((s + (1 - s) g)^e - s^e) / g V^T X^T for X^T X = V g V^T, so the matrices
    that are diagonalized are as small as the number of samples.
    """
    rows, count = samples.shape[-2:]
    values, vectors = torch.linalg.eigh(samples.mT @ samples)
    values = values.clamp(min=SMALLEST)
    weight = _shrinkage(values.square().sum(-1) / rows**2, rows, count).clamp(min=SMALLEST)[..., None]
    middle = ((weight + (1 - weight) * values).pow(exponent) - weight.pow(exponent)) / values
    projected = samples @ vectors
    power = (projected * middle[..., None, :]) @ projected.mT
    power.diagonal(dim1=-2, dim2=-1).add_(weight.pow(exponent))
    return power


def _power(matrices: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric positive definite matrices (count, rows, rows)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=SMALLEST).pow(exponent)[..., None, :]) @ vectors.mT


def _polar(factor: torch.Tensor) -> torch.Tensor:
    """(F F^T)^(1/2); a diagonal factor is positive already.

    Eigenvectors of F F^T take a third of the time of singular vectors of F. Eigenvalues below what float64 resolves are
    raised to it, so that the result stays positive definite.
    """
    if factor.ndim == 2:
        return factor
    values, vectors = torch.linalg.eigh(factor @ factor.mT)
    values = values.clamp(min=values.amax(-1, keepdim=True) * RESOLVED)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def _scales(squares: list[torch.Tensor]) -> list[torch.Tensor]:
    """The numbers (count,) that the matrices of each block are multiplied by, from their mean squares."""
    known = torch.cat([square[square > 0] for square in squares])
    middle = known.log().mean().exp()
    return [torch.where(square > 0, square / middle, 1.0).pow(-POWER / 2) for square in squares]


def _over_sides(scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A number for each matrix (count,), shaped to multiply its factor."""
    return scale.reshape(-1, *[1] * (factor.ndim - 1))
