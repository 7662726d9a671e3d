"""What a Hessian operator assumes of a model, checked on the model itself before the first number.

Three assumptions: the products are the derivative of the gradient, the gradient is that of the loss as the model's own
parameters give it, and the weighted sum over pieces is the loss over all batches. Together they cost about five
products.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.optimize
import torch

from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.vectors import norm
from spectra.operators.hessian.batches import rows_in
from spectra.operators.hessian.graphs import GraphStore
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.precision import LOWER

FLOAT64_LIMIT = 2_000_000  # parameters up to which differences are taken in float64 on any device
FULL_RATE_FLOAT64 = ((8, 0), (9, 0), (10, 0))  # compute capabilities of A100, H100 and H200, B200
PRODUCT_TOLERANCE = {torch.float64: 2e-3, torch.float32: 0.2}  # relative error of a product against differences
SLOPE_STEPS = (1e-5, 1e-4, 1e-6)  # along the gradient, relative to the norm of the weights
SLOPE_TOLERANCE = 0.05
GRADIENT_TOLERANCE = 1e-3  # relative, between two ways to the same gradient in float32; hundreds of units of rounding
REPEATABLE = 1e-2  # relative difference of two evaluations above which a loss is not a function of the weights
SUM_TOLERANCE = 1e-4  # relative, of the gradient of the whole against the weighted sum over pieces
ROUNDING_ROOM = 20  # times the measured rounding error of a product or gradient is no disagreement
WHOLE_ROWS = 8  # times the rows of the largest piece are evaluated at once to compare the whole with its pieces


@runtime_checkable
class StraightThrough(Protocol):
    """A module whose derivative is by definition not that of its forward pass, such as a quantized layer.

    Near the current weights, the defined derivative is that of a smooth function: the forward pass with everything held
    fixed that has no true derivative, such as rounded numbers and clip masks. Finite differences go through that one.
    """

    def linearization(self) -> Linearization:
        """A new recorder, which serves all modules of the model."""
        ...


class Linearization(Protocol):
    """Holds what has no true derivative fixed."""

    def record(self) -> AbstractContextManager[None]:
        """Note the values of the one forward pass inside."""
        ...

    def replay(self) -> AbstractContextManager[None]:
        """Use the values of the next recorded forward pass in the one inside, starting again after the last."""
        ...


# -- the pieces add up to the whole


def settle_shares(graphs: GraphStore) -> tuple[Objective, float, str]:
    """Compare the gradient over all batches together with the weighted sum over the pieces.

    Where they differ, the loss may weigh rows by something that is not counted, such as class weights inside a closure.
    Then the shares are found for which the pieces' gradients add up to that of the whole. A loss without such shares,
    as a contrastive loss or one with batch normalisation in training mode, is no mean over rows; the plain mean over
    the batches is then what is measured.

    Args:
        graphs: the gradient, by which pieces are evaluated.

    Returns:
        The objective to measure, the relative error of the weighted sum over pieces, and a note for the record.

    Raises:
        InputError: where microbatches were asked for that change the loss.
    """
    objective = graphs.objective
    if len(objective.pieces) == 1 or objective.weight is not None:
        return objective, 0.0, ""
    whole = objective.whole()
    if whole is None or rows_in(whole.batch) > max(WHOLE_ROWS * max(objective.rows), 256):
        return _by_parts(graphs)
    try:
        wanted_loss, wanted = graphs.gradient_at(objective.with_pieces([whole]))
    except torch.OutOfMemoryError:
        return _by_parts(graphs)
    loss, summed = graphs.gradient_at(objective)
    error = _disagreement(loss, summed, wanted_loss, wanted)
    if error <= SUM_TOLERANCE:
        return objective, error, ""
    found = _shares_that_fit(graphs, objective, wanted_loss, wanted)
    if found is not None:
        return found, error, "batches weigh what the loss itself gives them, found by comparing it over all of them"
    return _mean_over_batches(objective, error)


def _by_parts(graphs: GraphStore) -> tuple[Objective, float, str]:
    """Where all batches together are too large or of different shapes: compare pieces with their own halves."""
    error = _error_of_parts(graphs)
    if error is None or error <= SUM_TOLERANCE:
        return graphs.objective, error or 0.0, ""
    return _mean_over_batches(graphs.objective, error)


def may_be_cut(graphs: GraphStore) -> bool:
    """Whether a few rows of the largest piece have the loss that their parts add up to."""
    try:
        error = _error_of_parts(graphs)
    except (InputError, RuntimeError, ValueError):  # rows of this batch do not stand alone
        return False
    return error is not None and error <= SUM_TOLERANCE


def _error_of_parts(graphs: GraphStore) -> float | None:
    """The relative error of a weighted sum over parts of a few rows, None where there are no two rows that fit."""
    objective = graphs.objective
    for rows in (6, 2):
        rows = min(rows, max(objective.rows))
        if rows < 2:
            return None
        sample = objective.some_rows(rows)
        try:
            wanted_loss, wanted = graphs.gradient_at(objective.with_pieces([sample]))
        except torch.OutOfMemoryError:
            continue
        parts = list(objective.split(sample, max(rows // 3, 1)))
        return _disagreement(*graphs.gradient_at(objective.with_pieces(parts)), wanted_loss, wanted)
    return None


def _mean_over_batches(objective: Objective, error: float) -> tuple[Objective, float, str]:
    if objective.is_cut:
        raise InputError(
            f"the loss of a batch is not the mean over its microbatches (they differ by {error:.1%}), as with batch "
            "normalisation in training mode or a contrastive loss: leave out microbatch="
        )
    note = (
        f"the loss is no weighted mean over rows (the batches together differ by {error:.1%}): the plain mean over the "
        f"{len(objective.pieces)} batches is measured; pass weight= for another"
    )
    return objective.with_shares([1 / len(objective.pieces)] * len(objective.pieces)), error, note


def _shares_that_fit(graphs: GraphStore, objective: Objective, loss: float, gradient: torch.Tensor) -> Objective | None:
    """The objective with non-negative shares whose pieces add up to a loss and gradient, None where there are none.

    The gradients are compared through random signed sums of their entries, four for each piece.
    """
    count = 4 * len(objective.pieces)

    def sketch(loss: float, gradient: torch.Tensor) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        padded = torch.zeros(-(-len(gradient) // count) * count, dtype=torch.float64)
        padded[: len(gradient)] = gradient.double().cpu()
        padded *= torch.randint(0, 2, padded.shape, generator=generator) * 2 - 1
        return np.append(padded.view(-1, count).sum(dim=0).numpy(), loss)

    one_each = objective.with_shares([1.0] * len(objective.pieces))
    columns = [sketch(*graphs.gradient_at(one_each.with_pieces([piece]))) for piece in one_each.pieces]
    shares, _ = scipy.optimize.nnls(np.stack(columns, axis=1), sketch(loss, gradient))
    found = objective.with_shares(shares.tolist())
    return found if _disagreement(*graphs.gradient_at(found), loss, gradient) <= SUM_TOLERANCE else None


def _disagreement(loss: float, gradient: torch.Tensor, wanted_loss: float, wanted: torch.Tensor) -> float:
    scale = max(norm(gradient), norm(wanted))
    of_gradient = norm(gradient - wanted) / scale if scale > 0 else 0.0
    return max(of_gradient, abs(loss - wanted_loss) / max(abs(loss), abs(wanted_loss), 1e-30))


# -- the gradient is that of the model's own parameters


def check_gradient(graphs: GraphStore) -> float:
    """Compare the gradient with the one that the model's own parameters give, as a training computes it.

    They differ where the loss is not a deterministic function, where a loss function or a module holds parameters that
    the measurement cannot replace (only matters if they are in another precision or moved), and under gradient hooks,
    which belong to the training and not to the loss.

    Args:
        graphs: the graphs of the gradient that is checked.

    Returns:
        The relative difference, without parameters that have hooks. NaN for a model whose forward pass writes to its
        weights, and for weights that are inference tensors: these cannot be differentiated themselves.

    Raises:
        InputError: where the difference is larger than rounding, with the cause.
    """
    if graphs.writes_to_weights or any(p.is_inference() for p in graphs.model.parameters()):
        return math.nan
    measured_loss, measured = graphs.loss(), graphs.gradient()
    if graphs.precision in LOWER:
        with graphs.in_full_precision():
            measured_loss, measured = graphs.gradient_at(graphs.objective)
    with graphs.in_full_precision():
        loss, own = graphs.gradient_of_the_model_itself()
    hooked = [name for name, p in zip(graphs.space.names, graphs.space.parameters, strict=True) if p._backward_hooks]
    if hooked:
        note = f"gradient hooks, which are no part of the loss, are left out: {', '.join(hooked[:3])}"
        if note not in graphs.notes:
            graphs.notes.append(note)
        mask = torch.cat(
            [
                torch.full((size,), name not in hooked)
                for name, size in zip(graphs.space.names, graphs.space.sizes, strict=True)
            ]
        ).to(graphs.device)
        measured, own = measured * mask, own * mask
    scale = max(norm(own), norm(measured))
    error = norm(measured - own) / scale if scale > 0 else 0.0
    tolerance = GRADIENT_TOLERANCE if graphs.copy is None else max(GRADIENT_TOLERANCE, _rounding_of_weights(graphs))
    loss_error = abs(loss - measured_loss) / max(abs(loss), 1e-30)
    if error <= tolerance and loss_error <= tolerance:
        return error
    with graphs.in_full_precision():
        again = norm(graphs.gradient_at(graphs.objective)[1] - graphs.gradient_at(graphs.objective)[1])
    if again > REPEATABLE * scale or (graphs.copy is None and not hooked and again > 0.1 * error * scale):
        raise InputError(
            f"the loss is not a deterministic function: its gradient changed by {again / scale:.1%} between two "
            "evaluations; switch off sampling in the forward pass or measure with training=False"
        )
    raise InputError(
        f"the gradient differs by {error:.1%} from the one of the model's own parameters (loss {measured_loss:.6g}, "
        f"{loss:.6g} by the model itself): the loss function or a module holds parameters of its own that cannot be "
        "replaced; let it read them from the model when it is called"
        + (", or leave out precision=" if graphs.precision is not None else "")
    )


def _rounding_of_weights(graphs: GraphStore) -> float:
    """How far the gradient in the model's own precision may be off that of a copy: 64 units of its rounding."""
    narrowest = max(torch.finfo(p.dtype).eps for p in graphs.model.parameters() if p.is_floating_point())
    return 64 * narrowest


