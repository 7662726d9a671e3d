"""The layers of a model, ranked by how much a perturbation of their weights may raise the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.trace import trace
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.backend.vectors import dot
from spectra.estimates.estimate import Estimate
from spectra.estimates.sensitivity import BlockSensitivity, SensitivityRanking
from spectra.operators.base import LinearOperator
from spectra.operators.blocks import BlockOperator, Blocks, block_of_parameters, blocks_of, model_of, parameters_of
from spectra.operators.hessian.parameters import ParameterSpace

# {name of a parameter: what is added to it}, or a function of name and parameter that returns it, or None for none
Perturbation = Mapping[str, torch.Tensor] | Callable[[str, nn.Parameter], torch.Tensor | None]


@in_float32
def sensitivity(
    op: LinearOperator,
    perturbation: Perturbation,
    *,
    blocks: Blocks | None = None,
    method: str = "hutchinson",
    probes: int = 30,
    seed: int = 0,
    progress: Callback | None = None,
) -> SensitivityRanking:
    """Rank layers by how much a perturbation of their weights, such as rounding, may raise the loss.

    Omega_b = tr(H_bb) / n_b ||d_b||^2 for the perturbation d_b of the n_b perturbed parameters of a block: twice the
    rise of the loss to second order, averaged over perturbations of the same norm (HAWQ-V2; Dong et al., NeurIPS 2020,
    section 3.2). The term d_b . H_bb d_b / 2 of the perturbation itself is given too. It costs one more product.

    Args:
        op: H, a Hessian or Gauss-Newton operator of a model.
        perturbation: {name of a parameter: tensor of its shape that is added to it}, or a function (name, parameter)
            that returns the tensor, or None for a parameter that is left as it is.
        blocks: Which parameters are ranked together: "layers" or others, see `spectra.blocks_of`. None: each perturbed
            parameter alone. Parameters of a block that are not perturbed are left out of it.
        method: How traces are estimated, see `spectra.trace`.
        probes: How many products each trace takes.
        seed: Seed of the random vectors.
        progress: Called as progress(products done, products in total).

    Returns:
        The blocks in descending order of their sensitivity, with intervals. `print` shows a table.

    Raises:
        InputError: If a name is unknown, a tensor has another shape or is not finite, or nothing is perturbed.

    Example:
        >>> import torch, spectra
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> op = spectra.HessianOperator(model, [(torch.randn(32, 4), torch.randn(32, 1))])
        >>> found = spectra.sensitivity(op, lambda name, weight: weight.round(decimals=1) - weight)
        >>> sorted(block.name for block in found.blocks)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    space, model = parameters_of(op), model_of(op)
    if space is None or model is None:
        raise InputError(f"an operator of a model's parameters is expected, got a {type(op).__name__}")
    moves = _moves(perturbation, space, model, op)
    chosen = _blocks(op, space, moves, blocks)
    count, found = Progress(progress, len(chosen) * (probes + 1)), []
    for left, block in zip(reversed(range(len(chosen))), chosen, strict=True):
        traced = trace(block, method=method, probes=probes, seed=seed, progress=count.part(left * (probes + 1) + 1))
        move = torch.cat([moves[i].reshape(-1) for i in block.block.positions])
        rise = dot(move, (block @ move)) / 2
        count.add(1)
        found.append(_of_block(block, traced, dot(move, move), rise))
    count.finish()
    return SensitivityRanking(tuple(sorted(found, key=lambda each: -each.sensitivity.value)))


def _of_block(block: BlockOperator, traced: Estimate, squared_error: float, rise: float) -> BlockSensitivity:
    n = block.shape[0]
    factor = squared_error / n
    scaled = Estimate(
        factor * traced.value,
        factor * traced.low,
        factor * traced.high,
        traced.resolved,
        traced.reason,
        traced.products,
    )
    return BlockSensitivity(block.block.name, n, squared_error, traced, scaled, rise)


def _moves(
    perturbation: Perturbation, space: ParameterSpace, model: nn.Module, op: LinearOperator
) -> dict[int, torch.Tensor]:
    """The perturbation of each perturbed parameter of the operator, by its position."""
    positions = {id(parameter): i for i, parameter in enumerate(space.parameters)}
    given: list[tuple[str, nn.Parameter, torch.Tensor]] = []
    if isinstance(perturbation, Mapping):
        named = dict(model.named_parameters(remove_duplicate=False))
        for name, move in perturbation.items():
            if name not in named or id(named[name]) not in positions:
                raise InputError(
                    f"the operator has no parameter {name!r}; it has {len(space.names)}, such as "
                    f"{', '.join(space.names[:3])}"
                )
            given.append((name, named[name], move))
    elif callable(perturbation):
        for name, parameter in zip(space.names, space.parameters, strict=True):
            with torch.no_grad():
                move = perturbation(name, parameter)
            if move is not None:
                given.append((name, parameter, move))
    else:
        raise InputError(f"perturbation takes a mapping or a function, got {type(perturbation).__name__}")
    moves: dict[int, torch.Tensor] = {}
    for name, parameter, move in given:
        if not isinstance(move, torch.Tensor) or move.shape != parameter.shape:
            got = tuple(move.shape) if isinstance(move, torch.Tensor) else type(move).__name__
            raise InputError(f"the perturbation of '{name}' must be a tensor {tuple(parameter.shape)}, got {got}")
        if not torch.isfinite(move).all():
            raise InputError(f"the perturbation of '{name}' holds NaN or infinity")
        moves[positions[id(parameter)]] = move.detach().to(device=op.device, dtype=op.dtype)
    if not moves:
        raise InputError("the perturbation moves none of the operator's parameters: name some, or return tensors")
    return moves


def _blocks(
    op: LinearOperator, space: ParameterSpace, moves: Mapping[int, torch.Tensor], blocks: Blocks | None
) -> list[BlockOperator]:
    """The blocks of the perturbed parameters."""
    if blocks is None:
        return [block_of_parameters(op, space.names[i], [i]) for i in sorted(moves) if space.sizes[i]]
    found = []
    for name, block in blocks_of(op, blocks).items():
        inside = [i for i in block.block.positions if i in moves]
        if inside:
            found.append(block_of_parameters(op, name, inside))
    if not found:
        raise InputError("no block has a perturbed parameter: choose others with blocks=, or leave it out")
    return found
