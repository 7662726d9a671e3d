"""One step of a Sinkhorn iteration: Kronecker factors that make the rows and columns of sampled matrices more alike.

For Y a matrix of independent columns, Y Y^T is the covariance of its rows up to a factor. A step multiplies the factor
of the rows by a negative power of it, part of the way to where it is a multiple of the identity. The covariance is
known from as many samples as Y has columns, so its parts are shrunk by what sampling explains.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from spectra.algorithms.kronecker import Block, KroneckerTransform

POWER = 0.4  # of the covariance that a step takes out: 1 where off-diagonal blocks dominate T^2, 1/4 for a diagonal T
SMALLEST = 1e-12  # eigenvalue of a correlation matrix, where rounding has made it less


def balanced(transform: KroneckerTransform, image: torch.Tensor, mask: torch.Tensor | None) -> KroneckerTransform:
    """The transform after one step.

    Rows, columns, and whole blocks are brought nearer to equal mean squares, each by the same power, and rows and
    columns to no correlation.

    Args:
        transform: P.
        image: (n,), T^2 z for a random z.
        mask: (n,), False for coordinates in which T is zero; None where there are none. With a mask the new factors are
            symmetric positive definite, so that the rows and columns of the other coordinates are nonsingular.

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
    """The transform with (F F^T)^(1/2) in place of each factor F; T is then the same but for a rotation."""
    left, right = (tuple(map(_polar, factors)) for factors in (transform.left, transform.right))
    return replace(transform, left=left, right=right)


def _step_of_block(
    block: Block, left: torch.Tensor, right: torch.Tensor, image: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new factors of a block, and the mean squares (count,) of its matrices."""
    matrices = block.matrices(image[None])[0]
    ones = torch.ones_like(matrices) if kept is None else block.matrices(kept[None])[0]
    symmetric = kept is not None
    square = matrices.square().sum((-1, -2)) / ones.sum((-1, -2)).clamp(min=1)
    new_left = _step(left, matrices, ones.mean(-1), symmetric=symmetric)
    new_right = _step(right, matrices.mT, ones.mean(-2), symmetric=symmetric)
    return new_left, new_right, square


def _step(factor: torch.Tensor, matrices: torch.Tensor, share: torch.Tensor, *, symmetric: bool) -> torch.Tensor:
    """The new factor of the rows of `matrices` (count, rows, columns); share: of entries kept in each row."""
    samples = matrices.shape[-1]
    if matrices.shape[-2] == 1:
        return factor
    share = torch.where(share > 0, share, 1.0)
    squares = matrices.square().mean(-1) / share
    roots = _shrunk_squares(squares, samples).pow(-POWER / 2)
    if factor.ndim == 2:
        return factor * roots
    correlations = matrices @ matrices.mT / samples
    inverse = torch.where(squares > 0, squares * share, 1.0).rsqrt()
    correlations = correlations * inverse[..., :, None] * inverse[..., None, :]
    new = factor @ (roots[..., :, None] * _power(_shrunk_correlations(correlations, samples), -POWER / 2))
    return _polar(new) if symmetric else new


def _shrunk_squares(squares: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean squares (count, rows) over their mean, shrunk to 1 by the part of their variance that sampling explains.

    A mean of `samples` squares of a normal variable has the relative variance 2 / samples. Rows of zeros are left at 1.
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
    mean_square = correlations.square().mean((-1, -2))
    shrinkage = ((mean_square + 1) / ((samples + 1) * (mean_square - 1 / rows).clamp(min=SMALLEST))).clamp(max=1)
    shrunk = (1 - shrinkage)[..., None, None] * correlations
    shrunk.diagonal(dim1=-2, dim2=-1).fill_(1)
    return shrunk


def _power(matrices: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric positive definite matrices (count, rows, rows)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=SMALLEST).pow(exponent)[..., None, :]) @ vectors.mT


def _polar(factor: torch.Tensor) -> torch.Tensor:
    """(F F^T)^(1/2), by the singular vectors of F; a diagonal factor is positive already."""
    if factor.ndim == 2:
        return factor
    vectors, values, _ = torch.linalg.svd(factor)
    return (vectors * values[..., None, :]) @ vectors.mT


def _scales(squares: list[torch.Tensor]) -> list[torch.Tensor]:
    """By how much to multiply the matrices of each block (count,), whose mean squares are given."""
    known = torch.cat([square[square > 0] for square in squares])
    middle = known.log().mean().exp()
    return [torch.where(square > 0, square / middle, 1.0).pow(-POWER / 2) for square in squares]


def _over_sides(scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A number for each matrix (count,), shaped to multiply its factor."""
    return scale.reshape(-1, *[1] * (factor.ndim - 1))
