"""The smooth function whose derivative the straight-through derivative is, near the current weights.

A quantizer is constant almost everywhere, and its straight-through derivative is not the derivative of its values. But
if rounded values, clip masks and computed scales are held fixed, the quantizer becomes a smooth function of weights and
scales, and its derivative is the straight-through derivative. So finite differences of that function can check
Hessian-vector products (see `spectra.operators.hessian.checks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


class Linearization:
    """Records values without a true derivative during forward passes in `record`, and returns them in `replay`.

    After the last recorded forward pass, the next replay starts again with the first.
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
    """clamp(x, low, high), with derivative 1 between the bounds, both included.

    Inside a replay, the result depends on x only where x lay within the bounds when the pass was recorded.
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
