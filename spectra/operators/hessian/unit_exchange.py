"""Whole weights and vectors of one unit of a sharded model at a time, gathered from the ranks when they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.exchange import Exchange
from spectra.backend.shards import Shards
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.operators.hessian.units import Unit, units_of

T = TypeVar("T")
Tensors = tuple[torch.Tensor, ...]
WEIGHTS, VECTOR, OFFSET, SUM = range(4)  # what can be asked for of a unit
KINDS = 4
SUMMED, IGNORED, FOLDED = "summed", "ignored", "folded"  # what becomes of the gradients of units
FOLDED_LENGTH = 1 << 20


class UnitExchange:
    """What ranks exchange while each computes with its own batches: the weights and vectors of a unit, and gradients.

    Every vector lies over the ranks as `Shards` says. A rank holds the whole weights of a unit, and the part of a
    vector that belongs to them, only as long as it computes with them. Gradients in them are summed over the ranks as
    soon as they are known, and each rank adds to its own part.

    Args:
        model: A model that FSDP2 has sharded.
        space: The chosen parameters.
        device: The device of the vectors.

    Attributes:
        units: The units of the model, and after those each parameter alone.
        by_module: How many of these are modules.
        apart: Numbers of the units of parameters that belong to no module.
        used: Ids of the parameters that a gradient has reached.
        dtype: The dtype in which weights are given; None for their own.
        moved: Whether random numbers are added to the weights on this rank, for checks.
        become: What becomes of gradients: they are summed over the ranks, ignored, or folded to a short vector of this
            rank.
        folded: That vector.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, device: torch.device):
        self.device = device
        self._exchange = Exchange(self)
        self.renew(model, space)
        self.used: set[int] = set()
        self.dtype: torch.dtype | None = None
        self.moved = 0.0
        self.become = SUMMED
        self.folded: torch.Tensor | None = None
        self._vector: torch.Tensor | None = None
        self._offset: torch.Tensor | None = None
        self._sum = torch.zeros(0)
        self._sum_dtype = torch.float32

    def renew(self, model: nn.Module, space: ParameterSpace) -> None:
        """Take over the parameters that the model has now."""
        self.shards = Shards.of_this_rank(space.dimension)
        units, rest = units_of(model)
        self.by_module = len(units)
        every = {id(p): p for unit in units for p in unit.parameters} | {id(p): p for p in rest}
        names = {id(p): name for name, p in model.named_parameters()}
        self.units = [*units, *(Unit(names[key], None, (p,)) for key, p in every.items())]
        self.number_of = {id(unit.parameters[0]): n for n, unit in enumerate(self.units) if unit.module is None}
        self.apart = [self.number_of[id(p)] for p in rest]
        starts, first = {}, 0
        for parameter, size in zip(space.parameters, space.sizes, strict=True):
            starts[id(parameter)] = first
            first += size
        self._starts: dict[int, int] = starts  # positions in vectors, of the chosen parameters, by id

    def is_chosen(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is differentiated."""
        return id(parameter) in self._starts

    def keep_apart(self, name: str) -> None:
        """Gather the parameter of this name outside of its module too."""
        self.apart.append(next(n for n, unit in enumerate(self.units) if unit.module is None and unit.name == name))

    # -- what ranks do together

    def run(
        self,
        task: Callable[[], T],
        *,
        vector: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        dtype: torch.dtype,
    ) -> tuple[T, torch.Tensor]:
        """Run a task on each rank, in which it may call the methods below. All ranks call this together.

        Args:
            task: What a rank does.
            vector: The vector that `vector` gives, this rank's part.
            offset: A vector that is added to the weights, this rank's part.
            dtype: The dtype of the sum.

        Returns:
            What the task returns, and this rank's part of the sum of all gradients.
        """
        self._vector, self._offset, self._sum_dtype = vector, offset, dtype
        self._sum = torch.zeros(self.shards.entries, dtype=dtype, device=self.device)
        self.used = set()
        try:
            return self._exchange.run(task), self._sum
        finally:
            self._vector = self._offset = None
            self._sum = torch.zeros(0)

    # -- what a rank asks for while it computes

    def weights(self, number: int, *, moved: bool = True) -> Tensors:
        """The whole weights of a unit, without a graph.

        Args:
            number: The number of the unit.
            moved: Whether to add the offset.

        Returns:
            A tensor for each of its parameters.
        """
        unit = self.units[number]
        values = [self._cast(value) for value in self._exchange.ask(number * KINDS + WEIGHTS)]
        if moved and self._offset is not None:
            offsets = iter(self._exchange.ask(number * KINDS + OFFSET))
            values = [
                value + next(offsets).to(value.dtype) if self.is_chosen(p) else value
                for p, value in zip(unit.parameters, values, strict=True)
            ]
        if moved and self.moved:
            values = [
                self._with_noise(p, value) if self.is_chosen(p) else value
                for p, value in zip(unit.parameters, values, strict=True)
            ]
        return tuple(values)

    def vector(self, number: int, dtype: torch.dtype | None = None) -> Tensors:
        """The part of the vector that belongs to a unit: a tensor for each of its chosen parameters."""
        if self.become == IGNORED:  # memory is measured
            return tuple(torch.zeros_like(t, dtype=dtype) for t in self.prepare(number * KINDS + VECTOR, None))
        return tuple(t if dtype is None else t.to(dtype) for t in self._exchange.ask(number * KINDS + VECTOR))

    def add(self, number: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add the gradient in the chosen parameters of a unit; None for those that are not reached."""
        chosen = self.chosen_of(number)
        self.used |= {id(p) for p, g in zip(chosen, gradients, strict=True) if g is not None}
        if self.become == FOLDED:
            for parameter, gradient in zip(chosen, gradients, strict=True):
                if gradient is not None:
                    self._fold(self._starts[id(parameter)], gradient.detach().reshape(-1))
        elif any(gradient is not None for gradient in gradients):
            if self.become == IGNORED:
                self.prepare(number * KINDS + SUM, gradients)
            else:
                self._exchange.ask(number * KINDS + SUM, gradients)

    def chosen_of(self, number: int) -> list[nn.Parameter]:
        """The chosen parameters of a unit."""
        return [p for p in self.units[number].parameters if self.is_chosen(p)]

    @contextlib.contextmanager
    def gradients(self, become: str) -> Iterator[None]:
        """A context in which gradients are summed, ignored, or folded."""
        before, self.become = self.become, become
        folded, self.folded = self.folded, None
        try:
            yield
        finally:
            self.become, self.folded = before, folded

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.dtype is None or not value.is_floating_point() else value.to(self.dtype)

    def _with_noise(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """Weights with random numbers added, the same at every call."""
        generator = torch.Generator().manual_seed(self._starts[id(parameter)])
        size = float(value.double().square().mean().sqrt()) if value.numel() else 0.0
        noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        return value + self.moved * (size or self.moved) * noise

    def _fold(self, first: int, gradient: torch.Tensor) -> None:
        """Add a part of a gradient, from this position of the whole on, to a short vector with random signs."""
        length = min(FOLDED_LENGTH, self.shards.dimension)
        if self.folded is None:
            self.folded = torch.zeros(length, dtype=gradient.dtype, device=gradient.device)
        at = 0
        while at < len(gradient):
            period, place = divmod(first + at, length)
            stop = min(at + length - place, len(gradient))
            sign = 1 if (period * 0x9E3779B1 >> 7) % 2 == 0 else -1
            self.folded[place : place + stop - at] += sign * gradient[at:stop].to(self.folded.dtype)
            at = stop

    # -- the exchange itself

    def prepare(self, request: int, payload: Any) -> Any:
        """See `spectra.backend.exchange.Data`."""
        number, kind = divmod(request, KINDS)
        if kind == WEIGHTS:
            return [_Gathered(parameter) for parameter in self.units[number].parameters]
        chosen = self.chosen_of(number)
        if kind == SUM:
            return [
                torch.zeros(p.shape, dtype=self._sum_dtype, device=self.device)
                if payload is None or payload[i] is None
                else payload[i].detach().to(self._sum_dtype).contiguous()
                for i, p in enumerate(chosen)
            ]
        part = self._vector if kind == VECTOR else self._offset
        dtype = self._sum_dtype if part is None else part.dtype
        return [torch.empty(p.shape, dtype=dtype, device=self.device) for p in chosen]

    def transfer(self, request: int, prepared: Any) -> Any:
        """See `spectra.backend.exchange.Data`."""
        number, kind = divmod(request, KINDS)
        if kind == WEIGHTS:
            return [gathered.whole() for gathered in prepared]
        part = self._vector if kind == VECTOR else self._offset
        for parameter, tensor in zip(self.chosen_of(number), prepared, strict=True):
            for owner, segment, own in self._segments(parameter, tensor.view(-1)):
                if kind == SUM:
                    ranks.reduce_(segment, owner)
                    if owner == self.shards.rank:
                        self._sum[own] += segment
                else:
                    if owner == self.shards.rank:
                        assert part is not None
                        segment.copy_(part[own])
                    ranks.broadcast_(segment, owner)
        return prepared

    def _segments(self, parameter: nn.Parameter, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, slice]]:
        """The numbers of a parameter, by rank: the rank that holds them, they themselves, where in its part."""
        first, length = self._starts[id(parameter)], self.shards.length
        position = first
        while position < first + len(flat):
            owner = position // length
            stop = min((owner + 1) * length, first + len(flat))
            yield owner, flat[position - first : stop - first], slice(position - owner * length, stop - owner * length)
            position = stop


class _Gathered:
    """A parameter on its way from the shards of the ranks to a whole tensor.

    FSDP2 cuts a parameter along one dimension into as many pieces as there are ranks, of which the last may be shorter
    or empty.
    """

    def __init__(self, parameter: Any):
        mesh, placements = parameter.device_mesh, parameter.placements
        axis = next(i for i, place in enumerate(placements) if place.is_shard())
        self._group, count = mesh.get_group(axis), mesh.size(axis)
        self._dim, self._shape = placements[axis].dim, parameter.shape
        with torch.no_grad():
            part = parameter.to_local().detach().movedim(self._dim, 0)
        rows, rest = parameter.shape[self._dim], part.shape[1:]
        each = -(-rows // count)
        if len(part) == each:
            self._part = part.contiguous()
        else:
            self._part = part.new_zeros(each, *rest)
            self._part[: len(part)] = part
        self._whole = part.new_empty(count * each, *rest)

    def whole(self) -> torch.Tensor:
        """Gather the parameter. All ranks call this together."""
        ranks.all_gather_into(self._whole, self._part, self._group)
        return self._whole[: self._shape[self._dim]].movedim(0, self._dim).contiguous()
