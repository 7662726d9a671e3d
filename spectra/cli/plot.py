"""`spectra plot`: a figure of the spectra of runs, or of a quantity over the training steps."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.backend.errors import InputError
from spectra.cli.command_line import examples, interrupts_say
from spectra.runs.files import write_whole
from spectra.runs.folder import Run
from spectra.runs.series import Steps, as_runs, modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = (".png", ".svg", ".pdf")
KINDS = ("cumulative", "tails", "density", "ridge", "trajectory")


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "plot",
        help="draw the spectra of runs, or a quantity over the training steps",
        **examples("spectra plot runs/a --kind tails", "spectra plot runs/study --quantity rms --out rms.svg"),
    )
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("run", nargs="+", metavar="RUN", help="run or study folder; the runs of a study have a panel a group")
    add(
        "--kind",
        choices=KINDS,
        help="cumulative: the share of eigenvalues below each value (default); tails: how many lie beyond; density; "
        "ridge: a density for every training step; trajectory: --quantity over the training steps",
    )
    add("--quantity", help="draw this over the training steps: rms, lambda_max, loss, ...")
    add("--step", metavar="STEP", nargs="+", help="training steps, 'last' or 'all' (default: last; ridge: all)")
    add("--mode", help="which Hessian, where a run has several (default: the first)")
    add("--out", metavar="FILE", help="image to write (default: a .png in the folder of the first run)")


def run(options: argparse.Namespace) -> None:
    """Draw one figure, save it, and print its path."""
    from spectra.views.style import rendered

    runs = [Run(folder) for folder in options.run]
    kind = _kind(options)
    steps = _steps(options.step, kind)
    out = Path(options.out) if options.out else runs[0].folder / _file_name(runs, kind, options)
    if out.suffix.lower() not in IMAGES:
        raise InputError(f"expected an image file ending in {', '.join(IMAGES)}, got {out}: choose another --out")
    with interrupts_say("no image was written", unless=out):
        figure = _draw(runs, kind, options.quantity, options.mode, steps)
        image = rendered(figure, out.suffix[1:].lower(), dpi=160)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, image)
    print(out)


def _draw(runs: list[Run], kind: str, quantity: str | None, mode: str | None, steps: Steps) -> Figure:
    """The figure."""
    from spectra.views import panels, plots
    from spectra.views.style import new_figure

    if kind != "trajectory":
        return panels.figure_of(runs, kind, mode=mode, steps=steps)
    figure, (ax,) = new_figure()
    assert quantity is not None  # a trajectory is drawn where there is one
    plots.trajectory(runs, quantity, ax=ax, mode=mode)
    return figure


def _kind(options: argparse.Namespace) -> str:
    """What to draw. Raises InputError for options that contradict each other."""
    kind = options.kind or ("trajectory" if options.quantity else "cumulative")
    if (kind == "trajectory") != bool(options.quantity):
        given = "no --quantity" if kind == "trajectory" else f"--quantity {options.quantity}"
        raise InputError(f"--kind trajectory goes with --quantity, got --kind {kind} and {given}: change one of them")
    if kind == "trajectory" and options.step:
        raise InputError("--step chooses spectra, and --quantity is drawn over all training steps: leave one out")
    return kind


def _steps(given: list[str] | None, kind: str) -> Steps:
    """The training steps to draw."""
    if given is None:
        return None if kind == "ridge" else "last"
    if given == ["all"]:
        return None
    if given == ["last"]:
        return "last"
    if not all(re.fullmatch(r"\d+", step) for step in given):
        raise InputError(f"expected training steps, 'last' or 'all' after --step, got {' '.join(given)}")
    return [int(step) for step in given]


def _file_name(runs: list[Run], kind: str, options: argparse.Namespace) -> str:
    """A name for the image that says what is drawn: the kind, the Hessian mode where there are several, the steps."""
    several = any(len(modes(single)) > 1 for single in as_runs(runs))
    parts = [kind, options.quantity]
    if options.mode or several:
        parts.append(options.mode or modes(next(single for single in as_runs(runs) if single.measured))[0])
    parts += [f"step-{'-'.join(options.step)}"] if options.step else []
    parts += [f"with-{single.folder.resolve().name}" for single in runs[1:]]
    cleaned = (re.sub(r"[^\w.]+", "-", part or "").strip("-.") for part in parts)
    return "-".join(filter(None, cleaned)) + ".png"