# -- the product is the derivative of the gradient


def check_product(graphs: GraphStore, u: torch.Tensor, product: torch.Tensor, rounding: float) -> float:
    """Compare a Hessian-vector product with central differences of the gradient, (g(w + h u) - g(w - h u)) / 2h.

    The differences are in float64, at several steps h: a large one drowns rounding, a small one does not cross the
    kinks of piecewise linear functions. The step that agrees best counts. Entries whose gradient is zero by definition,
    as the row of an embedding's padding_idx, are not moved: their rows and columns of H are zero.

    Args:
        graphs: the gradient.
        u: a random vector, (n,).
        product: H u by the engine that the measurement uses, (n,).
        rounding: relative rounding error of a product.

    Returns:
        The relative error of the product, NaN where no difference could be taken.

    Raises:
        InputError: where it is larger than rounding explains, naming the parameter that it is largest in.
    """
    dtype = _dtype_of_differences(graphs)
    tolerance = max(PRODUCT_TOLERANCE[dtype], ROUNDING_ROOM * rounding)
    size = norm(product)
    u = u * ((product != 0) | (graphs.gradient() != 0))
    length = _relative(_norm_of_weights(graphs), norm(u))
    tried: list[torch.Tensor] = []
    errors: list[float] = []
    with _linearized(graphs, dtype):
        for relative in _steps(graphs, dtype):
            h = relative * length
            with contextlib.suppress(NonFiniteError):
                ahead, behind = (
                    graphs.gradient_at(graphs.objective, dtype=dtype, offset=s * h * u)[1] for s in (1, -1)
                )
                tried.append(((ahead - behind) / (2 * h)).to(product.dtype))
                errors.append(_relative(norm(tried[-1] - product), max(size, norm(tried[-1]))))
                if errors[-1] <= tolerance:
                    return errors[-1]
    if not errors:
        return math.nan
    best = min(range(len(errors)), key=errors.__getitem__)
    others = [norm(tried[best] - other) for j, other in enumerate(tried) if j != best]
    uncertain = _relative(min(others, default=0.0), max(size, norm(tried[best])))
    if errors[best] <= 3 * uncertain:
        return math.nan
    worst = _worst_parameter(graphs, tried[best] - product)
    raise InputError(
        f"Hessian products of this model are wrong: one is {errors[best]:.1%} off a difference of the gradient, "
        f"most in '{worst}'. Likely causes are reentrant checkpointing (use_reentrant=False mends it), weight_norm, a "
        "custom autograd.Function without a second derivative or a straight-through estimator; replace that operation, "
        "or pass strict=False to measure all the same"
    )


