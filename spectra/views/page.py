"""A run or a study as one HTML file that needs nothing else: tables, figures, how to read them, settings."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.backend.errors import InputError
from spectra.estimates.quantities import ESTIMATES, describe
from spectra.runs.folder import Run, open_run
from spectra.views.pictures import Picture, density_pictures, figures, trajectory_pictures
from spectra.views.tables import Table, estimates_of_rows, estimates_of_run, number, outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "write"]

MODES = {
    "full": "the Hessian of the loss in the model's own weights",
    "ste": "the Jacobian of the straight-through gradient in the latent weights, M H(Q(W)) M, with M the mask of the "
    "weights that are not clipped; clipped weights give exact zeros",
    "quantized": "H(Q(W)), the Hessian of the full-precision network at the quantized weights",
    "latent": "H(W), the Hessian of the full-precision network at the latent weights",
    "noisy": "the straight-through Hessian averaged over draws of weight noise",
}


def write(
    run: Run | str | os.PathLike[str],
    *,
    title: str | None = None,
    table: Sequence[Mapping[str, Any]] | None = None,
    images: bool = False,
) -> Path:
    """Write report.html into the folder of a run or a study, and return its path.

    table: rows of a study's results, plain values and estimates ("rms_start", "rms_end", ... as Estimate or its
    dict); by default those of the folder's table.json. A single run is shown by its records.
    images: also save each figure as figures/<name>.png, which takes less time than drawing them again.
    Raises InputError where the folder holds no spectrum.
    """
    from jinja2 import Environment, StrictUndefined

    run = open_run(run)
    runs = run.runs or [run]
    records = [record for single in runs for record in single.records]
    if not records:
        raise InputError(f"{run.folder} holds no spectrum to report on: measure one first")
    rows = _stored_table(run) if table is None else list(table)
    estimates = estimates_of_rows(rows) if rows else None
    folder = run.folder / "figures" if images else None
    template = resources.files("spectra.views").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = environment.from_string(template).render(
        title=title or f"Hessian spectra: {run.folder.resolve().name}",
        facts=_facts(runs),
        outcomes=outcomes(rows) if rows else None,
        tables=_tables(runs, estimates),
        densities=[_embed(picture, folder) for picture in density_pictures(run)],
        trajectories=[_embed(picture, folder) for picture in trajectory_pictures(run)],
        quantities=[(describe(key).name, describe(key).meaning) for key in ESTIMATES],
        modes=[(mode, MODES.get(mode, "")) for mode in dict.fromkeys(record.mode for record in records)],
        tolerance=number(records[0].near_zero_tol),
        settings=[(_heading(single, run), _flat(single.config)) for single in dict.fromkeys([run, *runs])],
        notes=list(dict.fromkeys(note for record in records for note in record.notes)),
    )
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _stored_table(run: Run) -> list[dict[str, Any]]:
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


def _tables(runs: Sequence[Run], estimates: Table | None) -> list[tuple[str, Table]]:
    """The tables of estimates, each with its heading: the study's own, else one a run."""
    if estimates is not None and estimates.rows:
        return [("At the start and the end of training", estimates)]
    return [(single.folder.resolve().name, estimates_of_run(single)) for single in runs if single.records]


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was measured, when and with what, in short."""
    records = [record for single in runs for record in single.records]
    times = [record.wall_time for record in records if record.wall_time == record.wall_time]
    facts = [
        ("measured spectra", f"{len(records)} in {len(runs)} run{'s' if len(runs) > 1 else ''}"),
        ("parameters", _distinct(f"{record.dimension:,}" for record in records)),
        ("Hessian mode", _distinct(record.mode for record in records)),
        ("probes × steps", _distinct(f"{record.probes} × {record.lanczos_steps}" for record in records)),
        ("cost", f"{sum(r.products for r in records):,} products, {_duration(sum(r.seconds for r in records))}"),
        ("precision, device", _distinct(f"{r.dtype or 'unknown'}, {r.device or 'unknown'}" for r in records)),
    ]
    if times:
        moment = datetime.fromtimestamp(max(times), UTC)
        facts.append(("measured", f"{moment:%Y-%m-%d %H:%M} UTC"))
    names = dict.fromkeys(name for record in records for name in record.versions)
    software = [f"{name} {_distinct(r.versions[name] for r in records if name in r.versions)}" for name in names]
    return facts + ([("software", ", ".join(software))] if software else [])


def _distinct(values) -> str:
    return " · ".join(dict.fromkeys(values))


def _duration(seconds: float) -> str:
    if not seconds < 90:  # also where it is unknown
        return f"{seconds / 60:.0f} min" if seconds == seconds else "time unknown"
    return f"{seconds:.1f} s"


def _heading(single: Run, run: Run) -> str:
    return "study" if single is run and run.runs else single.folder.resolve().name


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as names and text; those inside others get the outer name in front."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return lines


def _embed(picture: Picture, folder: Path | None) -> dict[str, Any]:
    embedded = {
        "source": _as_data(picture.figure),
        "caption": picture.caption,
        "alternative": picture.alternative,
        "wide": picture.wide,
    }
    if folder is not None:
        folder.mkdir(exist_ok=True)
        picture.figure.set_layout_engine("none")  # it is laid out already, and that is half of the work
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=130)
    return embedded


def _as_data(figure: Figure) -> str:
    """The figure as a data URL of an SVG."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "spectra"}):  # the same figure gives the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
