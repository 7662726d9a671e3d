"""What a spectrum was measured on, so that only spectra of the same parameters are compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from spectra.backend.errors import InputError


@dataclass(frozen=True)
class Origin:
    """What is known of the operator behind a density. An empty string means unknown.

    Attributes:
        parameters: Hash of the names and shapes of the measured parameters.
        batches: Hash of the measured batches.
        unverified: Why the operator's products cannot be relied on; empty if they can.
    """

    parameters: str = ""
    batches: str = ""
    unverified: str = ""

    def to_array(self) -> np.ndarray:
        """Return the fields as the bytes of JSON text (uint8)."""
        return np.frombuffer(json.dumps(asdict(self)).encode(), dtype=np.uint8).copy()

    @classmethod
    def from_array(cls, array: np.ndarray) -> Origin:
        """Build an origin from what `to_array` returned.

        Args:
            array: The bytes. Fields of later versions are ignored.

        Returns:
            The origin.
        """
        fields = json.loads(np.asarray(array, dtype=np.uint8).tobytes())
        return cls(**{name: str(fields[name]) for name in cls.__dataclass_fields__ if name in fields})


def check_comparable(a: Origin, b: Origin, dimensions: tuple[int, int]) -> None:
    """Refuse to compare spectra of different parameters.

    Args:
        a: Where the first spectrum comes from.
        b: Where the second comes from.
        dimensions: Number of eigenvalues of the first and of the second.

    Raises:
        InputError: If dimensions, or names and shapes of the parameters, are known to differ.
    """
    if dimensions[0] != dimensions[1]:
        raise InputError(
            f"two spectra of the same parameters are expected, got {dimensions[0]:,} eigenvalues and "
            f"{dimensions[1]:,}: measure both with the same params="
        )
    if a.parameters and b.parameters and a.parameters != b.parameters:
        raise InputError(
            f"two spectra of the same parameters are expected, got two choices of {dimensions[0]:,} parameters with "
            "different names or shapes: measure both with the same params="
        )


def other_batches(a: Origin, b: Origin) -> bool:
    """Return whether the two spectra are known to be of different batches."""
    return bool(a.batches and b.batches and a.batches != b.batches)