def check_slope(graphs: GraphStore) -> float:
    """Compare the norm of the gradient with a central difference of the loss along it.

    Args:
        graphs: the graphs of the gradient that is checked.

    Returns:
        The relative error of the gradient's norm, NaN where no difference could be taken.

    Raises:
        InputError: where the gradient is not that of the loss.
    """
    gradient = graphs.gradient()
    slope = norm(gradient)
    dtype = _dtype_of_differences(graphs)
    if slope == 0 or dtype == torch.float32:
        return math.nan
    direction, length = gradient / slope, _norm_of_weights(graphs)
    errors = []
    with _linearized(graphs, dtype):
        for relative in SLOPE_STEPS:
            h = relative * length
            ahead, behind = (graphs.loss_at(dtype=dtype, offset=s * h * direction) for s in (1, -1))
            found = (ahead - behind) / (2 * h)
            if not math.isfinite(found):
                continue
            errors.append(abs(found / slope - 1))
            if errors[-1] <= SLOPE_TOLERANCE:
                return errors[-1]
    if not errors or max(errors) > 2 * min(errors):  # the steps do not agree among themselves
        return math.nan
    raise InputError(
        f"the gradient is not that of the loss: along it the loss changes otherwise (off by {min(errors):.0%}). "
        "A custom backward or a straight-through estimator makes it so; measure without it, or pass strict=False"
    )


