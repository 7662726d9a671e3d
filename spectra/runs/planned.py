"""What whoever made a run or a study meant to measure, and what of it is not there."""

from __future__ import annotations

from typing import Any, TypeGuard

from spectra.runs.folder import Run

# Entries of config.json: how many records a run will have, and the folders of a study's runs.
PLANNED_RECORDS, PLANNED_RUNS = "planned_records", "planned_runs"


def unfinished(run: Run) -> str:
    """What a run or a study still lacks of what its config.json plans.

    Args:
        run: A run or a study.

    Returns:
        A clause such as "3 of 5 spectra are measured" or "2 of 4 runs are finished"; "" where nothing is missing, or
        nothing was planned.
    """
    runs = {single.folder.name: single for single in run.runs}
    planned = run.config.get(PLANNED_RUNS)
    if _are_texts(planned):
        finished = [name for name in planned if name in runs and runs[name].measured and not unfinished(runs[name])]
        return _clause(len(finished), len(planned), "runs are finished")
    if runs:
        return _clause(sum(not unfinished(single) for single in runs.values()), len(runs), "runs are finished")
    records = run.config.get(PLANNED_RECORDS)
    return _clause(len(run.measured), records if isinstance(records, int) else 0, "spectra are measured")


def _clause(there: int, planned: int, what: str) -> str:
    return f"{there} of {planned} {what}" if there < planned else ""


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    """Whether the value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
