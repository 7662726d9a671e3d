"""Piecewise linear functions on the branches that they take at the measured weights, so that differences meet no kink.

The derivative of a network with ReLU, where it exists, is that of the network whose units stay on or off as they are.
Of that network differences in float32 are exact enough. Those of the network itself cross kinks at any step that
float32 resolves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spectra.backend import memory

HELD_SHARE = 1 / 16  # of the free memory that branches may take; where they take more, none are held


@dataclass(frozen=True)
class _Piecewise:
    """A piecewise linear function.

    Attributes:
        branch: Which branch each entry takes, from the function's arguments.
        on_branch: The function on a given branch, from that branch and the function's arguments.
    """

    branch: Callable[..., torch.Tensor]
    on_branch: Callable[..., torch.Tensor]


def _is_positive(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.detach() > 0


def _relu(positive: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.where(positive, x, 0.0)


def _leaky_relu(
    positive: torch.Tensor, x: torch.Tensor, negative_slope: float = 0.01, *_: Any, **__: Any
) -> torch.Tensor:
    return torch.where(positive, x, negative_slope * x)


def _sign(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.detach().sign().to(torch.int8)


def _absolute(sign: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x * sign


def _largest(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return functional.max_pool2d(x.detach(), *args, **{**options, "return_indices": True})[1]


def _pooled(largest: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.flatten(-2).gather(-1, largest.flatten(-2)).view(largest.shape)


_RELU = _Piecewise(_is_positive, _relu)
_ABSOLUTE = _Piecewise(_sign, _absolute)
PIECEWISE: dict[Any, _Piecewise] = {
    **dict.fromkeys((functional.relu, torch.relu, torch.Tensor.relu), _RELU),
    **dict.fromkeys((torch.abs, torch.absolute, torch.Tensor.abs, torch.Tensor.__abs__), _ABSOLUTE),
    functional.leaky_relu: _Piecewise(_is_positive, _leaky_relu),
    functional.max_pool2d: _Piecewise(_largest, _pooled),
}


def _piecewise(func: Any, args: Any) -> _Piecewise | None:
    """The piecewise linear function that a call is of, if the loss may be differentiated through it."""
    found = PIECEWISE.get(func)
    if found is None or not args or not isinstance(args[0], torch.Tensor):
        return None
    return found if args[0].is_floating_point() and args[0].requires_grad else None


class BranchesSeen(TorchFunctionMode):
    """A context that tells, in `found`, whether a piecewise linear function was called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or _piecewise(func, args) is not None
        return func(*args, **(kwargs or {}))


class HeldBranches:
    """The branches of forward passes at one set of weights, on which later passes at other weights stay.

    Args:
        device: Where the branches lie.
    """

    def __init__(self, device: torch.device):
        self._passes: list[list[_Call]] = []
        self._next = 0
        self._room = int(HELD_SHARE * memory.available(device))

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """A context that records the branches of one forward pass."""
        self._passes.append([])
        with _Recorded(self):
            yield

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """A context in which one forward pass takes the branches of the next recorded one; after the last, the first.

        A call that the recorded pass did not have, or had with another shape, takes its own branch.
        """
        calls = self._passes[self._next % len(self._passes)]
        self._next += 1
        with _Replayed(calls):
            yield

    def keep(self, call: _Call) -> None:
        """Keep the branch of a call of the current pass, or none at all if memory is short."""
        self._room -= call.branch.numel() * call.branch.element_size()
        if self._room >= 0:
            self._passes[-1].append(call)
            return
        for calls in self._passes:
            calls.clear()


@dataclass(frozen=True)
class _Call:
    """What a call of a piecewise linear function computed on: which function, the shape of its input, the branch."""

    func: Any
    shape: torch.Size
    branch: torch.Tensor


class _Recorded(TorchFunctionMode):
    def __init__(self, held: HeldBranches):
        super().__init__()
        self._held = held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if found := _piecewise(func, args):
            self._held.keep(_Call(func, args[0].shape, found.branch(*args, **kwargs)))
        return func(*args, **kwargs)


class _Replayed(TorchFunctionMode):
    def __init__(self, calls: list[_Call]):
        super().__init__()
        self._calls = iter(calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _piecewise(func, args)
        call = next(self._calls, None) if found else None
        if found is None or call is None or (call.func, call.shape) != (func, args[0].shape):
            return func(*args, **kwargs)
        return found.on_branch(call.branch, *args, **kwargs)
