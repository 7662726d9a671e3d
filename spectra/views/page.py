"""The report of runs and studies: one self-contained HTML page with a summary, tables, figures and settings."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError
from spectra.estimates.quantities import ESTIMATES
from spectra.runs.files import write_whole
from spectra.runs.folder import Run, open_run
from spectra.runs.record import SpectrumRecord
from spectra.views.embedded import embedded
from spectra.views.pictures import (
    Picture,
    density_pictures,
    figures,
    layer_pictures,
    single_runs,
    trajectory_pictures,
    whole_modes,
)
from spectra.views.style import rendered
from spectra.views.summary import summary
from spectra.views.tables import Table, estimates_of_rows, estimates_of_runs, results
from spectra.views.wording import describe, listed, mode_meaning, sentence_case, tolerance, unfinished_words

__all__ = ["figures", "write"]

REPORT = "report.html"
IMAGE_RESOLUTION = 130  # dots per inch


def write(
    run: Run | str | os.PathLike[str] | Sequence[Run | str | os.PathLike[str]],
    *,
    title: str | None = None,
    table: Sequence[Mapping[str, Any]] | None = None,
    images: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write report.html into the folder of a run or a study; several runs and studies are shown side by side.

    Args:
        run: The run or study, or its folder; or a list of these, which needs `out`.
        title: The heading of the page; by default the name of the folder.
        table: The rows of a study's results: plain values, and estimates ("rms_start", "rms_end", ...) as Estimate or
            its dict. The value under "label" is the name of a row. By default the rows of the folders' table.json; a
            run without rows is shown by its records.
        images: Whether each figure is also saved as figures/<name>.png.
        out: The folder to write to, made if it is not there; by default that of the run.

    Returns:
        The path of report.html.

    Raises:
        InputError: A folder holds no spectrum, its table.json cannot be read, several runs have no `out`, or `out` is a
            file.
    """
    several = run if isinstance(run, Sequence) and not isinstance(run, str) else [run]
    given = [open_run(one) for one in several]
    if out is None and len(given) != 1:
        raise InputError(f"one run is expected where no folder to write to is named, got {len(given)}: name out")
    runs = single_runs(given)
    if not any(single.measured for single in runs):
        raise InputError(
            f"{listed(str(one.folder) for one in given)} holds no spectrum to report on: measure one first"
        )
    rows = [row for one in given for row in _stored_table(one)] if table is None else list(table)
    folder = given[0].folder if out is None else Path(out)
    if folder.is_file():
        raise InputError(f"expected a folder to write the report to, but {folder} is a file: choose another out=")
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "figures" if images else None
    trajectories = trajectory_pictures(given)
    page = _render(
        title=title or f"Hessian spectra: {listed(one.folder.resolve().name for one in given)}",
        unfinished=sentence_case(unfinished_words(given)),
        lacking={single.presentation.label for single in runs if unfinished_words([single])},
        facts=_facts(runs),
        summary=summary(runs),
        results=results(rows, describe=partial(describe, runs)) if rows else None,
        tables=_estimate_tables(runs, rows),
        galleries=[
            ("spectra", "Spectra", [_shown(picture, saved) for picture in density_pictures(given)]),
            ("layers", "By layer", [_shown(picture, saved) for picture in layer_pictures(given)]),
            ("trajectories", "Over training", [_shown(one, saved) for one in trajectories if not one.minor]),
            ("further", "Further quantities over training", [_shown(one, saved) for one in trajectories if one.minor]),
        ],
        quantities=_meanings(runs),
        modes=[(mode, mode_meaning(runs, mode)) for mode in dict.fromkeys(m for run in runs for m in whole_modes(run))],
        settings=_settings(given, runs),
        notes=list(dict.fromkeys(note for record in _all_records(runs) for note in record.notes)),
    )
    path = folder / REPORT
    write_whole(path, page.encode("utf-8", "replace"))
    return path


def _render(**content: Any) -> str:
    """The filled template. All text is escaped, so that nothing in a run folder is read as markup.

    The page names the one script that a browser may run by its SHA-256 (Content Security Policy, level 3).
    """
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("spectra.views").joinpath("templates")
    template, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(script=script, script_hash=digest, **content)


def _all_records(runs: Iterable[Run]) -> list[SpectrumRecord]:
    """The measured records of all runs."""
    return [record for single in runs for record in single.measured]


