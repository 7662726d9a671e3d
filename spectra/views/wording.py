"""Names and meanings of runs, records, modes and quantities in figures and tables, as the run folders give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spectra.estimates import quantities
from spectra.estimates.quantities import Quantity
from spectra.runs.folder import Run
from spectra.runs.planned import unfinished
from spectra.runs.record import SpectrumRecord

MODE_MEANINGS = {"full": "the Hessian of the loss in the model's own weights"}
UNKNOWN_MODE = "a Hessian that the caller supplied"


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
