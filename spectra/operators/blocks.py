"""Diagonal blocks of an operator, such as those of the layers of a model, as operators of their own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.operators.base import Block, HasLoss, LinearOperator
from spectra.operators.derived import DifferenceOperator, MeanOperator
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.parameters import ParameterSpace, Selection

LAYERS = "layers"
# "layers", globs, module types, or {name of the block: which parameters}
Blocks = str | type[nn.Module] | Iterable[str | type[nn.Module]] | Mapping[str, Selection]
NUMBERED = re.compile(r"(?:^|\.)\d+(?=\.)")  # the number of a repeated layer in the name of a parameter


class BlockOperator(LinearOperator):
    """A diagonal block A_bb of an operator: its rows and columns in some of the coordinates.

    The block of a Hessian is the Hessian in those parameters alone. Its products go through the kept graphs of the
    whole and differentiate in the block's parameters only, so that they cost what those of an operator of its own cost,
    and no graph is built and no loss checked again. `inner` counts the products too.

    Args:
        inner: A.
        block: The coordinates b.

    Raises:
        InputError: If the block does not fit in the operator.
    """

    def __init__(self, inner: LinearOperator, block: Block):
        ends = [end for ends in block.ranges for end in ends]
        if not ends or ends[0] < 0 or ends[-1] > inner.shape[0] or any(a > b for a, b in itertools.pairwise(ends)):
            raise InputError(
                f"ranges within (0, {inner.shape[0]}), ascending and disjoint, are expected, got {block.ranges}"
            )
        self.inner, self.block = inner, block
        self.shape = (block.dimension, block.dimension)
        self.dtype, self.device, self.spread = inner.dtype, inner.device, inner.spread
        self._known_rounding: float | None = None
        self._asked = False

    @property
    def space(self) -> ParameterSpace | None:
        """The parameters of the block; None where the operator has none."""
        space = parameters_of(self.inner)
        return None if space is None or not self.block.positions else space.part(self.block.positions)

    @property
    def unverified(self) -> str:  # type: ignore[override]
        """The reason of A."""
        return self.inner.unverified

    def in_float64(self) -> BlockOperator | None:
        """The block of A in float64; None where A has no such form."""
        precise = self.inner.in_float64()
        return None if precise is None else BlockOperator(precise, self.block)

    def close(self) -> None:
        """Free the memory of the graphs of A, where it has any."""
        if isinstance(self.inner, HasLoss | DifferenceOperator):
            self.inner.close()

    def _multiply_rows(self, vectors: torch.Tensor) -> torch.Tensor:
        self.inner_rounding()
        return self.inner.multiply_block_rows(vectors, self.block)

    def inner_rounding(self) -> float | None:
        """`LinearOperator.block_rounding` of A, asked before the first product, since A checks the block then."""
        if not self._asked:
            self._known_rounding, self._asked = self.inner.block_rounding(self.block), True
        return self._known_rounding

    def raise_non_finite(self, vectors: torch.Tensor) -> NoReturn:
        """Raise the error of A."""
        self.inner.raise_non_finite(self.block.embed(vectors, self.inner.shape[0]))

    def precision_error(self) -> float:
        """That of A."""
        return self.inner.precision_error()

    def rounding(self) -> float:
        """See `LinearOperator.rounding`; what A knows of the block, else measured once."""
        if self.inner_rounding() is None:
            self._known_rounding = super().rounding()
        assert self._known_rounding is not None
        return self._known_rounding


def blocks_of(op: LinearOperator, blocks: Blocks = LAYERS) -> dict[str, BlockOperator]:
    """The diagonal blocks of an operator of a model, each an operator of its own.

    Args:
        op: A Hessian, Gauss-Newton or Fisher operator, or a mean or a difference of such.
        blocks: "layers": a block for each repeated layer, the parameters whose names agree up to their first number
            ("model.layers.0"), and one for each other module. A module type, or a list of them: a block for each
            module of that type, named as the module, with all parameters in it. A glob over names, or a list of them: a
            block each, named as the glob. A mapping {name: selection} takes selections as `spectra.ParameterSpace`
            does. Parameters of the operator that are in no block are left out.

    Returns:
        The blocks by name, in the order of the parameters or of `blocks`.

    Raises:
        InputError: If a selection fits no parameter of the operator, a parameter is in two blocks, or the operator has
            no parameters.

    Example:
        >>> import torch, spectra
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> op = spectra.HessianOperator(model, [(torch.randn(8, 3), torch.randn(8, 1))])
        >>> {name: block.shape[0] for name, block in spectra.blocks_of(op, "layers").items()}
        {'0': 16, '2': 5}
    """
    if op.shards is not None:
        raise InputError(
            "blocks= is not supported for a sharded model: measure the parameters of a block alone, with params="
        )
    space, model = parameters_of(op), model_of(op)
    if space is None or model is None:
        raise InputError(f"blocks= needs an operator of a model's parameters, got a {type(op).__name__}")
    positions = {id(parameter): i for i, parameter in enumerate(space.parameters)}
    owner: dict[int, str] = {}
    found: dict[str, BlockOperator] = {}
    for name, parameters in _selected(model, space, blocks):
        inside = sorted(positions[id(p)] for p in parameters if id(p) in positions)
        inside = [i for i in inside if space.sizes[i]]
        if not inside:
            raise InputError(
                f"block {name!r} has none of the {len(space.names)} parameters of the operator, such as "
                f"{', '.join(space.names[:3])}: choose others with blocks=, or give the operator more with params="
            )
        for i in inside:
            if i in owner:
                aliases = _names_of(model, space.parameters[i])
                tied = f" (tied: {', '.join(aliases)})" if len(aliases) > 1 else ""
                raise InputError(
                    f"parameter '{space.names[i]}'{tied} is in two blocks, {owner[i]!r} and {name!r}: a parameter may "
                    "be in one block only"
                )
            owner[i] = name
        found[name] = block_of_parameters(op, name, inside)
    return found


def block_of_parameters(op: LinearOperator, name: str, positions: Iterable[int]) -> BlockOperator:
    """The diagonal block of some parameters of an operator.

    Args:
        op: An operator of a model.
        name: What results call the block.
        positions: Positions of its parameters among those of the operator.

    Returns:
        The block.

    Raises:
        InputError: If the operator has no parameters.
    """
    space = parameters_of(op)
    if space is None:
        raise InputError(f"an operator of a model's parameters is expected, got a {type(op).__name__}")
    stops = list(itertools.accumulate(space.sizes))
    positions = tuple(sorted(positions))
    return BlockOperator(op, Block(name, tuple((stops[i] - space.sizes[i], stops[i]) for i in positions), positions))


def parameters_of(op: LinearOperator) -> ParameterSpace | None:
    """The parameters of an operator, or of the operators that it is made of; None where it has none."""
    member = _member(op)
    return member.space if isinstance(member, HessianOperator) else None


def model_of(op: LinearOperator) -> nn.Module | None:
    """The model of an operator, or of the operators that it is made of; None where it has none."""
    member = _member(op)
    return member.model if isinstance(member, HessianOperator) else None


def _member(op: LinearOperator) -> LinearOperator:
    while isinstance(op, MeanOperator | DifferenceOperator):
        op = op.operators[0]
    return op


def _selected(model: nn.Module, space: ParameterSpace, blocks: Blocks) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The name and the parameters of each block."""
    if isinstance(blocks, str) and blocks == LAYERS:
        layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in zip(space.names, space.parameters, strict=True):
            layers.setdefault(layer_of(name), []).append(parameter)
        yield from layers.items()
        return
    if isinstance(blocks, Mapping):
        if not blocks:
            raise InputError("blocks= is empty: name at least one block")
        for name, selection in blocks.items():
            yield str(name), list(ParameterSpace(model, selection).parameters)
        return
    single = isinstance(blocks, str | type)
    if not single and not isinstance(blocks, Iterable):
        raise InputError(f'blocks= takes "layers", globs, module types or a mapping, got {type(blocks).__name__}')
    patterns = [blocks] if single else list(blocks)  # type: ignore[arg-type]
    if not patterns:
        raise InputError("blocks= is empty: name at least one block")
    for pattern in patterns:
        if isinstance(pattern, str):
            yield pattern, list(ParameterSpace(model, pattern).parameters)
        elif isinstance(pattern, type) and issubclass(pattern, nn.Module):
            yield from _of_type(model, space, pattern)
        else:
            raise InputError(
                f'blocks= takes "layers", globs, module types or a mapping, got a list with {type(pattern).__name__}'
            )


def _of_type(
    model: nn.Module, space: ParameterSpace, kind: type[nn.Module]
) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """A block for each module of a type that has parameters of the operator."""
    chosen = set(map(id, space.parameters))
    any_found = False
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters() if id(p) in chosen] if isinstance(module, kind) else []
        if parameters:
            any_found = True
            yield name or type(model).__name__, parameters
    if not any_found:
        raise InputError(
            f"no {kind.__name__} of the model has parameters of the operator, such as {', '.join(space.names[:3])}"
        )


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to the first number in it, or else the name of its module.

    Args:
        name: The name of the parameter.

    Returns:
        The name of the layer.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    numbered = NUMBERED.search(name)
    return name[: numbered.end()] if numbered else name.rpartition(".")[0] or name


def _names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
