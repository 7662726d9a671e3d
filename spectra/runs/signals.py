"""Signals of a training on which it is measured: functions of the numbers that it reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from spectra.backend.errors import InputError

HISTORY = 1000  # reports that are kept between two measurements


@runtime_checkable
class Signal(Protocol):
    """What decides, after a training step, whether it is time to measure.

    It is called as signal(history). `history` holds what the training reported since the last measurement, the oldest
    first and 1000 entries at most: mappings with "step" and what `SpectrumProbe.step` was given, such as "loss" and
    "gradient_norm". A function of the history alone changes nothing in the training.
    """

    def __call__(self, history: Sequence[Mapping[str, float]], /) -> bool:
        """Whether to measure."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossPlateau:
    """Measure where the loss has stopped falling.

        m_1 >= m_0 - tolerance |m_0|

    with m_1 the mean of the last `window` losses and m_0 that of the `window` losses before. While the plateau lasts,
    it is measured again after every 2 `window` losses.

    Args:
        window: How many losses make up a mean.
        tolerance: By which part of m_0 the mean has to fall, so that it counts as falling.

    Raises:
        InputError: If a value is out of its range.

    Example:
        >>> falling = [{"loss": 1 / step} for step in range(1, 5)]
        >>> LossPlateau(window=2)(falling), LossPlateau(window=2)(4 * falling[-1:])
        (False, True)
    """

    window: int = 100
    tolerance: float = 0.01

    needs: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        _check_window(self.window)
        if not (_is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise InputError(f"tolerance must be a part of the loss, from 0 to below 1, got {self.tolerance!r}")

    def __call__(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the loss has stopped falling."""
        losses = _numbers(history, self.needs)[-2 * self.window :]
        if len(losses) < 2 * self.window:
            return False
        before, now = statistics.fmean(losses[: self.window]), statistics.fmean(losses[self.window :])
        return now >= before - self.tolerance * abs(before)


@dataclass(frozen=True, kw_only=True)
class GradientNormJump:
    """Measure where the norm of the gradient jumps up: it exceeds `factor` times the median of the `window` before.

    Args:
        factor: How far it has to jump, above 1.
        window: How many norms make up the median.

    Raises:
        InputError: If a value is out of its range.

    Example:
        >>> GradientNormJump(factor=3, window=2)([{"gradient_norm": norm} for norm in (1.0, 1.2, 4.0)])
        True
    """

    factor: float = 3.0
    window: int = 50

    needs: ClassVar[str] = "gradient_norm"

    def __post_init__(self) -> None:
        _check_window(self.window)
        if not (_is_number(self.factor) and 1 < self.factor < math.inf):
            raise InputError(f"factor must be a number above 1, got {self.factor!r}")

    def __call__(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last norm is a jump."""
        norms = _numbers(history, self.needs)[-self.window - 1 :]
        return len(norms) > self.window and norms[-1] > self.factor * statistics.median(norms[:-1])


def in_words(signal: Any) -> str:
    """A signal as config.json and notes name it: without an address in memory, so that two can be compared."""
    return getattr(signal, "__qualname__", "") or (type(signal).__name__ if " at 0x" in repr(signal) else repr(signal))


def _numbers(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [numbers[name] for numbers in history if name in numbers]


def _check_window(window: Any) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= HISTORY // 2:
        raise InputError(f"window must be a number of steps from 1 to {HISTORY // 2}, got {window!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