def _stored_table(run: Run) -> list[dict[str, Any]]:
    """The rows of table.json; [] where there is no such file."""
    path = run.folder / "table.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected a list of rows in {path}, but it cannot be read ({error}): restore it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"expected a list of rows in {path}: restore it, or delete it to report without a table")
    return rows


def _estimate_tables(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """The tables of estimates, each with its heading: that of the studies' rows, else one of the records."""
    named = partial(describe, runs)
    table = estimates_of_rows(_with_references(rows, runs), describe=named)
    if rows and table.rows:
        return [("At the start and the end of training", table)]
    measured = [single for single in runs if single.measured]
    heading = "All records" if len(measured) > 1 else measured[0].presentation.label
    return [(heading, estimates_of_runs(measured, describe=named))]


def _with_references(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """The rows of a study, led by the spectrum of each run that the others are compared with, if it is not there."""
    labels = {row.get("label") for row in rows}
    missing = [run for run in runs if run.presentation.reference and run.measured]
    references = [
        {"label": run.presentation.label, "mode": run.measured[-1].mode}
        | {f"{key}_start": estimate for key, estimate in run.measured[-1].estimates.items()}
        for run in missing
        if run.presentation.label not in labels
    ]
    return [*references, *rows]


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was measured, when, and with which settings and software: names and values."""
    records = _all_records(runs)
    times = [record.wall_time for record in records if record.wall_time == record.wall_time]
    products, seconds = sum(record.products for record in records), sum(record.seconds for record in records)
    facts = [
        ("measured spectra", f"{len(records)} in {len(runs)} run{'s' if len(runs) > 1 else ''}"),
        ("parameters", _distinct(f"{record.dimension:,}" for record in records if not record.block) or "by block"),
        ("Hessian mode", _distinct(mode for run in runs for mode in whole_modes(run))),
        ("probe vectors × Lanczos steps", _distinct(f"{r.probes} × {r.lanczos_steps}" for r in records)),
        ("cost", f"{products:,} Hessian-vector products, {_duration(seconds)}"),
        ("precision, device", _distinct(f"{r.dtype or 'unknown'}, {r.device or 'unknown'}" for r in records)),
    ]
    if times:
        facts.append(("measured", f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC"))
    names = dict.fromkeys(name for record in records for name in record.versions)
    software = [f"{name} {_distinct(r.versions[name] for r in records if name in r.versions)}" for name in names]
    return facts + ([("software", ", ".join(software))] if software else [])


def _distinct(values: Iterable[str]) -> str:
    """The different values, in the order of their first."""
    return " · ".join(dict.fromkeys(values))


def _duration(seconds: float) -> str:
    """A time in seconds or minutes, in words."""
    if not seconds < 90:  # NaN, an unknown time, is not below either
        return f"{seconds / 60:.0f} min" if seconds == seconds else "time unknown"
    return f"{seconds:.1f} s"


def _meanings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Name and meaning of every estimate."""
    meanings = []
    for key in ESTIMATES:
        about = describe(runs, key)
        limit = f" (here |λ| < {tolerance(runs)})" if key == "near_zero_share" else ""
        meanings.append((about.name, about.meaning + limit))
    return meanings


def _settings(given: Sequence[Run], runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings of the studies and of each run, each with its heading, without the presentation."""
    settings = []
    for single in dict.fromkeys([*given, *runs]):
        heading = "study" if single in given and single.runs else single.presentation.label
        config = {key: value for key, value in single.config.items() if key != "presentation"}
        settings.append((heading, _flat(config)))
    return settings


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as names and text; a nested setting has the outer name in front, as in outer.inner."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return lines


def _shown(picture: Picture, folder: Path | None) -> dict[str, Any]:
    """A picture for the template; also saved as PNG where a folder is given."""
    figure = embedded(picture.figure, picture.name, described=picture.alternative)
    shown = {
        "name": re.sub(r"\W", "_", picture.name),
        "svg": figure.svg,
        "panels": figure.panels,
        "caption": picture.caption,
        "wide": picture.wide,
    }
    if folder is not None:
        folder.mkdir(exist_ok=True)
        picture.figure.set_layout_engine("none")  # the layout is computed already, which is slow
        write_whole(folder / f"{picture.name}.png", rendered(picture.figure, "png", dpi=IMAGE_RESOLUTION))
    return shown
