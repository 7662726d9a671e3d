"""Which parameters a spectrum is about, and how they lie in one flat vector."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from spectra.backend.errors import InputError, NonFiniteError
from spectra.operators.hessian.sharded_weights import check_sharding, reshard

TAKEN = "globs, compiled regular expressions, module types, modules, parameters, a list of these, or a predicate"
Predicate = Callable[[str, nn.Parameter], bool]
Pattern = str | re.Pattern[str] | type[nn.Module] | nn.Module | torch.Tensor
Selection = Pattern | Predicate | Iterable[Pattern] | None


class ParameterSpace:
    """The chosen parameters of a model, in the order of `model.named_parameters()`, each counted once.

    A tied parameter can be chosen by each of its names and is counted once, under the first. A pattern also chooses
    frozen parameters, since they were asked for by name.

    Args:
        model: The model.
        params: None for all trainable parameters; a glob over names ("*mlp*weight"); a compiled regular expression,
            searched in the name; a module type, for the parameters that its modules own directly; a module or a
            parameter of the model itself; a list of these, for their union; or a predicate (name, parameter) -> bool.

    Attributes:
        names: The names of the chosen parameters.
        parameters: The chosen parameters themselves, in the same order.
        dimension: The number of scalars in them, n.

    Raises:
        InputError: Where a selection matches nothing, or a parameter is sharded by other means than FSDP2, has no
            values yet, or does not hold
            real floating-point numbers.
    """

    def __init__(self, model: nn.Module, params: Selection = None):
        _check_usable(model)
        aliases = _names_by_parameter(model)
        chosen = _choose(model, aliases, params)
        self._set(model, [aliases[p][0] for p in chosen], chosen)

    def _set(self, model: nn.Module, names: Sequence[str], chosen: Sequence[nn.Parameter]) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self.parameters: tuple[nn.Parameter, ...] = tuple(chosen)
        self.shapes = tuple(p.shape for p in chosen)
        self._kinds = tuple((p.dtype, p.device) for p in chosen)
        self._ties = _ties(model)
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
        if not self.dimension:
            raise InputError("the chosen parameters hold no numbers at all; choose others with params=...")

    def renewed(self, model: nn.Module) -> ParameterSpace:
        """The parameters that the model has under the same names now, as after `load_state_dict(assign=True)`.

        Args:
            model: The model, whose parameters may be other objects now.

        Returns:
            The same choice of parameters, of this model.

        Raises:
            InputError: Where a name is gone or its shape is another.
        """
        now = dict(model.named_parameters(remove_duplicate=False))
        gone = [name for name in self.names if name not in now]
        if gone:
            raise InputError(f"the model has no parameter '{gone[0]}' any more: make a new operator")
        for name, shape, (dtype, device) in zip(self.names, self.shapes, self._kinds, strict=True):
            if now[name].shape != shape:
                raise InputError(
                    f"parameter '{name}' was {tuple(shape)} and is {tuple(now[name].shape)} now: make a new operator"
                )
            if (now[name].dtype, now[name].device) != (dtype, device):
                raise InputError(
                    f"parameter '{name}' was {dtype} on {device} and is {now[name].dtype} on {now[name].device} now: "
                    "make a new operator"
                )
        chosen = set(self.names)
        changed = [ties for ties in _ties(model) ^ self._ties if chosen & ties]
        if changed:
            raise InputError(
                f"parameters {', '.join(sorted(changed[0])[:3])} were tied or untied since: make a new operator"
            )
        other = copy.copy(self)
        other._set(model, self.names, [now[name] for name in self.names])
        return other

    def part(self, positions: Sequence[int]) -> ParameterSpace:
        """The space of some of the parameters.

        Args:
            positions: Their positions among `names`, in ascending order.

        Returns:
            The space.
        """
        other = copy.copy(self)
        for field in ("names", "parameters", "shapes", "sizes", "_kinds"):
            setattr(other, field, tuple(getattr(self, field)[i] for i in positions))
        other.dimension = sum(other.sizes)
        return other

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


def _check_usable(model: nn.Module) -> None:
    """Refuse parameters that are sharded in another way than by FSDP2, or have no values yet."""
    reshard(model)
    check_sharding(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise InputError(
                f"parameter '{name}' of a lazy module has no shape yet: run the model on one batch, then measure"
            )
        if parameter.is_meta:
            raise InputError(f"parameter '{name}' is on the meta device and has no values: load the weights first")


def _ties(model: nn.Module) -> frozenset[frozenset[str]]:
    """The names of every parameter that has several."""
    groups = _names_by_parameter(model).values()
    return frozenset(frozenset(names) for names in groups if len(names) > 1)


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
    if callable(params) and not isinstance(params, type | nn.Module):
        chosen = [p for p, names in aliases.items() if params(names[0], p)]
        if not chosen:
            raise InputError("the params predicate chose none of the model's parameters; check what it returns")
        return chosen
    single = isinstance(params, str | re.Pattern | type | nn.Module | torch.Tensor)
    if not single and not isinstance(params, Iterable):
        raise InputError(f"params takes {TAKEN}, got {type(params).__name__}")
    patterns = [params] if single else list(params)
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
    if isinstance(pattern, nn.Module):
        return set(pattern.parameters()) & set(aliases)
    if isinstance(pattern, torch.Tensor):
        return {p for p in aliases if p is pattern}
    raise InputError(f"params takes {TAKEN}, got {type(pattern).__name__}")


def _nothing_matches(pattern: object, aliases: dict[nn.Parameter, list[str]]) -> str:
    names = [n for group in aliases.values() for n in group]
    if isinstance(pattern, str):
        near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3]
    else:
        near = names[:3]
    if isinstance(pattern, nn.Module | torch.Tensor):
        shown = f"the {type(pattern).__name__} given"
    else:
        shown = pattern.__name__ if isinstance(pattern, type) else getattr(pattern, "pattern", pattern)
    return f"no parameter matches {shown!r}; the model has {len(names)}, such as {', '.join(near)}"
