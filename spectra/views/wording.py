"""Names and meanings of runs, records, modes and quantities in figures and tables, as the run folders give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from spectra.estimates import quantities
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import Quantity
from spectra.runs.folder import Run
from spectra.runs.planned import unfinished
from spectra.runs.record import SpectrumRecord

MODE_MEANINGS = {"full": "the Hessian of the loss in the model's own weights"}
UNKNOWN_MODE = "a Hessian that the caller supplied"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def describe(runs: Sequence[Run], key: str) -> Quantity:
    """Name, unit and meaning of a quantity, from the first run that describes it, else from `spectra` itself."""
    for run in runs:
        if key in (shown := run.presentation).quantities:
            return shown.describe(key)
    return quantities.describe(key)


def axis_name(runs: Sequence[Run], key: str) -> str:
    """The label of an axis: the quantity with its unit, or with the tolerance of a near-zero share."""
    about = describe(runs, key)
    return f"{about.name} (|λ| < {tolerance(runs)})" if key == "near_zero_share" else about.axis


def tolerance(runs: Sequence[Run]) -> str:
    """The |lambda| below which an eigenvalue counts as near zero, in words; all of them where the runs used several."""
    return " or ".join(sorted({f"{record.near_zero_tol:g}" for run in runs for record in run.measured}))


def record_words(run: Run, record: SpectrumRecord) -> str:
    """The label of a record as words; "" where it has none."""
    return run.presentation.labels.get(record.label, record.label.replace("-", " "))


def mode_meaning(runs: Sequence[Run], mode: str) -> str:
    """Which Hessian a mode is, from the first run that explains it."""
    explained = [shown.modes[mode] for run in runs if mode in (shown := run.presentation).modes]
    return explained[0] if explained else MODE_MEANINGS.get(mode, UNKNOWN_MODE)


def sentence_case(words: str) -> str:
    """The words with a capital first letter."""
    return words[:1].upper() + words[1:]


def listed(items: Iterable[str]) -> str:
    """One or more items as in a sentence: "a, b and c"."""
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def unfinished_words(shown: Sequence[Run]) -> str:
    """Which part of what was planned is there, as in "unfinished: 2 of 4 runs are finished"; "" where all is there."""
    lacking = list(filter(None, map(unfinished, shown)))
    if not lacking:
        return ""
    many = f"{len(shown) - len(lacking)} of {len(shown)} runs are finished"
    return f"unfinished: {lacking[0] if len(shown) == 1 else many}"


def share_in_words(low: float, high: float, n: int) -> str:
    """Bounds on a share of eigenvalues in words: in per cent, or as a number where they are few.

    Args:
        low: The lower bound of the share.
        high: The upper bound.
        n: The number of all eigenvalues.

    Returns:
        The words, rounded outward.

    Example:
        >>> share_in_words(0.62, 0.91, 1000), share_in_words(0.0, 0.003, 1000), share_in_words(0.002, 0.002, 1000)
        ('62–91 %', '0–3', '2')
    """
    if high * n < 1000 and high < 0.02:
        fewest, most = math.ceil(low * n - 1e-6), math.floor(high * n + 1e-6)
        return f"{fewest}" if fewest == most else f"{fewest}–{most}"
    digits = 0 if low >= 0.01 or low == 0 else 1
    scale = 10**digits
    fewest = math.floor(100 * low * scale + 1e-9) / scale
    return f"{fewest:.{digits}f}–{math.ceil(100 * high - 1e-9)} %"


def number(value: float) -> str:
    """A number as text: four digits, an exponent for very large and small numbers, and whole numbers in full."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return typeset(str(int(value)))
    return typeset(f"{value:#.4g}")


def typeset(text: str) -> str:
    """A number as Python writes it, with the signs of print: 1,234, −2.5·10⁻⁷, ∞."""
    if text == "nan":
        return "not finite"
    mantissa, _, exponent = text.replace("inf", "∞").partition("e")
    mantissa = mantissa.removesuffix(".")
    if exponent:
        mantissa += "·10" + str(int(exponent)).translate(SUPERSCRIPTS)
    elif mantissa.lstrip("-").isdigit():
        mantissa = f"{int(mantissa):,}"
    return mantissa.replace("-", "−")


def value_in_words(estimate: Estimate) -> str:
    """A value with its interval, and whether it is unresolved, as in "0.41 [0.39, 0.43]".

    Args:
        estimate: The estimate.

    Returns:
        The words; a number that is known exactly has no interval.
    """
    if not estimate.high > estimate.low:
        return number(estimate.value)
    value, low, high = map(typeset, estimate.rounded())
    return f"{value} [{low}, {high}]" + ("" if estimate.resolved else ", unresolved")
