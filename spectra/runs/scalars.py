"""The numbers of a record under the names that a logger gets."""

from __future__ import annotations

import math

from spectra.runs.record import SpectrumRecord

PREFIX = "spectra"


def scalars(
    record: SpectrumRecord, *, prefix: str = PREFIX, several_modes: bool = False, occasions: tuple[str, ...] = ("",)
) -> dict[str, float]:
    """Write the numbers of a record as a dictionary of scalars.

    A quantity q is "spectra/q", the ends of its interval "spectra/q_low" and "spectra/q_high". Of an unresolved one the
    ends alone are written: a curve of its values would claim what is not known. Numbers that are not finite, such as an
    end where nothing bounds the quantity, are left out.

    Args:
        record: The record.
        prefix: What every name begins with.
        several_modes: Whether the mode stands in the names, as in "spectra/ste/rms".
        occasions: Labels that do not stand in the names. Any other does, as in "spectra/before-reset/rms".

    Returns:
        The scalars by name; none for a measurement that failed.
    """
    if not record.is_measured:
        return {}
    parts = [prefix, record.mode if several_modes else "", "" if record.label in occasions else record.label]
    begin = "/".join(part for part in parts if part)
    values: dict[str, float] = {"loss": record.loss, "gradient_norm": record.gradient_norm, **record.extras}
    for name, estimate in record.estimates.items():
        values |= {name: estimate.value} if estimate.resolved else {}
        values |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    values["seconds"] = record.seconds
    return {f"{begin}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
