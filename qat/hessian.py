"""Four definitions of the Hessian of a loss in quantized weights.

Q is piecewise constant, so the true Hessian of W -> L(Q(W)) is zero almost everywhere. Each definition is a mode. In
its context, every quantized layer computes with another weight, or with another derivative of its weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.linear import QuantLayer, distinct_quant_layers, quant_layers, weight_names
from qat.layers.quantizers.rounding import straight_through
from spectra.backend.errors import InputError
from spectra.operators.derived import MeanOperator
from spectra.operators.hessian.batches import as_batches
from spectra.operators.hessian.isolation import unwrap
from spectra.operators.hessian.operator import HessianOperator

MODES = ("ste", "quantized", "latent", "noisy")


def hessian_mode(
    model: nn.Module,
    mode: str,
    *,
    draw: int = 0,
    seed: int = 0,
    sigma: float | None = None,
    point: float | None = None,
) -> AbstractContextManager[None]:
    """A context in which a model computes as one definition of the Hessian requires, in train and evaluation mode.

    Let M be the mask of the weights that are not clipped, and H(V) the Hessian of the full-precision network at the
    weights V. For the quantizer "quest", M stands for T^T M T, with T its Hadamard transform and the mask of the
    transformed weights. A scheme that is annealed counts as on its grid. The modes are:

    * "ste": M H(Q(W)) M, the Jacobian of the straight-through gradient in the latent weights W.
    * "quantized": H(Q(W)). The layers compute with Q(W), and its derivative in W is the identity.
    * "latent": H(W), or H(W + point (Q(W) - W)).
    * "noisy": "ste" at W + U. The entries of the weight noise U are drawn from N(0, sigma^2) by a generator seeded with
      (seed, draw, name of the layer). Scales get no noise. The Hessian of this mode is the mean over draws.

    Only forward passes need the context: a graph that was built inside keeps its derivatives. No global random state
    is used. On exit, every layer computes as before.

    Args:
        model: A quantized model.
        mode: One of `MODES`.
        draw: Which draw of the weight noise, for "noisy".
        seed: Seed of the weight noise.
        sigma: Standard deviation of the weight noise; None is each layer's own `noise_sigma`.
        point: For "latent", a point between the latent weights (0) and the quantized ones (1).

    Returns:
        The context.

    Raises:
        InputError: The mode is unknown, the model has no quantized layers, the point lies outside [0, 1] or is given
            with another mode, or "noisy" has no sigma above 0.
    """
    layers = quant_layers(model)
    if not layers:
        raise InputError("the model has no quantized layers: call qat.quantize_model(model, config) first")
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if point is not None and (mode != "latent" or not 0 <= point <= 1):
        raise InputError(f"point goes with mode 'latent' and lies in [0, 1]; got point={point!r} with mode {mode!r}")
    if mode == "noisy":
        sigmas = {name: layer.noise_sigma if sigma is None else sigma for name, layer in layers}
        if not all(0 < value < math.inf for value in sigmas.values()):
            raise InputError(f"mode 'noisy' needs a noise size above 0; got sigma={sigma!r}: pass sigma=1e-3")
        names = _names_of_noise(model)
        overrides = [
            partial(_noisy, sigma=sigmas[name], key=f"{seed}/{draw}/{names[id(layer.weight)]}")
            for name, layer in layers
        ]
    else:
        override = {"ste": _ste, "quantized": _quantized, "latent": partial(_latent, point=point or 0.0)}[mode]
        overrides = [override] * len(layers)
    return _overridden([layer for _, layer in layers], overrides)


def hessian_operator(
    model: nn.Module,
    batches: Any,
    mode: str = "ste",
    *,
    params: Any = None,
    draws: int = 4,
    seed: int = 0,
    sigma: float | None = None,
    point: float | None = None,
    **options: Any,
) -> HessianOperator | MeanOperator:
    """The Hessian of the mean loss of a quantized model, in one of the definitions of `hessian_mode`.

    For a probe: `SpectrumProbe(..., modes={"ste": partial(hessian_operator, mode="ste")})`.

    Args:
        model: A quantized model.
        batches: As in `spectra.HessianOperator`.
        mode: One of `MODES`.
        params: Which parameters, as in `spectra.HessianOperator`; None is the latent weights of the quantized layers.
        draws: How many draws of the weight noise "noisy" averages over.
        seed: Seed of the weight noise.
        sigma: As in `hessian_mode`.
        point: As in `hessian_mode`.
        **options: Passed to `spectra.HessianOperator`: loss, microbatch, training, graph, precision.

    Returns:
        The operator; for "noisy" the mean of one operator a draw.

    Raises:
        InputError: As in `hessian_mode`, and for `draws` below 1.
    """
    if draws < 1:
        raise InputError(f"draws must be 1 or more; got {draws}")
    hessian_mode(unwrap(model), mode, seed=seed, sigma=sigma, point=point)  # raises here for a wrong mode
    batches = as_batches(batches)  # an iterator is read once, and every draw needs its batches
    latent = frozenset(weight_names(unwrap(model)))
    chosen = (lambda name, parameter: name in latent) if params is None else params

    def operator(draw: int) -> HessianOperator:
        def context() -> AbstractContextManager[None]:
            # With precision=... the operator computes with a copy of the model, which needs the mode too.
            return hessian_mode(built.model, mode, draw=draw, seed=seed, sigma=sigma, point=point)

        built = HessianOperator(model, batches, params=chosen, context=context, **options)
        built.mode = _in_words(mode, sigma, point)
        return built

    if mode == "noisy":
        return MeanOperator([operator(draw) for draw in range(draws)])
    return operator(0)


def _in_words(mode: str, sigma: float | None, point: float | None) -> str:
    """The mode with what it depends on, so that two that differ are told apart."""
    if mode == "noisy" and sigma is not None:
        return f"noisy, sigma={sigma:g}"
    return f"latent, point={point:g}" if point else mode


@contextmanager
def _overridden(layers: list[QuantLayer], overrides: list[Callable[[QuantLayer], Tensor]]) -> Iterator[None]:
    """A context in which each layer computes with its override."""
    before = [layer.weight_override for layer in layers]
    for layer, override in zip(layers, overrides, strict=True):
        layer.weight_override = override
    try:
        yield
    finally:
        for layer, override in zip(layers, before, strict=True):
            layer.weight_override = override


def _ste(layer: QuantLayer) -> Tensor:
    """Q(W) with the straight-through derivative."""
    return layer.quantizer(layer.rows(), layer.scale)


def _quantized(layer: QuantLayer) -> Tensor:
    """Q(W) with the identity as its derivative."""
    weight = layer.rows()
    return straight_through(layer.quantizer(weight, layer.scale), weight)


def _latent(layer: QuantLayer, *, point: float) -> Tensor:
    """W + point (Q(W) - W) with the identity as its derivative."""
    weight = layer.rows()
    if point == 0:
        return weight
    quantized = layer.quantizer(weight, layer.scale)
    return straight_through(torch.lerp(weight, quantized, point), weight)


def _noisy(layer: QuantLayer, *, sigma: float, key: str) -> Tensor:
    """Q(W + U) with the straight-through derivative, the weight noise U fixed by the key."""
    noisy = layer.rows() + sigma * _standard_normal(layer.rows(), key)
    scale = layer.scale if layer.quantizer.learned_scale else layer.quantizer.initial_scale(noisy)
    return layer.quantizer(noisy, scale)


def _standard_normal(like: Tensor, key: str) -> Tensor:
    """Normal numbers in the shape of `like`, fixed by the key: drawn on the CPU, so the same on every device."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    numbers = torch.randn(like.shape, generator=generator)  # in float32, so that a float64 copy has the same noise
    return numbers.to(like)


def _names_of_noise(model: nn.Module) -> dict[int, str]:
    """The name of the first layer of each weight, by the weight's id: layers that share a weight share its noise."""
    return {id(layer.weight): name for name, layer in distinct_quant_layers(model)}
