"""Every quantity that a spectrum is described by: its name, unit, meaning, and how it is read from a density."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate

NEAR_ZERO = 1.5e-3  # |lambda| under which the WinQ paper (arXiv 2605.17471) calls an eigenvalue near zero


EIGENVALUE_UNIT = "loss per parameter²"


@dataclass(frozen=True)
class Quantity:
    """How a quantity is named in full, its unit ("" for a plain number) and what it says, in a sentence."""

    name: str
    unit: str = ""
    meaning: str = ""

    @property
    def axis(self) -> str:
        """Name and unit, as an axis is labelled."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


QUANTITIES = {
    "lambda_max": Quantity("largest eigenvalue", EIGENVALUE_UNIT, "the sharpest direction of the loss"),
    "lambda_min": Quantity(
        "smallest eigenvalue", EIGENVALUE_UNIT, "the direction that curves down most, if below zero"
    ),
    "rms": Quantity(
        "root-mean-square eigenvalue", EIGENVALUE_UNIT, "the typical size, ‖H‖_F / √n, led by the large ones"
    ),
    "frobenius": Quantity("Frobenius norm", EIGENVALUE_UNIT, "the root of the sum of all squared eigenvalues"),
    "trace": Quantity("trace", EIGENVALUE_UNIT, "the sum of all eigenvalues"),
    "negative_energy_share": Quantity("negative energy share", "", "Σ λ² over λ < 0, divided by Σ λ² over all"),
    "negative_magnitude_share": Quantity("negative magnitude share", "", "Σ |λ| over λ < 0, divided by Σ |λ| over all"),
    "negative_share": Quantity("negative share", "", "how many of all eigenvalues lie below zero"),
    "near_zero_share": Quantity("near-zero share", "", "how many of all eigenvalues lie within the tolerance of zero"),
    "zero_share": Quantity("known zeros", "", "how many eigenvalues are zero because the operator never touches them"),
    "loss": Quantity("loss on the measured batches", "nats per token", "at the weights that the spectrum belongs to"),
    "gradient_norm": Quantity("gradient norm", "loss per parameter", "the norm of the gradient at the same point"),
    "validation_loss": Quantity("validation loss", "nats per token"),
    "training_loss": Quantity("training loss", "nats per token"),
    "learning_rate": Quantity("learning rate"),
    "relative_gradient_norm": Quantity("relative gradient norm", "", "‖gradient‖ / ‖W‖ over the quantized weights"),
    "flip_rate": Quantity("flip rate", "", "share of the quantization codes that changed since the measurement before"),
    "distance_to_grid": Quantity("distance to the grid", "", "‖W − Q(W)‖ / ‖W‖ over the quantized weights"),
    "clipped_share": Quantity("clipped share", "", "share of the weights outside the quantizer's range"),
}


ESTIMATES = tuple(QUANTITIES)[:9]


def describe(quantity: str) -> Quantity:
    """The quantity's full name and unit; for one that is not known here, its key in words."""
    return QUANTITIES.get(quantity) or Quantity(quantity.replace("_", " "))


def summarize(density: SpectralDensity, near_zero_tol: float = NEAR_ZERO) -> dict[str, Estimate]:
    """Every quantity that a record keeps of a density, by name."""
    return {
        "trace": density.trace(),
        "rms": density.rms(),
        "frobenius": density.frobenius(),
        "lambda_max": density.lambda_max(),
        "lambda_min": density.lambda_min(),
        "negative_share": density.negative_share(),
        "near_zero_share": density.near_zero_share(near_zero_tol),
        "negative_energy_share": density.negative_energy_share(),
        "negative_magnitude_share": density.negative_magnitude_share(),
    }
