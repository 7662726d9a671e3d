"""The assumptions of a Hessian operator about a model, checked on the model itself before the first product.

Two are checked here: Hessian-vector products are the derivative of the gradient, and the gradient is that of the loss
in the model's own parameters. A third is checked in `spectra.operators.hessian.pieces`: the loss over all batches is
the weighted sum over its pieces. All checks together cost about five products.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.vectors import any_entry, dot, norm
from spectra.operators.hessian.branches import HeldBranches
from spectra.operators.hessian.graphs import LOSS_ROUNDING, GraphStore
from spectra.operators.hessian.isolation import names_with_hooks
from spectra.operators.hessian.precision import LOWER

T = TypeVar("T")

FLOAT64_LIMIT = 2_000_000  # number of parameters up to which differences are computed in float64 on any device
FULL_RATE_FLOAT64 = ((8, 0), (9, 0), (10, 0))  # compute capabilities of A100, H100 and H200, B200
PRODUCT_TOLERANCE = {torch.float64: 2e-3, torch.float32: 0.05}  # relative difference of a product from a difference
QUICK_STEP = 2e-3  # of float32 differences, relative to the weights' norm; smooth models need no float64
QUICK_TOLERANCE = 2e-3  # relative difference up to which a difference in float32 is conclusive
ROUNDING_LIMIT = 0.05  # relative rounding error of a product above which its precision is refused
SLOPE_STEPS = {torch.float64: (1e-5, 1e-4, 1e-6), torch.float32: (1e-3, 1e-2, 3e-3)}  # relative to the weights' norm
SLOPE_TOLERANCE = 0.05  # relative difference of a slope from a difference of losses
SLOPE_ROUNDING = 1e3  # rounding errors of the loss that a difference of losses has to exceed
UNUSED_STEP = 1e-4  # relative to a parameter's mean absolute value, for parameters that the gradient does not reach
GRADIENT_TOLERANCE = 1e-3  # relative difference of two computations of a gradient in float32
REPEATABLE = 1e-2  # relative difference of two evaluations above which a loss is not a function of the weights
ROUNDING_ROOM = 20  # a difference up to this many times the measured rounding error is accepted


class FailedCheckError(InputError):
    """A comparison that shows that numbers of this model would be wrong."""


@runtime_checkable
class StraightThrough(Protocol):
    """A module whose derivative is by definition not that of its forward pass, such as rounding.

    Its derivative is that of another, smooth function: the forward pass with rounded numbers and clip masks held fixed.
    Finite differences are taken of that function.
    """

    def linearization(self) -> Linearization:
        """A new recorder, which serves all modules of the model."""
        ...


def hessian_mode(model: nn.Module) -> str:
    """Which Hessian products are of: "full", or "ste" where modules of the model have a straight-through derivative."""
    return "ste" if any(isinstance(module, StraightThrough) for module in model.modules()) else "full"


class Linearization(Protocol):
    """Holds values fixed that have no true derivative, such as rounded numbers."""

    def record(self) -> AbstractContextManager[None]:
        """A context that records these values in one forward pass."""
        ...

    def replay(self) -> AbstractContextManager[None]:
        """A context in which one forward pass uses the values of the next recorded one; after the last, the first."""
        ...


# -- the gradient is that of the model's own parameters


def check_gradient(graphs: GraphStore) -> float:
    """Compare loss and gradient with those that the model's own parameters give, as a training computes them.

    They differ where the loss is not a deterministic function, and where a loss function or a module holds parameters
    that the measurement cannot replace. In evaluation mode a forward pass that draws random numbers is given others
    here. Gradient hooks belong to the training and not to the loss, and do not run.

    Where the weights themselves are measured, and no copy in another precision, the loss is compared first. If it is
    the same to rounding, the gradient is not compared: autograd has seen every parameter that the loss reads, and
    `check_derivatives` compares the gradient with the loss. Nothing is compared again if the comparison of the batches
    with all of them together has used the model's own parameters for these, see `spectra.operators.hessian.pieces`.

    Args:
        graphs: The graphs of the gradient that is checked.

    Returns:
        The relative difference, of the gradient if that was compared, else of the loss. NaN for a model whose forward
        pass writes to its weights, and for weights that are inference tensors: these cannot be differentiated
        themselves.

    Raises:
        InputError: If the difference is larger than rounding error. The message names the cause.
    """
    hooked = names_with_hooks(graphs.model)
    if hooked:
        graphs.note(f"gradient hooks, which are no part of the loss, are left out: {', '.join(hooked[:3])}")
    if not graphs.runs_without_stand_ins:
        return math.nan
    if graphs.own_gradient_error is not None:
        return graphs.own_gradient_error
    if graphs.copy is None and graphs.precision not in LOWER:
        with graphs.other_random_numbers():
            own_loss = graphs.loss_of_the_model_itself()
        error = _relative(abs(own_loss - graphs.loss()), abs(own_loss))
        if error <= LOSS_ROUNDING * torch.finfo(graphs.dtype).eps:
            return error
    return _compare_gradients(graphs)


def _compare_gradients(graphs: GraphStore) -> float:
    """The relative difference of the gradient to the model's own, an InputError if that is more than rounding."""
    measured_loss, measured = graphs.loss(), graphs.gradient()
    if graphs.precision in LOWER:
        with graphs.in_full_precision():
            measured_loss, measured = graphs.gradient_at(graphs.objective)
    try:
        with graphs.in_full_precision(), graphs.other_random_numbers():
            loss, own = graphs.gradient_of_the_model_itself()
    except RuntimeError:  # such as a batch in another precision than the model's
        if graphs.copy is None:
            raise
        graphs.note("the copy could not be compared with the model itself, which does not run on these batches")
        return math.nan
    tolerance = GRADIENT_TOLERANCE if graphs.copy is None else max(GRADIENT_TOLERANCE, _rounding_of_weights(graphs))
    scale = max(norm(own), norm(measured))
    error = norm(measured - own) / scale if scale > 0 else 0.0
    loss_error = abs(loss - measured_loss) / max(abs(loss), 1e-30)
    if error <= tolerance and loss_error <= tolerance:
        return error
    with graphs.in_full_precision():
        once = graphs.gradient_at(graphs.objective)[1]
        with graphs.other_random_numbers():
            again = norm(once - graphs.gradient_at(graphs.objective)[1])
    if again > REPEATABLE * scale or (graphs.copy is None and again > 0.1 * error * scale):
        raise InputError(
            f"the loss is not a deterministic function: its gradient changed by {again / scale:.1%} between two "
            "evaluations; switch off sampling in the forward pass, or fix what it draws"
        )
    raise InputError(
        f"the gradient differs by {error:.1%} from the one of the model's own parameters (loss {measured_loss:.6g}, "
        f"{loss:.6g} by the model itself): the loss function or a module holds parameters of its own that cannot be "
        "replaced; let it read them from the model when it is called"
        + (", or leave out precision=" if graphs.precision is not None else "")
    )


