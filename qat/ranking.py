"""Which layers lose most by quantization: HAWQ's ranking, to choose which to keep in more bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat.hessian import hessian_operator
from qat.layers.config import QuantConfig
from qat.layers.convert import planned_layers
from qat.layers.linear import distinct_quant_layers
from spectra.algorithms.sensitivity import sensitivity as rank
from spectra.backend.errors import InputError
from spectra.estimates.sensitivity import SensitivityRanking
from spectra.operators.blocks import Blocks
from spectra.operators.hessian.isolation import unwrap
from spectra.operators.hessian.operator import HessianOperator


def sensitivity(
    model: nn.Module,
    batches: Any,
    config: QuantConfig | None = None,
    *,
    blocks: Blocks | None = None,
    method: str = "hutchinson",
    probes: int = 30,
    seed: int = 0,
    **options: Any,
) -> SensitivityRanking:
    """Rank the layers that a config quantizes by the trace of their Hessian times their squared quantization error.

    Omega = tr(H) / n ||Q(W) - W||^2 for each layer, at the unquantized weights W (`spectra.sensitivity`; HAWQ-V2, Dong
    et al., NeurIPS 2020). The model is left as it is.

    Args:
        model: A full-precision model, or one that is quantized already.
        batches: As in `spectra.HessianOperator`.
        config: Which layers would be quantized and how; None for 2 bits. A quantized model has its own, and is ranked
            at its latent weights.
        blocks: Which weights are ranked together, such as "layers"; None ranks each weight matrix.
        method: How traces are estimated, see `spectra.trace`.
        probes: How many Hessian-vector products each trace takes.
        seed: Seed of the random vectors.
        **options: Passed to `spectra.HessianOperator`: loss, microbatch, precision.

    Returns:
        The ranking, the most sensitive layer first. `print` shows a table.

    Raises:
        InputError: If nothing is quantized, or a config is given for a quantized model.

    Example:
        >>> import qat
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> found = qat.sensitivity(model, [(torch.randn(32, 4), torch.randn(32, 1))], qat.QuantConfig(bits=2))
        >>> sorted(block.name for block in found.blocks)
        ['0.weight', '2.weight']
    """
    inner = unwrap(model)
    own = {f"{name}.weight": layer for name, layer in distinct_quant_layers(inner)}
    if own and config is not None:
        raise InputError("the model is quantized already: leave out the config, or give the full-precision model")
    layers = own or planned_layers(inner, config)
    with torch.no_grad():
        errors = {name: layer.quantized_weight() - layer.weight for name, layer in layers.items()}
    if own:
        op = hessian_operator(model, batches, "latent", **options)
        assert isinstance(op, HessianOperator)
    else:
        weights = [weight for name, weight in inner.named_parameters(remove_duplicate=False) if name in layers]
        op = HessianOperator(model, batches, params=weights, **options)
    with op:
        return rank(op, errors, blocks=blocks, method=method, probes=probes, seed=seed)
