"""What a spectrum was measured on, so that only spectra of the same parameters are compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from spectra.backend.errors import InputError

OTHER_BATCHES = "the two spectra were measured on different batches, so part of a change is a difference of the batches"


@dataclass(frozen=True)
class Origin:
    """What is known of the operator behind a density. An empty string means unknown.

    Attributes:
        parameters: Hash of the names and shapes of the measured parameters.
        batches: Hash of the measured batches.
        mode: Which Hessian, such as "full" or "ste".
        training: "training" or "evaluation", the mode in which the model ran.
        unverified: Why the operator's products cannot be relied on; empty if they can.
    """

    parameters: str = ""
    batches: str = ""
    mode: str = ""
    training: str = ""
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
    """Refuse to compare spectra of different parameters, or of a model in different modes.

    Args:
        a: Where the first spectrum comes from.
        b: Where the second comes from.
        dimensions: Number of eigenvalues of the first and of the second.

    Raises:
        InputError: If dimensions, names and shapes of the parameters, or training and evaluation mode, are known to
            differ.
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
    if a.training and b.training and a.training != b.training:
        raise InputError(
            f"two spectra of a model in the same mode are expected, got one in {a.training} and one in {b.training} "
            "mode: measure both with the same training="
        )


def notes_on_differences(a: Origin, b: Origin) -> list[str]:
    """What two spectra that can be compared are known to differ in.

    Args:
        a: Where the first spectrum comes from.
        b: Where the second comes from.

    Returns:
        A sentence for each difference.
    """
    notes = []
    if a.mode and b.mode and a.mode != b.mode:
        notes.append(
            f"the two spectra are those of different Hessians, {a.mode!r} and {b.mode!r}, so part of a change is a "
            "difference of the two definitions"
        )
    if a.batches and b.batches and a.batches != b.batches:
        notes.append(OTHER_BATCHES)
    return notes