def _rounding_of_weights(graphs: GraphStore) -> float:
    """How far the gradient in the model's own precision may be from that of a copy: 64 times its epsilon."""
    narrowest = max(torch.finfo(p.dtype).eps for p in graphs.model.parameters() if p.is_floating_point())
    return 64 * narrowest


# -- the product is the derivative of the gradient, and the gradient that of the loss


@dataclass(frozen=True)
class DerivativeErrors:
    """How far derivatives are from central differences.

    Attributes:
        product: Relative error of a Hessian-vector product; NaN if the differences cannot be computed.
        rounding: The part of it that is known to be rounding error.
        slope: Relative error of the gradient's component along the direction; NaN if rounding error hides it.
    """

    product: float
    rounding: float
    slope: float


def check_derivatives(
    graphs: GraphStore, direction: torch.Tensor, product: torch.Tensor, rounding: float
) -> DerivativeErrors:
    """Compare a Hessian-vector product and the gradient with central differences along a direction u.

    The product is compared with (g(w + h u) - g(w - h u)) / 2h, and the slope g . u with the same difference of the
    loss, which costs nothing more. The differences are computed in float64 if that is cheap and the model runs in it.
    Entries whose gradient is zero by definition, as the row of an embedding's padding_idx, are not moved: their rows
    and columns of H are zero.

    Args:
        graphs: The gradient's graphs.
        direction: The direction u, (n,), random.
        product: H u by the engine that the measurement uses, (n,).
        rounding: Relative rounding error of a product as far as it is known.

    Returns:
        The relative errors.

    Raises:
        FailedCheckError: If an error is larger than rounding error. The message names the parameter with the largest.
    """
    gradient = graphs.gradient()
    moved = (product != 0) | (gradient != 0)
    if any_entry(
        moved, over=graphs.shards
    ):  # else the loss is flat, as of a saturated softmax, and the differences have to be zero too
        direction = direction * moved
    if graphs.dtype == torch.float32:
        found = _quick_comparison(graphs, direction, product, gradient, rounding)
        if found is not None:
            return found

    def compare(dtype: torch.dtype) -> DerivativeErrors:
        with _linearized(graphs, dtype):
            error, part, slope = _check_product(graphs, direction, product, rounding, dtype)
            return DerivativeErrors(error, part, check_slope(graphs, direction, gradient, slope, dtype))

    return _in_a_precision_that_runs(graphs, compare)