def _dtype_of_differences(graphs: GraphStore) -> torch.dtype:
    """float64 wherever the device computes it at a fair rate, or the model is small, and the model runs in it."""
    fair = graphs.device.type == "cpu"
    if graphs.device.type == "cuda":
        fair = torch.cuda.get_device_capability(graphs.device) in FULL_RATE_FLOAT64
    if graphs.dtype == torch.float64:
        return torch.float64
    if graphs.training:  # dropout draws another mask in another precision
        return torch.float32
    if not fair and graphs.space.dimension > FLOAT64_LIMIT:
        return torch.float32
    try:
        graphs.loss_at(dtype=torch.float64)
    except (RuntimeError, ValueError, TypeError):  # such as constants of the model in float32; memory
        return torch.float32
    return torch.float64


def _steps(graphs: GraphStore, dtype: torch.dtype) -> tuple[float, ...]:
    """Steps relative to the norm of the weights, the likeliest first."""
    if dtype == torch.float32:
        return (1e-2, 4e-2, 2e-3)
    # transformers' models compute normalisation and softmax in float32 even in a float64 model
    return (1e-4, 1e-3, 1e-5, 1e-2) if hasattr(graphs.model, "config") else (1e-7, 1e-5, 1e-3)


def _norm_of_weights(graphs: GraphStore) -> float:
    squares = [float(p.detach().double().square().sum()) for p in graphs.space.parameters]
    return math.sqrt(sum(squares)) or 1.0


def _worst_parameter(graphs: GraphStore, difference: torch.Tensor) -> str:
    parts = [norm(part) for part in difference.split(graphs.space.sizes)]
    return graphs.space.names[max(range(len(parts)), key=parts.__getitem__)]


def _relative(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@contextlib.contextmanager
def _linearized(graphs: GraphStore, dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules with straight-through estimators compute the function that their derivative belongs to."""
    found = next((m.linearization() for m in graphs.model.modules() if isinstance(m, StraightThrough)), None)
    if found is None:
        yield
        return
    before = graphs.each_forward
    try:
        graphs.each_forward = found.record
        graphs.loss_at(dtype=dtype)
        graphs.each_forward = found.replay
        yield
    finally:
        graphs.each_forward = before
