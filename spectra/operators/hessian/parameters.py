"""Which parameters a spectrum is about, and how they lie in one flat vector."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from spectra.backend.errors import InputError, NonFiniteError

Predicate = Callable[[str, nn.Parameter], bool]
Selection = (
    str | re.Pattern[str] | type[nn.Module] | Predicate | Iterable["str | re.Pattern[str] | type[nn.Module]"] | None
)


class ParameterSpace:
    """The chosen parameters of a model, in the order of `model.named_parameters()`, each counted once.

    params: None for all trainable parameters; a glob over names ("*mlp*weight"), a compiled regular expression
    (searched in the name), a module type (the parameters its modules own directly), a list of these (their union),
    or a predicate (name, parameter) -> bool. A tied parameter answers to each of its names and is counted once,
    under the first. A pattern also selects frozen parameters: it was asked for by name.

    Attributes: names, parameters (tuples of the same length), dimension (the number of scalars n).
    Raises InputError where a selection matches nothing or a parameter is not a real floating-point tensor.
    """

    def __init__(self, model: nn.Module, params: Selection = None):
        aliases = _names_by_parameter(model)
        chosen = _choose(model, aliases, params)
        self.names: tuple[str, ...] = tuple(aliases[p][0] for p in chosen)
        self.parameters: tuple[nn.Parameter, ...] = tuple(chosen)
        self.shapes = tuple(p.shape for p in chosen)
        self.sizes = tuple(p.numel() for p in chosen)
        self.dimension = sum(self.sizes)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not parameter.is_floating_point():
                raise InputError(
                    f"parameter '{name}' must hold real floating-point numbers, got {parameter.dtype}; "
                    "leave it out with params=..."
                )
        devices = {p.device for p in chosen}
        if len(devices) > 1:
            raise InputError(
                f"the chosen parameters must be on one device, got {sorted(map(str, devices))}; "
                "choose those of one device with params=..."
            )

    def flatten(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors shaped like the parameters, laid end to end: (n,)."""
        shapes = tuple(t.shape for t in tensors)
        if shapes != self.shapes:
            raise InputError(
                f"tensors shaped like the parameters are expected, {list(map(tuple, self.shapes))}; "
                f"got {list(map(tuple, shapes))}"
            )
        return torch.cat([t.reshape(-1) for t in tensors])

    def unflatten(self, vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of a vector (n,) shaped like the parameters."""
        if vector.shape != (self.dimension,):
            raise InputError(f"a vector ({self.dimension},) is expected, got shape {tuple(vector.shape)}")
        pieces = vector.split(self.sizes)
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def name_at(self, index: int) -> str:
        """The parameter that owns entry `index` of the flat vector."""
        for name, size in zip(self.names, self.sizes, strict=True):
            if index < size:
                return name
            index -= size
        raise IndexError(index)

    def check_finite(self, flat: torch.Tensor, what: str) -> None:
        """Raise the NonFiniteError that names the first parameter where a vector (n,) holds NaN or infinity."""
        bad = ~torch.isfinite(flat)
        if bad.any():
            name = self.name_at(int(bad.nonzero()[0]))
            raise NonFiniteError(
                f"{what} is not finite in parameter '{name}' ({int(bad.sum())} of {len(flat)} entries); "
                "check the model's weights, or measure in float64 with precision='float64'"
            )


def _names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _choose(model: nn.Module, aliases: dict[nn.Parameter, list[str]], params: Selection) -> list[nn.Parameter]:
    if params is None:
        chosen = [p for p in aliases if p.requires_grad]
        if not chosen:
            raise InputError(
                "the model has no trainable parameter to measure; set requires_grad or name some with params=..."
            )
        return chosen
    if callable(params) and not isinstance(params, type):
        chosen = [p for p, names in aliases.items() if params(names[0], p)]
        if not chosen:
            raise InputError("the params predicate chose none of the model's parameters; check what it returns")
        return chosen
    patterns = [params] if isinstance(params, str | re.Pattern | type) else list(params)
    if not patterns:
        raise InputError("params is an empty list; give at least one pattern, or None for all trainable parameters")
    wanted: set[nn.Parameter] = set()
    for pattern in patterns:
        found = _matching(model, aliases, pattern)
        if not found:
            raise InputError(_nothing_matches(pattern, aliases))
        wanted |= found
    return [p for p in aliases if p in wanted]


def _matching(model: nn.Module, aliases: dict[nn.Parameter, list[str]], pattern: object) -> set[nn.Parameter]:
    if isinstance(pattern, str):
        return {p for p, names in aliases.items() if any(fnmatch.fnmatchcase(n, pattern) for n in names)}
    if isinstance(pattern, re.Pattern):
        return {p for p, names in aliases.items() if any(pattern.search(n) for n in names)}
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return {p for m in model.modules() if isinstance(m, pattern) for p in m.parameters(recurse=False)}
    raise InputError(
        f"params takes globs, compiled regular expressions, module types or a predicate, got {type(pattern).__name__}"
    )


def _nothing_matches(pattern: object, aliases: dict[nn.Parameter, list[str]]) -> str:
    names = [n for group in aliases.values() for n in group]
    if isinstance(pattern, str):
        near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3]
    else:
        near = names[:3]
    shown = pattern.__name__ if isinstance(pattern, type) else getattr(pattern, "pattern", pattern)
    return f"no parameter matches {shown!r}; the model has {len(names)}, such as {', '.join(near)}"