def _quick_comparison(
    graphs: GraphStore, u: torch.Tensor, product: torch.Tensor, gradient: torch.Tensor, rounding: float
) -> DerivativeErrors | None:
    """The errors from one difference in float32; None where they are too large for that to be conclusive."""
    h = QUICK_STEP * _relative(norm_of_weights(graphs), norm(u, over=graphs.shards))
    with _linearized(graphs, torch.float32, branches=graphs.is_piecewise_linear()):
        try:
            difference, slope = _central_difference(graphs, h * u, torch.float32)
        except NonFiniteError:
            return None
        over = graphs.shards
        error = _relative(norm(difference / h - product, over=over), norm(product, over=over))
        if not error <= max(QUICK_TOLERANCE, ROUNDING_ROOM * rounding):
            return None
        return DerivativeErrors(error, 0.0, check_slope(graphs, u, gradient, slope / h, torch.float32))


def _central_difference(graphs: GraphStore, offset: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Half of how gradient and loss change from the weights less an offset (n,) to the weights plus it."""
    more, ahead = graphs.differentiated_at(dtype=dtype, offset=offset)
    less, behind = graphs.differentiated_at(dtype=dtype, offset=-offset)
    return (ahead - behind) / 2, (more - less) / 2


def _check_product(
    graphs: GraphStore, u: torch.Tensor, product: torch.Tensor, rounding: float, dtype: torch.dtype
) -> tuple[float, float, float]:
    """The relative error of a product, the part of it that is rounding error, and the slope of the loss along u.

    If the product disagrees with the differences, and the same product in float64 agrees, its error is rounding error.
    """
    tolerance = max(PRODUCT_TOLERANCE[dtype], ROUNDING_ROOM * rounding)
    error, differences, slope = _best_difference(graphs, u, product, tolerance, dtype)
    if error <= tolerance or differences is None:
        return error, 0.0, slope
    if dtype != product.dtype:
        exact = graphs.product_at(u, dtype).to(product.dtype)
        over = graphs.shards
        if norm(exact - differences, over=over) <= PRODUCT_TOLERANCE[dtype] * norm(exact, over=over):
            if error <= ROUNDING_LIMIT:
                graphs.note(f"rounding changes a product by {error:.1%}; precision='float64' avoids that")
                return error, error, slope
            raise FailedCheckError(
                f"rounding changes a Hessian product by {error:.0%}, as where the loss is nearly zero: "
                "measure with precision='float64'"
            )
    worst = _worst_parameter(graphs, differences - product)
    raise FailedCheckError(
        f"Hessian products of this model are wrong: one is {error:.1%} off a difference of the gradient, most in "
        f"'{worst}'. {_cause(graphs)}; replace that operation, or pass strict=False to measure all the same"
    )


def _best_difference(
    graphs: GraphStore, u: torch.Tensor, product: torch.Tensor, tolerance: float, dtype: torch.dtype
) -> tuple[float, torch.Tensor | None, float]:
    """The relative error of a product, the difference that it agrees best with, and the slope of the loss there.

    Several step sizes are tried: a large one makes rounding error small, a small one does not cross the kinks of
    piecewise linear functions. NaN and None if the differences disagree among themselves as much as with the product.
    """
    length = _relative(norm_of_weights(graphs), norm(u, over=graphs.shards))
    size = functools.partial(norm, over=graphs.shards)
    tried: list[torch.Tensor] = []
    errors: list[float] = []
    slopes: list[float] = []
    for relative in _steps(graphs, dtype):
        h = relative * length
        with contextlib.suppress(NonFiniteError):
            difference, slope = _central_difference(graphs, h * u, dtype)
            tried.append((difference / h).to(product.dtype))
            slopes.append(slope / h)
            errors.append(_relative(size(tried[-1] - product), max(size(product), size(tried[-1]))))
            if errors[-1] <= tolerance:
                return errors[-1], tried[-1], slopes[-1]
    best = min(range(len(errors)), key=errors.__getitem__, default=None)
    if best is not None:
        others = [size(tried[best] - other) for j, other in enumerate(tried) if j != best]
        uncertain = _relative(min(others, default=0.0), max(size(product), size(tried[best])))
        if errors[best] > 3 * uncertain:
            return errors[best], tried[best], slopes[best]
    graphs.note("products could not be compared with differences of the gradient, which is not smooth here")
    return math.nan, None, math.nan


def check_slope(graphs: GraphStore, u: torch.Tensor, gradient: torch.Tensor, slope: float, dtype: torch.dtype) -> float:
    """The relative error of the slope g . u, or if that is large, of the slope along the gradient.

    Along the gradient the loss changes most, so that rounding error matters least.
    """
    steepest, expected = norm(gradient, over=graphs.shards), dot(gradient, u, over=graphs.shards)
    if steepest == 0:
        return math.nan
    if abs(slope - expected) <= SLOPE_TOLERANCE * abs(expected):
        return abs(slope / expected - 1)
    direction, length = gradient / steepest, norm_of_weights(graphs)
    smallest = SLOPE_ROUNDING * torch.finfo(dtype).eps * abs(graphs.loss())
    errors = []
    for relative in SLOPE_STEPS[dtype]:
        h = relative * length
        if 2 * h * steepest < smallest:
            continue
        ahead, behind = (graphs.loss_at(dtype=dtype, offset=s * h * direction) for s in (1, -1))
        found = (ahead - behind) / (2 * h)
        if not math.isfinite(found):
            continue
        errors.append(abs(found / steepest - 1))
        if errors[-1] <= SLOPE_TOLERANCE:
            return errors[-1]
    if len(errors) < 2 or max(errors) > 1.2 * min(errors):  # the steps do not agree among themselves
        return math.nan
    raise FailedCheckError(
        f"the gradient is not that of the loss: along it the loss changes otherwise (off by {min(errors):.0%}). "
        f"{_cause(graphs)}; measure without it, or pass strict=False"
    )


def _cause(graphs: GraphStore) -> str:
    """What in the graph of the loss may make a product wrong, in words."""
    found = set()
    for node in graphs.operations():
        name = type(node).__name__
        if "CheckpointFunction" in name:
            return "The cause is reentrant checkpointing, which use_reentrant=False mends"
        if "WeightNorm" in name:
            return "The cause is weight_norm, which remove_weight_norm or remove_parametrizations folds into the weight"
        if "FakeQuantize" in name:
            found.add("fake quantization, whose derivative is a straight-through estimator")
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(f"the custom autograd.Function {name.removesuffix('Backward')}")
    if found:
        return f"A likely cause is {' or '.join(sorted(found)[:3])}"
    return (
        "Likely causes are a .detach() or no_grad inside the forward pass, as in a straight-through estimator, a hook "
        "on a tensor that changes its gradient, or an operation whose second derivative torch gets wrong"
    )


def check_unused(graphs: GraphStore) -> None:
    """Check that the loss does not depend on the parameters that the gradient does not reach, by moving them.

    It depends on them if they are used under `torch.no_grad`, behind `.detach()` or in a reentrant checkpoint.

    Args:
        graphs: The gradient's graphs.

    Raises:
        FailedCheckError: If the loss changes.
    """
    if not graphs.unused:
        return
    parts, first, over = [], 0, graphs.shards
    for name, parameter in zip(graphs.space.names, graphs.space.parameters, strict=True):
        numbers = parameter.numel()
        start, stop = (
            (0, numbers) if over is None else (min(max(b - first, 0), numbers) for b in (over.start, over.stop))
        )
        size = _whole(parameter.detach().abs().double().mean()) if numbers and name in graphs.unused else 0.0
        step = UNUSED_STEP * (size or 1.0) if name in graphs.unused else 0.0
        # moves of both signs, as a normalisation layer cancels a common shift
        signs = torch.arange(start, stop, device=graphs.device) % 3 - 0.5
        parts.append(signs.to(graphs.dtype) * step)
        first += numbers

    def depends(dtype: torch.dtype) -> bool:
        with _linearized(graphs, dtype):
            here = graphs.loss_at(dtype=dtype)
            there = graphs.loss_at(dtype=dtype, offset=torch.cat(parts))
        return abs(there - here) > 100 * torch.finfo(dtype).eps * abs(here)

    if _in_a_precision_that_runs(graphs, depends):
        raise FailedCheckError(
            f"the loss depends on '{graphs.unused[0]}', and autograd does not see it: look for torch.no_grad, "
            ".detach() or checkpoint(..., use_reentrant=True) in the forward pass, or leave it out with params=..."
        )


# -- differences


def _in_a_precision_that_runs(graphs: GraphStore, run: Callable[[torch.dtype], T]) -> T:
    """Call `run` with float64 if that is cheap and the model runs in it, else with float32."""
    if _wants_float64(graphs):
        try:
            return run(torch.float64)
        except FailedCheckError:
            raise
        except (RuntimeError, ValueError, TypeError):  # such as constants of the model in float32; memory
            if graphs.dtype == torch.float64:
                raise
    return run(torch.float32)


def _wants_float64(graphs: GraphStore) -> bool:
    """Whether float64 is cheap (a device with fast float64, or a small model) and draws the same random numbers."""
    if graphs.dtype == torch.float64:
        return True
    fair = graphs.device.type == "cpu"
    if graphs.device.type == "cuda":
        fair = torch.cuda.get_device_capability(graphs.device) in FULL_RATE_FLOAT64
    if not fair and graphs.space.dimension > FLOAT64_LIMIT:
        return False
    if not graphs.training:
        return True
    with contextlib.suppress(RuntimeError, ValueError, TypeError):  # dropout draws another mask in another precision
        return abs(graphs.loss_at(dtype=torch.float64) - graphs.loss()) <= GRADIENT_TOLERANCE * abs(graphs.loss())
    return False


def _steps(graphs: GraphStore, dtype: torch.dtype) -> tuple[float, ...]:
    """Step sizes relative to the norm of the weights, in the order in which they are tried."""
    if dtype == torch.float32:
        return (1e-2, 4e-2, 2e-3, 5e-4)
    # transformers' models compute normalisation and softmax in float32 even in a float64 model
    return (1e-4, 1e-3, 1e-5, 1e-2) if hasattr(graphs.model, "config") else (1e-7, 1e-9, 1e-5, 1e-3, 1e-4)


def norm_of_weights(graphs: GraphStore) -> float:
    """The norm of the chosen parameters, 1 where it is zero. All ranks call this together."""
    squares = [_whole(p.detach().double().square().sum()) for p in graphs.local.space.parameters]
    return math.sqrt(sum(squares)) or 1.0


def _whole(number: Any) -> float:
    """The value of a tensor with one number, summed or averaged over all ranks where the tensor is sharded."""
    return float(number.full_tensor() if hasattr(number, "full_tensor") else number)


def _worst_parameter(graphs: GraphStore, difference: torch.Tensor) -> str:
    if graphs.shards is not None:
        difference = graphs.shards.gather(difference)
    parts = [norm(part) for part in difference.split(graphs.space.sizes)]
    return graphs.space.names[max(range(len(parts)), key=parts.__getitem__)]


def _relative(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@contextlib.contextmanager
def _linearized(graphs: GraphStore, dtype: torch.dtype, *, branches: bool = False) -> Iterator[None]:
    """A context in which modules with straight-through estimators compute the function whose derivative they define.

    If `branches`, piecewise linear functions stay on the branches that they take at the measured weights.
    """
    rounding = next((m for m in graphs.model.modules() if isinstance(m, StraightThrough)), None)
    own = None if rounding is None else graphs.linearized(rounding.linearization, dtype)
    if own is not None:
        with own:
            yield
        return
    held: list[Linearization] = [] if rounding is None else [rounding.linearization()]
    if branches:
        held.append(HeldBranches(graphs.device))
    if not held:
        yield
        return
    before = graphs.each_forward
    try:
        graphs.each_forward = lambda: _all_of([linearization.record() for linearization in held])
        graphs.loss_at(dtype=dtype)
        graphs.each_forward = lambda: _all_of([linearization.replay() for linearization in held])
        yield
    finally:
        graphs.each_forward = before


@contextlib.contextmanager
def _all_of(contexts: list[AbstractContextManager[None]]) -> Iterator[None]:
    """A context that enters all of these, the first one first."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
