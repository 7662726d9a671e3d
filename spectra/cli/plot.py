"""`spectra plot`: the density of eigenvalues of a run, or a quantity over its training steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError
from spectra.cli.command_line import interrupts_say
from spectra.runs.files import write_whole
from spectra.runs.folder import Run

IMAGES = (".png", ".svg", ".pdf")


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser("plot", help="draw a run: the density of eigenvalues, or a quantity over training")
    parser.set_defaults(command=run)
    parser.add_argument("run", help="run or study folder")
    parser.add_argument("--quantity", help="draw this over the training steps: rms, lambda_max, loss, ...")
    parser.add_argument("--mode", help="which Hessian, where a run has several (default: the first)")
    parser.add_argument("--out", metavar="FILE", help="image to write (default: a .png in the run folder)")


def run(options: argparse.Namespace) -> None:
    """Draw one figure, save it, and print its path."""
    from spectra.views import plots
    from spectra.views.style import new_figure, rendered

    run = Run(options.run)
    name = "density" if options.quantity is None else f"trajectory-{options.quantity}"
    out = Path(options.out) if options.out else run.folder / f"{name}.png"
    if out.suffix.lower() not in IMAGES:
        raise InputError(f"expected an image file ending in {', '.join(IMAGES)}, got {out}: choose another --out")
    with interrupts_say("no image was written", unless=out):
        figure, (ax,) = new_figure()
        if options.quantity is None:
            plots.density(run, ax=ax, mode=options.mode, steps="last" if len(run.runs) > 1 else None)
        else:
            plots.trajectory(run, options.quantity, ax=ax, mode=options.mode)
        image = rendered(figure, out.suffix[1:].lower(), dpi=160)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, image)
    print(out)
