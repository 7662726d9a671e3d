"""The units of a sharded model: modules whose weights are gathered together, while they compute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spectra.operators.hessian.recompute import layers_of
from spectra.operators.hessian.sharded_weights import is_distributed, managed_modules


@dataclass(frozen=True)
class Unit:
    """A module whose weights are gathered when it computes, or one parameter that stays gathered.

    Attributes:
        name: The name of the module or of the parameter.
        module: The module; None for a parameter.
        parameters: Its sharded parameters, each once.
        places: For each, the modules that hold it and its name there.
    """

    name: str
    module: nn.Module | None
    parameters: tuple[nn.Parameter, ...]
    places: tuple[tuple[tuple[nn.Module, str], ...], ...] = ()


def units_of(model: nn.Module) -> tuple[list[Unit], list[nn.Parameter]]:
    """The units of a model, and the sharded parameters that belong to none.

    Those are the layers that `fully_shard` was called on, or else those that the model repeats, and each smaller module
    outside of them that holds parameters.

    Args:
        model: The model.

    Returns:
        The units in the order of `model.modules()`, and the parameters of modules that hold a unit.
    """
    layers = {id(layer) for layer in _layers(model)}
    units: list[Unit] = []
    rest: dict[int, nn.Parameter] = {}

    def visit(module: nn.Module, name: str, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        holds_layers = id(module) not in layers and any(id(part) in layers for part in module.modules())
        own = [p for p in module._parameters.values() if p is not None and is_distributed(p)]
        if id(module) in layers or (own and not holds_layers):
            units.append(_unit(name, module))
            return
        rest.update((id(p), p) for p in own)
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}".strip("."), seen)

    visit(model, "", set())
    return [unit for unit in units if unit.parameters], list(rest.values())


def _layers(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that `fully_shard` was called on; those that the model repeats if that is the model."""
    managed = [module for module in managed_modules(model) if module is not model]
    ids = {id(module) for module in managed}
    innermost = [m for m in managed if not any(id(part) in ids for part in m.modules() if part is not m)]
    return innermost or layers_of(model)


def _unit(name: str, module: nn.Module) -> Unit:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and is_distributed(parameter):
                parameters[id(parameter)] = parameter
                places.setdefault(id(parameter), []).append((part, key))
    return Unit(name, module, tuple(parameters.values()), tuple(tuple(places[key]) for key in parameters))
