"""The `spectra` command: measure a checkpoint's spectrum, draw it, compare it, report on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.backend.errors import InputError
from spectra.cli.command_line import on_terminal, run_command
from spectra.estimates.quantities import describe
from spectra.runs.folder import CONFIG, RECORDS, Run, check_free
from spectra.runs.record import SpectrumRecord
from spectra.runs.series import modes, select

if TYPE_CHECKING:
    from spectra.runs.probe import SpectrumProbe

IMAGES = (".png", ".svg", ".pdf")
PRECISIONS = ("float32", "float64", "tf32", "bfloat16")  # as spectra.precision has them, which takes torch to load


@run_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process) and return its exit code."""
    options = _parser().parse_args(arguments)
    options.command(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    from spectra.backend.version import __version__

    parser = argparse.ArgumentParser(prog="spectra", description="Hessian spectra of language models.")
    parser.add_argument("--version", action="version", version=f"spectra {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    usage = "spectra measure MODEL --text FILE... --out DIR [options]"  # argparse's own would put the model last
    measure = commands.add_parser("measure", help="measure the spectrum of a checkpoint on some text", usage=usage)
    measure.set_defaults(command=_measure)
    measure.add_argument("model", help="a model folder, or a name on the Hugging Face hub")
    measure.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files to take the loss on")
    measure.add_argument("--out", required=True, metavar="DIR", help="run folder to make")
    measure.add_argument("--params", nargs="+", metavar="GLOB", help='parameters to measure, "*mlp*" (default: all)')
    measure.add_argument("--probes", type=int, default=4, help="random probes, 4 by default; more narrow the intervals")
    measure.add_argument(
        "--steps", type=int, default=100, help="Lanczos steps a probe, 100 by default; more resolve finer"
    )
    measure.add_argument("--deflate", type=int, help="outliers taken out first (default: 20 where memory allows)")
    measure.add_argument("--sequences", type=int, default=8, help="sequences cut from the text, 8 by default")
    measure.add_argument("--length", type=int, help="tokens a sequence (default: 256, or the model's longest)")
    measure.add_argument("--batch-size", type=int, default=8, help="sequences a forward pass, 8 by default")
    measure.add_argument("--seed", type=int, default=0, help="of the probes, 0 by default")
    measure.add_argument(
        "--dtype",
        choices=PRECISIONS,
        default="float32",
        help="precision of the products; the last two are faster, and what they lose is in the intervals",
    )
    measure.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    measure.add_argument("--trust-remote-code", action="store_true", help="run the code that a hub model brings")

    plot = commands.add_parser("plot", help="draw a run: the density of eigenvalues, or a quantity over training")
    plot.set_defaults(command=_plot)
    plot.add_argument("run", help="run or study folder")
    plot.add_argument("--quantity", help="draw this over the training steps: rms, lambda_max, loss, ...")
    plot.add_argument("--mode", help="which Hessian, where a run has several (default: the first)")
    plot.add_argument("--out", metavar="FILE", help="image to write (default: a .png in the run folder)")

    compare = commands.add_parser("compare", help="what changed between two spectra of a run, or of two runs")
    compare.set_defaults(command=_compare)
    compare.add_argument("run", help="run folder")
    compare.add_argument(
        "other", nargs="?", help="a second run folder: compare its last spectrum with the first's last"
    )
    compare.add_argument("--from", dest="start", type=int, metavar="STEP", help="step before (default: the first)")
    compare.add_argument("--to", dest="end", type=int, metavar="STEP", help="step after (default: the last)")
    compare.add_argument("--mode", help="which Hessian, where a run has several (default: the first)")

    report = commands.add_parser("report", help="write a run's report.html, one file with everything in it")
    report.set_defaults(command=_report)
    report.add_argument("run", help="run or study folder")
    report.add_argument("--title", help="heading of the report")
    return parser


def _measure(options: argparse.Namespace) -> None:
    import torch

    from spectra.integrations.loading import load_causal_lm, quiet_transformers, read_texts, sequence_batches
    from spectra.operators.hessian.parameters import ParameterSpace
    from spectra.operators.hessian.precision import COPIES, LOWER
    from spectra.runs.probe import SpectrumProbe

    check_free(options.out)  # before the minutes that loading a model may take
    texts = read_texts(options.text)
    model, tokenizer = load_causal_lm(
        options.model,
        dtype=COPIES.get(options.dtype, torch.float32),
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    batches = sequence_batches(
        model, tokenizer, texts, sequences=options.sequences, length=options.length, batch_size=options.batch_size
    )
    ParameterSpace(model, options.params)  # refuses a glob that matches nothing before a folder is made
    settings = {key: value for key, value in vars(options).items() if key not in ("command", "model")}
    settings |= {"checkpoint": options.model, "length": batches[0]["input_ids"].shape[1]}
    with quiet_transformers(), _progress() as progress:
        probe = SpectrumProbe(
            model,
            batches,
            out=options.out,
            params=options.params,
            probes=options.probes,
            steps=options.steps,
            deflate=options.deflate,
            seed=options.seed,
            precision=options.dtype if options.dtype in LOWER else None,
            config=settings,
            progress=progress,
        )
        record = _measure_once(probe)
    for line in _table(record):
        print(line)
    print(f"written to {options.out}; next: spectra plot {options.out}, or spectra report {options.out}")


def _measure_once(probe: SpectrumProbe) -> SpectrumRecord:
    try:
        return probe.measure(0)[0]
    finally:
        run = probe.run
        if run is not None and not run.records:  # nothing was measured: leave the folder free for another try
            for name in (CONFIG, RECORDS):
                (run.folder / name).unlink(missing_ok=True)


def _table(record: SpectrumRecord) -> list[str]:
    """A record in words, its estimates aligned."""
    heading = (
        f"{record.dimension:,} parameters, loss {record.loss:.4g}, {record.probes} probes of {record.lanczos_steps} "
        f"steps, {record.products} products in {record.seconds:.1f} s on {record.device}"
    )
    rows = [("quantity", "value", "95 % interval", "")]
    for key, estimate in record.estimates.items():
        note = "" if estimate.resolved else f"unresolved: {estimate.reason}"
        rows.append(
            (_full_name(key, record), f"{estimate.value:.4g}", f"[{estimate.low:.4g}, {estimate.high:.4g}]", note)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return [heading, *lines, *(f"note: {note}" for note in record.notes)]


def _plot(options: argparse.Namespace) -> None:
    from spectra.views import plots
    from spectra.views.style import new_figure

    run = Run(options.run)
    name = "density" if options.quantity is None else f"trajectory-{options.quantity}"
    out = Path(options.out) if options.out else run.folder / f"{name}.png"
    if out.suffix.lower() not in IMAGES:
        raise InputError(f"expected an image file ending in {', '.join(IMAGES)}, got {out}: choose another --out")
    figure, (ax,) = new_figure()
    if options.quantity is None:
        plots.density(run, ax=ax, mode=options.mode, steps="last" if len(run.runs) > 1 else None)
    else:
        plots.trajectory(run, options.quantity, ax=ax, mode=options.mode)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160)
    print(out)


def _compare(options: argparse.Namespace) -> None:
    from spectra.estimates.changes import compare

    pair = _two_records(options)
    densities = [replace(run.density(record), seed=record.seed) for run, record in pair]  # older files lack the seed
    (first, before), (second, after) = pair
    changes = compare(densities[0], densities[1], near_zero_tol=after.near_zero_tol)
    paired = all(change.paired for change in changes.values())
    print(f"{_named(first, before)} -> {_named(second, after)}, {'the same' if paired else 'different'} probes")
    rows = [("quantity", "before", "after", "change")]
    for key, change in changes.items():
        numbers = (f"{change.before.value:.4g}", f"{change.after.value:.4g}")
        rows.append((_full_name(key, after), *numbers, change.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, *numbers, verdict in rows:
        print(f"{name:<{widths[0]}}  {numbers[0]:>{widths[1]}}  {numbers[1]:>{widths[2]}}  {verdict}")
    if first.config.get("batches") != second.config.get("batches"):
        print("note: the two runs measured different batches, so the changes hold what the batches differ in")


def _two_records(options: argparse.Namespace) -> list[tuple[Run, SpectrumRecord]]:
    """The records to compare, each with its run: of two steps of a run, or of one step of two runs."""
    runs = [Run(folder) for folder in (options.run, options.other or options.run)]
    for run in runs:
        if run.runs and not run.records:
            raise InputError(f"{run.folder} is a study: name one or two of its runs, such as {run.runs[0].folder}")
    mode = options.mode or (modes(runs[0]) or [None])[0]
    before, after = (select(run, mode=mode, steps=None) for run in runs)
    if options.end is not None:
        after = select(runs[1], mode=mode, steps=options.end)
    if options.other is not None:
        if options.start is not None:
            raise InputError("--from is for the steps of a single run: give --to alone, the step of both runs")
        before = before if options.end is None else select(runs[0], mode=mode, steps=options.end)
        return [(runs[0], before[-1]), (runs[1], after[-1])]
    if options.start is not None:
        before = select(runs[0], mode=mode, steps=options.start)
    if before[0] is after[-1] or before[0] == after[-1]:
        raise InputError(
            f"two spectra are expected, but both ends are the one of step {after[-1].step} in {runs[0].folder}: "
            "choose other steps with --from and --to, or name a second run"
        )
    return [(runs[0], before[0]), (runs[1], after[-1])]


def _named(run: Run, record: SpectrumRecord) -> str:
    label = f" ({record.label})" if record.label else ""
    return f"{run.folder} step {record.step}{label}, {record.mode}"


def _full_name(key: str, record: SpectrumRecord) -> str:
    return describe(key).name + (f" (|λ| < {record.near_zero_tol:g})" if key == "near_zero_share" else "")


def _report(options: argparse.Namespace) -> None:
    from spectra.views import page

    print(page.write(options.run, title=options.title))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left, on a terminal only."""
    if not on_terminal():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="measuring", unit=" products", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
