"""When a training is measured: at which of its steps, on which signal, and for which share of its time."""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from spectra.backend.errors import InputError
from spectra.runs.signals import Signal, in_words

EVERY = 200  # training steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a training is measured. What is given adds up: a training step is due where any of it says so.

    The start and the end of a training are measured besides.

    Args:
        every: Training steps between two measurements; a number below 1 is a fraction of the training. None: 200 where
            nothing else is given, 1 where `max_overhead` is all that is given.
        at: Training steps that are measured; a number between 0 and 1 is a fraction of the training.
        when: A signal, see `spectra.runs.signals`: `LossPlateau`, `GradientNormJump`, or a function (history) -> bool.
        max_overhead: The largest share of the wall time that measurements may take, between 0 and 1. A training step
            that is due is passed over where a measurement, which is expected to take as long as the last one, and that
            of the end would exceed the share. None: any share.

    Raises:
        InputError: If a value is out of its range.

    Example:
        >>> Schedule(every=100).names(300), Schedule(at=[10, 0.5]).names(40, 80)
        (True, True)
        >>> Schedule()
        Schedule(every=200, at=(), when=None, max_overhead=None)
    """

    every: int | float | None = None
    at: Iterable[int | float] = ()
    when: Signal | None = None
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        at = _check_at(self.at)
        if self.when is not None and (isinstance(self.when, type) or not callable(self.when)):
            raise InputError(f"when must be a function (history) -> bool, such as LossPlateau(), got {self.when!r:.80}")
        if self.max_overhead is not None and not 0 < _number(self.max_overhead) < 1:
            raise InputError(f"max_overhead must be a share of the time between 0 and 1, got {self.max_overhead!r}")
        every = self.every
        if every is None and not at and self.when is None:
            every = EVERY if self.max_overhead is None else 1
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "every", None if every is None else _check_every(every))

    @classmethod
    def of(cls, schedule: Schedule | None = None, **options: Any) -> Schedule:
        """A schedule that was given whole, or in plain arguments.

        Args:
            schedule: The schedule.
            **options: The arguments of `Schedule`; those that are None or empty were not given.

        Returns:
            The schedule.

        Raises:
            InputError: If both are given, or a value is out of its range.
        """
        given = {name: value for name, value in options.items() if value is not None and value != ()}
        if schedule is None:
            return cls(**given)
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule must be a spectra.Schedule, got {type(schedule).__name__}")
        if given:
            raise InputError(f"give schedule=, or {', '.join(f'{name}=' for name in given)}, not both")
        return schedule

    @property
    def fractions(self) -> list[float]:
        """The fractions of the training that it names, for which the length of the training has to be known."""
        return [value for value in (self.every, *self.at) if isinstance(value, float)]

    def names(self, step: int, total_steps: int | None = None) -> bool:
        """Whether `every` and `at` name a training step.

        Args:
            step: The training step.
            total_steps: The training steps in all, for fractions.

        Returns:
            Whether they do.
        """
        total = 0 if total_steps is None else total_steps
        at = {round(value * total) if isinstance(value, float) else value for value in self.at}
        if step in at or self.every is None:
            return step in at
        if isinstance(self.every, int):
            return step % self.every == 0
        interval = self.every * total
        return interval > 0 and step == round(round(step / interval) * interval)

    def to_config(self) -> dict[str, Any]:
        """The schedule as config.json names it; what is not given is left out."""
        values = {"every": self.every, "at": list(self.at), "max_overhead": self.max_overhead}
        values["when"] = None if self.when is None else in_words(self.when)
        return {name: value for name, value in values.items() if value not in (None, [])}


class Overhead:
    """Which share of the wall time measurements take, and whether one more fits in.

    Args:
        most: The largest share; None for any.
        expected: How long a measurement is expected to take before the first one is made, in seconds.
        clock: The time in seconds.
    """

    def __init__(
        self, most: float | None, *, expected: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.most, self.expected, self.spent = most, expected, 0.0
        self._clock = clock
        self._start: float | None = None

    def start(self) -> float:
        """Begin to count the time, unless that was begun. Returns the time now."""
        now = self._clock()
        self._start = now if self._start is None else self._start
        return now

    def add(self, seconds: float, *, as_expected: bool) -> None:
        """Count the time of a measurement.

        Args:
            seconds: The time that it took.
            as_expected: Whether the next one is expected to take as long. One that failed tells nothing.
        """
        self.spent += seconds
        self.expected = seconds if as_expected else self.expected

    def has_room(self) -> bool:
        """Whether a measurement now, and one at the end, stay within the share."""
        if self.most is None:
            return True
        now = self.start()
        elapsed = now - (now if self._start is None else self._start)
        return self.spent + 2 * self.expected <= self.most * (elapsed + 2 * self.expected)


def _number(value: Any) -> float:
    """A real number as a float; NaN, which is in no range, for anything else."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else float("nan")


def _check_every(every: Any) -> int | float:
    """The interval: an integer, or a fraction. Raises InputError for what is neither."""
    number = _number(every)
    if 0 < number < 1:
        return number
    if not number.is_integer() or number < 1:
        raise InputError(
            "every must be a whole number of training steps, at least 1, or a fraction of the training below 1, "
            f"got {every!r}"
        )
    return int(number)


def _check_at(at: Any) -> tuple[int | float, ...]:
    """The training steps and fractions in order, each once. Raises InputError for what is neither."""
    values: list[Any] = list(at) if isinstance(at, Iterable) and not isinstance(at, str | bytes) else [at]
    for value in values:
        number = _number(value)
        if not (0 < number < 1 or (number.is_integer() and number >= 0)):
            raise InputError(
                "at must be training steps, 0 or more, or fractions of the training between 0 and 1, as in "
                f"at=[100, 0.5], got {value!r:.80}"
            )
    return tuple(sorted({float(value) if 0 < value < 1 else int(value) for value in values}))
