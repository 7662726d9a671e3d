"""Which Hessian: four definitions of the second derivative of a loss in quantized weights.

Q is piecewise constant, so the true Hessian of W -> L(Q(W)) is zero almost everywhere. Each mode here replaces the
weight that a layer computes with, and its derivative, for as long as a context is open.
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
from spectra.operators.hessian.isolation import unwrap
from spectra.operators.hessian.objective import as_batches
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
    """A context in which `model` computes, in train and evaluation mode alike, as one definition of the Hessian asks.

    With M the mask of unclipped weights and H(V) the Hessian of the full-precision network at weights V:
    "ste": the Jacobian of the straight-through gradient field in the latent weights, M H(Q(W)) M.
    "quantized": H(Q(W)): the quantized weights, the derivative passing through as if they were the latent ones.
    "latent": H(W), or H(W + point (Q(W) - W)) for a point between 0, the latent weights, and 1, the quantized ones.
    "noisy": "ste" at W + U, the entries of U from N(0, sigma^2) and fixed by (seed, draw, name of the layer). sigma
    defaults to the layers' own noise_sigma. Scales get no noise. Average over draws for the definition itself.
    Only forward passes need the context: a graph built inside it keeps its derivatives. No global random state is
    used, and what each layer did before comes back on exit. Raises InputError for an unknown mode, a model without
    quantized layers, a point outside [0, 1] or in another mode, and "noisy" without a sigma.
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
    """The Hessian of the mean loss over `batches` in one of the definitions of `hessian_mode`, as an operator.

    params: which parameters, as in spectra.HessianOperator; by default the latent weights of the quantized layers.
    draws: how many draws of the noise "noisy" averages over. options: those of spectra.HessianOperator (loss,
    microbatch, training, graph, precision). Returns a spectra.HessianOperator, for "noisy" a spectra.MeanOperator
    with one of them a draw. For a probe: SpectrumProbe(..., modes={"ste": partial(hessian_operator, mode="ste")}).
    Raises InputError as `hessian_mode` does.
    """
    if draws < 1:
        raise InputError(f"draws must be 1 or more; got {draws}")
    hessian_mode(unwrap(model), mode, seed=seed, sigma=sigma, point=point)  # A wrong mode is an error here.
    batches = as_batches(batches)  # An iterator must serve every draw.
    latent = frozenset(weight_names(unwrap(model)))
    chosen = (lambda name, parameter: name in latent) if params is None else params

    def operator(draw: int) -> HessianOperator:
        def context() -> AbstractContextManager[None]:
            # With precision=... the operator measures a copy: the mode belongs on that.
            return hessian_mode(built.model, mode, draw=draw, seed=seed, sigma=sigma, point=point)

        built = HessianOperator(model, batches, params=chosen, context=context, **options)
        return built

    if mode == "noisy":
        return MeanOperator([operator(draw) for draw in range(draws)])
    return operator(0)


@contextmanager
def _overridden(layers: list[QuantLayer], overrides: list[Callable[[QuantLayer], Tensor]]) -> Iterator[None]:
    before = [layer.weight_override for layer in layers]
    for layer, override in zip(layers, overrides, strict=True):
        layer.weight_override = override
    try:
        yield
    finally:
        for layer, override in zip(layers, before, strict=True):
            layer.weight_override = override


def _ste(layer: QuantLayer) -> Tensor:
    return layer.quantizer(layer.rows(), layer.scale)


def _quantized(layer: QuantLayer) -> Tensor:
    weight = layer.rows()
    return straight_through(layer.quantizer(weight, layer.scale), weight)


def _latent(layer: QuantLayer, *, point: float) -> Tensor:
    weight = layer.rows()
    if point == 0:
        return weight
    quantized = layer.quantizer(weight, layer.scale)
    return straight_through(torch.lerp(weight, quantized, point), weight)


def _noisy(layer: QuantLayer, *, sigma: float, key: str) -> Tensor:
    noisy = layer.rows() + sigma * _standard_normal(layer.rows(), key)
    scale = layer.scale if layer.quantizer.learned_scale else layer.quantizer.initial_scale(noisy)
    return layer.quantizer(noisy, scale)


def _standard_normal(like: Tensor, key: str) -> Tensor:
    """The same numbers for a key on every device: drawn on the CPU from a generator of their own."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _names_of_noise(model: nn.Module) -> dict[int, str]:
    """Layers that share a weight share its noise: the name is that of the first of them."""
    return {id(layer.weight): name for name, layer in distinct_quant_layers(model)}
