"""The smooth function that a straight-through derivative belongs to, near the current weights.

A quantizer is constant almost everywhere, and its straight-through derivative is not the derivative of its values. With
the rounded values, the clip masks and the computed scales held at what they are at the current weights, the quantizer
is an ordinary function of weights and scales, and the straight-through derivative is its derivative there. Finite
differences through that function can therefore check Hessian-vector products (see `spectra.operators.hessian.checks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


class Linearization:
    """Records values without a true derivative in forward passes inside `record`, and gives them inside `replay`.

    After the last recorded forward pass, the next replay uses the first one again.
    """

    def __init__(self) -> None:
        self.passes: list[list[Tensor]] = []
        self._next_pass = 0
        self._replayed: Iterator[Tensor] | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """A context that records the values of one forward pass."""
        self.passes.append([])
        with _active(self):
            yield

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """A context that uses the values of the next recorded forward pass."""
        self._replayed = iter(self.passes[self._next_pass % len(self.passes)])
        self._next_pass += 1
        try:
            with _active(self):
                yield
        finally:
            self._replayed = None

    def hold(self, value: Tensor) -> Tensor:
        """The value without its graph; in a replay, the recorded value."""
        if self._replayed is not None:
            return next(self._replayed)
        self.passes[-1].append(value.detach())
        return value.detach()


_current: Linearization | None = None


def held(value: Tensor) -> Tensor:
    """The value without its graph; inside a replay, as it was recorded."""
    return value.detach() if _current is None else _current.hold(value)


def clamped(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """clamp(x, low, high), whose derivative is 1 from bound to bound, both included.

    Inside a linearization, x moves the result only where it lay within the bounds when the pass was recorded.
    """
    if _current is None:
        return x.clamp(low, high)  # type: ignore[arg-type]
    start = held(x)
    inside = held(((x >= low) & (x <= high)).to(x.dtype))
    return held(x.clamp(low, high)) + inside * (x - start)  # type: ignore[arg-type]


@contextlib.contextmanager
def _active(linearization: Linearization) -> Iterator[None]:
    """A context in which `held` and `clamped` use this linearization."""
    global _current
    before, _current = _current, linearization
    try:
        yield
    finally:
        _current = before
