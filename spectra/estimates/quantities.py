"""Every quantity that a record or a log may hold: its name, unit, meaning, and how it is read from a density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate

NEAR_ZERO = 1.5e-3  # |lambda| below which an eigenvalue is near zero, as in arXiv 2605.17471
EIGENVALUE_UNIT = "loss per parameter²"


class Kind(Enum):
    """What a quantity is in terms of the eigenvalues; intervals of changes depend on it."""

    SUM = "a sum over eigenvalues"
    NORM = "the root of a sum or mean of squared eigenvalues"
    END = "an extreme eigenvalue"
    COUNTED_SHARE = "a share of the number of eigenvalues"
    WEIGHTED_SHARE = "a share of the sum of |lambda|^power"
    OTHER = "no function of the eigenvalues"


@dataclass(frozen=True)
class Quantity:
    """A number that a record or a log may hold.

    Attributes:
        name: Its name in full.
        unit: Its unit; empty for a plain number.
        meaning: What it says, in a sentence.
        kind: What it is in terms of the eigenvalues.
        power: The power of |lambda| in a weighted share.
        read: Called as read(density, tolerance for near zero), returns the Estimate; None for a number that does not
            come from a density.
    """

    name: str
    unit: str = ""
    meaning: str = ""
    kind: Kind = Kind.OTHER
    power: int | None = None
    read: Callable[[SpectralDensity, float], Estimate] | None = None

    @property
    def axis(self) -> str:
        """Name and unit, as an axis is labelled."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def is_share(self) -> bool:
        """Whether it lies in [0, 1]."""
        return self.kind in (Kind.COUNTED_SHARE, Kind.WEIGHTED_SHARE)

    @property
    def is_nonnegative(self) -> bool:
        """Whether it cannot be below zero."""
        return self.is_share or self.kind is Kind.NORM

    @property
    def is_mean_over_probes(self) -> bool:
        """Whether its estimate is, to first order, a mean over probe vectors."""
        return self.kind in (Kind.SUM, Kind.NORM, Kind.WEIGHTED_SHARE)


QUANTITIES = {
    "negative_share": Quantity(
        "negative share",
        meaning="how many of all eigenvalues lie below zero",
        kind=Kind.COUNTED_SHARE,
        read=lambda density, _: density.negative_share(),
    ),
    "lambda_max": Quantity(
        "largest eigenvalue",
        EIGENVALUE_UNIT,
        "the sharpest direction of the loss",
        kind=Kind.END,
        read=lambda density, _: density.lambda_max(),
    ),
    "lambda_min": Quantity(
        "smallest eigenvalue",
        EIGENVALUE_UNIT,
        "the direction that curves down most, if below zero",
        kind=Kind.END,
        read=lambda density, _: density.lambda_min(),
    ),
    "rms": Quantity(
        "root-mean-square eigenvalue",
        EIGENVALUE_UNIT,
        "the typical size, ‖H‖_F / √n, led by the large ones",
        kind=Kind.NORM,
        read=lambda density, _: density.rms(),
    ),
    "frobenius": Quantity(
        "Frobenius norm",
        EIGENVALUE_UNIT,
        "the root of the sum of all squared eigenvalues",
        kind=Kind.NORM,
        read=lambda density, _: density.frobenius(),
    ),
    "trace": Quantity(
        "trace",
        EIGENVALUE_UNIT,
        "the sum of all eigenvalues",
        kind=Kind.SUM,
        read=lambda density, _: density.trace(),
    ),
    "negative_energy_share": Quantity(
        "negative energy share",
        meaning="Σ λ² over λ < 0, divided by Σ λ² over all",
        kind=Kind.WEIGHTED_SHARE,
        power=2,
        read=lambda density, _: density.negative_energy_share(),
    ),
    "negative_magnitude_share": Quantity(
        "negative magnitude share",
        meaning="Σ |λ| over λ < 0, divided by Σ |λ| over all",
        kind=Kind.WEIGHTED_SHARE,
        power=1,
        read=lambda density, _: density.negative_magnitude_share(),
    ),
    "near_zero_share": Quantity(
        "near-zero share",
        meaning="how many of all eigenvalues lie within the tolerance of zero",
        kind=Kind.COUNTED_SHARE,
        read=lambda density, tol: density.near_zero_share(tol),
    ),
    "zero_share": Quantity(
        "known zeros",
        meaning="how many eigenvalues are zero because the operator never touches them",
        kind=Kind.COUNTED_SHARE,
    ),
    "loss": Quantity("loss on the measured batches", "nats per token", "at the weights that the spectrum belongs to"),
    "gradient_norm": Quantity("gradient norm", "loss per parameter", "the norm of the gradient at the same point"),
    "validation_loss": Quantity("validation loss", "nats per token"),
    "training_loss": Quantity("training loss", "nats per token"),
    "learning_rate": Quantity("learning rate"),
}

ESTIMATES = tuple(key for key, quantity in QUANTITIES.items() if quantity.read is not None)


def describe(key: str) -> Quantity:
    """Return the quantity with this key. A quantity that is not in `QUANTITIES` is named by the words of its key.

    Args:
        key: Name of the quantity in a record or a log.

    Returns:
        The quantity.

    Example:
        >>> describe("rms").axis
        'root-mean-square eigenvalue (loss per parameter²)'
        >>> describe("my_metric").name
        'my metric'
    """
    return QUANTITIES.get(key) or Quantity(key.replace("_", " "))


def summarize(density: SpectralDensity, near_zero_tol: float = NEAR_ZERO) -> dict[str, Estimate]:
    """Read every quantity that a record keeps from a density.

    Args:
        density: The density.
        near_zero_tol: |lambda| below which an eigenvalue counts as near zero, in the units of the eigenvalues.

    Returns:
        The estimates by key, in the order of `ESTIMATES`.
    """
    return {
        key: quantity.read(density, near_zero_tol) for key, quantity in QUANTITIES.items() if quantity.read is not None
    }
