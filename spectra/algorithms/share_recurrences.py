"""Lanczos recurrences that are advanced until the interval of a share of eigenvalues is narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectra.algorithms.lanczos import LanczosRecurrence
from spectra.algorithms.probe_space import ProbeSpace
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate, normal_quantile


@dataclass(frozen=True, eq=False)
class Part:
    """The recurrences of one operator, and how a share is read from them.

    Attributes:
        space: The space that the probe vectors are drawn from.
        recurrence: The recurrences of the probe vectors; None if the space has dimension zero.
        probes: Number of probe vectors.
        read: Reads the share from a density.
    """

    space: ProbeSpace
    recurrence: LanczosRecurrence | None
    probes: int
    read: Callable[[SpectralDensity], Estimate]

    @property
    def finished(self) -> bool:
        """Whether no further step is possible."""
        return self.recurrence is None or self.recurrence.broken_down

    def density(self) -> SpectralDensity:
        """The density after the steps taken so far."""
        if self.recurrence is None:
            return self.space.density([], probes=1, steps=1)
        results = self.recurrence.tridiagonals()
        steps = max(result.steps for result in results)
        return self.space.density(results, probes=self.probes, steps=steps)

    def estimate(self) -> Estimate:
        """The estimate after the steps taken so far."""
        return self.read(self.density())


class ShareRecurrences:
    """Recurrences of one or several operators, from which one share is estimated.

    Args:
        parts: The recurrences.
        combine: Computes the share from the estimates of all parts.
        remaining: Returns how many products may still be spent.
        on_step: Called after each Lanczos step of a part.
        first_steps: Lanczos steps before the share is first estimated.
        growth: Relative growth of the number of Lanczos steps from one estimate to the next.

    Attributes:
        steps: Lanczos steps taken.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        combine: Callable[[Sequence[Estimate]], Estimate],
        *,
        remaining: Callable[[], int],
        on_step: Callable[[], None],
        first_steps: int,
        growth: float,
    ):
        self.parts, self.steps = tuple(parts), 0
        self._combine, self._remaining, self._on_step = combine, remaining, on_step
        self._first_steps, self._growth = first_steps, growth

    @property
    def finished(self) -> bool:
        """Whether no further step is possible or affordable."""
        return all(part.finished for part in self.parts) or self._affordable() < 1

    def advance(self) -> Estimate:
        """Take the Lanczos steps up to the next estimate of the share.

        Returns:
            The share.
        """
        wanted = max(self._first_steps - self.steps, int(self._growth * self.steps), 1)
        steps = min(wanted, max(self._affordable(), int(self.steps == 0)))
        for part in self.parts:
            if part.recurrence is not None:
                part.recurrence.advance(steps, on_step=self._on_step)
        self.steps += steps
        return self.estimate()

    def advance_until(self, half_width: float) -> Estimate:
        """Take Lanczos steps until the interval is narrow enough, or the budget is spent.

        Args:
            half_width: The half-width to reach.

        Returns:
            The share.
        """
        estimate = self.estimate() if self.steps else self.advance()
        while estimate.half_width > half_width and not self.finished:
            estimate = self.advance()
        return estimate

    def estimate(self) -> Estimate:
        """The share after the steps taken so far."""
        return self._combine([part.estimate() for part in self.parts])

    def _affordable(self) -> int:
        return self._remaining() // sum(part.probes for part in self.parts)


def probes_needed(dimension: int, half_width: float) -> int:
    """How many probe vectors bring the sampling error below a third of the half-width, at a share of one half.

    Args:
        dimension: Of the space that they are drawn from.
        half_width: Of the 95 % interval of the share.

    Returns:
        The number, at least 1.
    """
    per_probe = normal_quantile() * math.sqrt(0.5 / (max(dimension, 1) + 2))
    return max(math.ceil((3 * per_probe / half_width) ** 2), 1)
