"""A change of variables after which a few Lanczos steps can count the eigenvalues on either side of a threshold.

By Sylvester's law of inertia P^T (A - t I) P has as many negative eigenvalues as A - t I for every nonsingular P. Here
P is chosen so that the spectrum of T = P^T (A - t I) P has a small kurtosis. Few of its eigenvalues then lie near zero
relative to its range, and a recurrence of few steps resolves the sign of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from spectra.algorithms.balancing import balanced, positive_definite
from spectra.algorithms.kronecker import KroneckerTransform, blocks_of
from spectra.backend.float32 import in_float32
from spectra.backend.random_vectors import gaussian
from spectra.backend.vectors import dot
from spectra.operators.base import LinearOperator
from spectra.operators.derived import CongruentOperator, MeanOperator, StandIn

ROUNDS = 12  # balancing steps; with eight a count takes up to a tenth more products
WARM_ROUNDS = 8  # from the factors of an earlier checkpoint; with two a count takes 50 Lanczos steps more
ROUNDING_ROOM = 1.01  # times the error that the linearity gap shows; a larger error of products has another cause


@dataclass(frozen=True, eq=False)
class Congruence:
    """A change of variables for the Hessian of one model, with the kurtosis of the spectrum before and after it.

    Attributes:
        transform: P.
        mask: (n,), False for the coordinates that the operator maps to zero; None if there are none.
        shift: The threshold t for which P was found.
        kurtosis: |T^2 z|^2 |z|^2 / |T z|^4 for a random z, an estimate of n tr(T^4) / tr(T^2)^2. The number of Lanczos
            steps that a count takes grows with it.
        kurtosis_before: The kurtosis of A - t I.
        products: Products spent on the search.
    """

    transform: KroneckerTransform
    mask: torch.Tensor | None
    shift: float
    kurtosis: float
    kurtosis_before: float
    products: int

    def operator(self, op: LinearOperator, shift: float | None = None) -> CongruentOperator:
        """T = P^T (A - t I) P.

        Args:
            op: A.
            shift: The threshold t; None for the one for which P was found.

        Returns:
            T, which is zero on the masked coordinates.
        """
        return CongruentOperator(op, self.transform, shift=self.shift if shift is None else shift, mask=self.mask)

    def to(self, device: torch.device) -> Congruence:
        """The same change of variables with its factors on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, transform=self.transform.to(device), mask=mask)


@in_float32
def find_congruence(
    op: LinearOperator,
    *,
    shift: float = 0.0,
    rounds: int | None = None,
    start: Congruence | None = None,
    seed: int = 0,
    on_product: Callable[[], None] | None = None,
) -> Congruence | None:
    """Find the Kronecker factors of a change of variables, by a stochastic Sinkhorn iteration on T^2.

    P maps each weight matrix X to L X R^T. Among all factors L and R with a fixed determinant, ||T^2||_F is smallest if
    E[Y Y^T] and E[Y^T Y] are multiples of the identity, where Y is a block of T^2 z and z is normal. Each round draws a
    new z, computes Y with two products, and brings both matrices nearer to a multiple of the identity
    (`spectra.algorithms.balancing`). The factors with the smallest kurtosis are kept.

    Args:
        op: A, a symmetric operator (n, n) that knows the shapes of its parameters, such as a Hessian.
        shift: The threshold t.
        rounds: Number of rounds, of two products each; by default 12, or 8 from a given start.
        start: A congruence found at an earlier checkpoint, on another batch, or for another threshold.
        seed: Seed of the random vectors.
        on_product: Called after each product.

    Returns:
        The congruence. None if no parameter is a matrix, if the products have errors other than rounding error, and if
        no factors were found with a smaller kurtosis than that of A - t I.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    shapes, products = shapes_of(op), op.products
    if shapes is None or not any(math.prod(shape[1:]) > 1 for shape in shapes) or not _rounds_only(op):
        return None
    blocks = blocks_of(shapes)

    def multiply(operator: LinearOperator, vector: torch.Tensor) -> torch.Tensor:
        image = operator.multiply_rows_checked(vector[None])[0]
        if on_product is not None:
            on_product()
        return image

    vector = gaussian(op, seed=seed, index=0, stream="congruence")
    image = multiply(op, vector)
    second = multiply(op, image)
    mask = _touched(image, second)
    if not image.any():
        return None
    if mask is not None:
        vector = vector * mask
    if shift:  # the products of A - t I from those of A
        second = second - 2 * shift * image + shift**2 * vector
        image = image - shift * vector
    before = _kurtosis(vector, image, second)
    none = KroneckerTransform.identity(blocks, op.device)
    given = None if start is None or start.transform.blocks != blocks else start.transform
    warm = given is not None
    transform = _nonsingular(given, mask) if given is not None else none
    current = best = Congruence(transform, mask, shift, math.inf if warm else before, before, 0)
    rounds = (WARM_ROUNDS if warm else ROUNDS) if rounds is None else rounds
    for index in range(rounds + 1):
        if index or warm:
            operator = current.operator(op)
            vector = gaussian(op, seed=seed, index=index + 1, stream="congruence")
            vector = vector if mask is None else vector * mask
            image = multiply(operator, vector)
            second = multiply(operator, image)
            current = replace(current, kurtosis=_kurtosis(vector, image, second))
            best = min(best, current, key=lambda found: found.kurtosis)
        if index < rounds:
            current = replace(current, transform=balanced(current.transform, second, mask))
    return replace(best, products=op.products - products) if best.kurtosis < before else None


def shapes_of(op: LinearOperator) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of the parameters of an operator; None if it does not know them.

    Args:
        op: The operator, or a mean of operators that know the shapes.

    Returns:
        The shapes, in the order of the vector. None for sharded vectors, of which no rank has whole matrices.
    """
    if op.shards is not None:  # the factors multiply whole matrices
        return None
    if isinstance(op, MeanOperator):
        return shapes_of(op.operators[0])
    if isinstance(op, StandIn):
        return shapes_of(op.inner)
    shapes = getattr(getattr(op, "space", None), "shapes", None)
    if shapes is None or sum(map(math.prod, shapes)) != op.shape[0]:
        return None
    return tuple(map(tuple, shapes))


def _rounds_only(op: LinearOperator) -> bool:
    """Whether rounding is the only error of products. T shows its own rounding error, but P could enlarge others."""
    if isinstance(op, MeanOperator):
        return all(_rounds_only(member) for member in op.operators)
    if isinstance(op, StandIn):
        return _rounds_only(op.inner)
    if op.precision_error() > 0:
        return False
    return op.rounding() <= ROUNDING_ROOM * LinearOperator.rounding(op)  # what the linearity gap alone explains


def _touched(image: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """The mask of coordinates that are not exactly zero in both of two products; None if there are no others."""
    touched = (image != 0) | (second != 0)
    return None if bool(touched.all()) else touched


def _nonsingular(transform: KroneckerTransform, mask: torch.Tensor | None) -> KroneckerTransform:
    """The transform. With a mask, a positive definite one, whose principal submatrices are nonsingular."""
    return transform if mask is None else positive_definite(transform)


def _kurtosis(vector: torch.Tensor, image: torch.Tensor, second: torch.Tensor) -> float:
    """|T^2 z|^2 |z|^2 / |T z|^4."""
    square = dot(image, image)
    return dot(second, second) * dot(vector, vector) / square**2 if square > 0 else math.inf
