"""Two properties of a Hessian that products show: it is symmetric, and it is zero only where the loss is flat."""

from __future__ import annotations

import math

import torch

from spectra.operators.hessian.checks import FailedCheckError
from spectra.operators.hessian.graphs import GraphStore

SYMMETRY_TOLERANCE = 1e-2  # relative asymmetry of the matrix above which it is the Hessian of no function
ROUNDING_ROOM = 20  # an asymmetry up to this many times the measured rounding error is accepted
FAKE_QUANTIZATION = ("FakeQuantize", "FqHelper")  # in the names of torch's nodes of it
# Functions that are constant between jumps: torch's derivative is zero everywhere.
STEPS = {"Round": "round", "Floor": "floor", "Ceil": "ceil", "Trunc": "trunc", "Sign": "sign", "Sgn": "sgn"}


def check_symmetry(gap: float, rounding: float, dimension: int) -> None:
    """Refuse products of a matrix that is not symmetric, as of a gradient that is the gradient of no function.

    A matrix A + E with E random of relative size e = ||E||_F / ||A||_F has a gap of about e / sqrt(n).

    Args:
        gap: |u.Av - v.Au| / (||Av|| ||u||) of random u and v, see `LinearOperator.asymmetry`.
        rounding: The relative rounding error of a product.
        dimension: n.

    Raises:
        FailedCheckError: If the asymmetry is larger than rounding error.
    """
    asymmetry = gap * math.sqrt(dimension)
    if asymmetry > max(SYMMETRY_TOLERANCE, ROUNDING_ROOM * rounding):
        raise FailedCheckError(
            f"the products are those of a matrix that is not symmetric (by about {asymmetry:.0%}), so the gradient is "
            "not that of a loss: look for a gradient that is scaled, clipped or replaced on its way, as by a custom "
            "autograd.Function; or pass strict=False to measure all the same"
        )


def check_steps(graphs: GraphStore, product: torch.Tensor) -> None:
    """Refuse a loss whose derivatives are zero because it is rounded, and note parameters for which that holds.

    Args:
        graphs: The gradient's graphs.
        product: H u for a random u, (n,).

    Raises:
        FailedCheckError: If gradient and product are zero, and the loss is computed with a function that has jumps.
    """
    if graphs.shards is not None:
        return
    zero = (product == 0) & (graphs.gradient() == 0)
    flat = torch.stack([part.all() for part in zero.split(graphs.space.sizes)]).tolist()
    names = [n for n, is_flat in zip(graphs.space.names, flat, strict=True) if is_flat and n not in graphs.unused]
    found = _steps_in(graphs) if names else []
    if not found:
        return
    listed = ", ".join(found)
    if all(flat):
        raise FailedCheckError(
            f"every derivative of the loss is zero, since it is computed with {listed}, which is constant between "
            "jumps: leave that out of loss=, or use an estimator of its derivative, such as x + (x.round() - x)"
            ".detach(), and pass strict=False"
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    graphs.note(f"rows are zero of parameters whose derivatives may end at {listed}: {', '.join(names[:3])}{more}")


def check_straight_through(graphs: GraphStore) -> None:
    """Refuse fake quantization by torch.ao where its products could not be compared with differences.

    Args:
        graphs: The gradient's graphs.

    Raises:
        FailedCheckError: If the loss is computed with fake quantization.
    """
    names = [type(node).__name__ for node in graphs.operations()]
    if any(mark in name for name in names for mark in FAKE_QUANTIZATION):
        raise FailedCheckError(
            "the model computes with fake quantization, whose derivative is a straight-through estimator, and its "
            "products cannot be compared with differences of the gradient: measure it before torch.ao prepares it, or "
            "pass strict=False for the straight-through Hessian"
        )


def _steps_in(graphs: GraphStore) -> list[str]:
    """The functions of `STEPS` in the graph of the loss."""
    stems = {type(node).__name__.partition("Backward")[0] for node in graphs.operations()}
    return [name for stem, name in STEPS.items() if stem in stems]
