"""An estimate for each entry of a vector, such as the diagonal of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spectra.estimates.estimate import CONFIDENCE, student_quantile


@dataclass(frozen=True)
class VectorEstimate:
    """Values (n,) with a 95 % interval [low, high] for each entry. The intervals do not hold for all entries at once.

    Attributes:
        value: The estimates, (n,).
        low: Lower ends, (n,).
        high: Upper ends, (n,).
        reason: Why the estimates cannot be relied on; empty if they can.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reason: str = ""

    @property
    def resolved(self) -> bool:
        """Whether the values can be relied on."""
        return not self.reason

    def __len__(self) -> int:
        return len(self.value)


def vector_interval(
    sums: np.ndarray, squares: np.ndarray, count: int, *, confidence: float = CONFIDENCE
) -> VectorEstimate:
    """The mean of independent samples of a vector with Student's interval for each entry, mean +- t_{k-1} s / sqrt(k).

    Args:
        sums: Sums of the samples of each entry, (n,).
        squares: Sums of their squares, (n,).
        count: The number k of samples, at least 2.
        confidence: Probability that each interval covers its mean, for normal samples.

    Returns:
        The mean and the bounds, (n,) each.
    """
    mean = sums / count
    variance = np.maximum(squares / count - mean**2, 0.0) * count / (count - 1)
    half = student_quantile(count - 1, confidence) * np.sqrt(variance) / math.sqrt(count)
    return VectorEstimate(mean, mean - half, mean + half)
