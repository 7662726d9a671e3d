"""Tables of text on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import describe
from spectra.runs.record import SpectrumRecord


def aligned(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    """Lines with the columns of a table aligned.

    Args:
        rows: The cells of each row.
        alignments: "<" (left) or ">" (right) for each column.

    Returns:
        A line for each row.

    Example:
        >>> aligned([("trace", "9"), ("rms", "10")], "<>")
        ['trace   9', 'rms    10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = list(zip(alignments, widths, strict=True))
    return ["  ".join(f"{cell:{a}{w}}" for cell, (a, w) in zip(row, formats, strict=True)).rstrip() for row in rows]


def known_digits(estimate: Estimate) -> str:
    """The value in the digits that its interval knows, with a question mark where it is unresolved."""
    return estimate.rounded()[0] + ("" if estimate.resolved else "?")


def quantity_name(key: str, record: SpectrumRecord) -> str:
    """The name of a quantity, with the tolerance of the record where it depends on that."""
    return describe(key).name + (f" (|λ| < {record.near_zero_tol:g})" if key == "near_zero_share" else "")
