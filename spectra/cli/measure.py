"""`spectra measure`: the spectrum of a checkpoint on some text, labelled text or images."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spectra.backend.errors import InputError
from spectra.cli import inputs
from spectra.cli.command_line import add_formats, examples, print_csv, print_json
from spectra.cli.progress import progress
from spectra.cli.sharding import one_command, shard, together
from spectra.cli.tables import aligned, quantity_name
from spectra.estimates.quantities import describe
from spectra.operators.hessian.parameters import ParameterSpace
from spectra.operators.hessian.precision import LOWER
from spectra.runs.folder import CONFIG, LANCZOS, RECORDS, Run, check_free, is_recorded, refuse_differences
from spectra.runs.jsonlines import plain
from spectra.runs.probe import SpectrumProbe
from spectra.runs.provenance import fingerprint_of_weights
from spectra.runs.record import SpectrumRecord
from spectra.runs.settings import DEFLATED, MeasurementSettings

DEFAULTS = MeasurementSettings()
NOT_SETTINGS = ("command", "model", "json", "csv")  # options that config.json does not repeat
IN_BLOCKS = ("negative_share", "rms", "lambda_max", "lambda_min", "trace")  # quantities in the table of blocks
USAGE = "spectra measure MODEL (--text FILE... | --labelled FILE... | --images DIR) --out DIR [options]"


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "measure",
        help="measure the spectrum of a checkpoint on some text, labelled text or images",
        usage=USAGE,  # argparse's own would name the model last
        **examples(
            "spectra measure checkpoint --text notes.txt --out runs/a",
            'spectra measure checkpoint --text notes.txt --out runs/mlp --params "*mlp*" --probes 4 --json',
        ),
    )
    parser.set_defaults(command=run)
    inputs.add_options(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="run folder to make")
    add(
        "--blocks",
        nargs="+",
        metavar="GLOB",
        help='the spectrum of each layer too ("layers"), or of the parameters that fit each glob ("*attn*" "*mlp*")',
    )
    add(
        "--probes",
        type=int,
        default=DEFAULTS.probes,
        help="random probe vectors, %(default)s by default; more narrow the intervals",
    )
    add(
        "--steps",
        type=int,
        default=DEFAULTS.steps,
        help="Lanczos steps for each probe vector, %(default)s by default; more resolve finer",
    )
    add("--deflate", type=int, help=f"outliers taken out first (default: {DEFLATED} where memory allows)")
    add(
        "--count-products",
        type=int,
        default=DEFAULTS.count_products,
        help="products for the count of negative eigenvalues, %(default)s by default at most; 0 leaves it out",
    )
    add("--seed", type=int, default=DEFAULTS.seed, help="of the probe vectors, %(default)s by default")
    add_formats(parser, json="print the record as JSON", csv="print the estimates as CSV")


def run(options: argparse.Namespace) -> None:
    """Measure, write the run folder, and print the record; under torchrun on all its processes together."""
    with one_command(options.device):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    """`run`, on each of the processes."""
    known = is_recorded(options.out)
    try:
        records = _measure(options)
    except KeyboardInterrupt:
        kept = f"the spectrum is kept in {options.out}" if is_recorded(options.out) else ""
        lost = "interrupted before the spectrum was complete; nothing is kept"
        raise KeyboardInterrupt(f"interrupted: {kept}" if kept else lost) from None
    record, blocks = records[0], records[1:]
    if options.json:
        of_blocks = {"blocks": {each.block: each.to_dict() for each in blocks}} if blocks else {}
        print_json({"out": options.out, **record.to_dict(), **of_blocks})
        return
    if options.csv:
        print_csv([row for each in records for row in _rows(each)])
        return
    for line in [*_record_lines(record), *_block_lines(blocks)]:
        print(line)
    folder = shlex.quote(options.out)
    done = "measured before, in" if known else "written to"
    print(f"{done} {options.out}; next: spectra plot {folder}, or spectra report {folder}")


def _measure(options: argparse.Namespace) -> list[SpectrumRecord]:
    """Measure and write the run folder. Returns the record of the whole, then those of the blocks."""
    from spectra.integrations.loading import quiet_transformers

    together(lambda: inputs.check(options))  # before the minutes that loading a model may take
    settings = MeasurementSettings(
        probes=options.probes,
        steps=options.steps,
        seed=options.seed,
        deflate=options.deflate,
        count_products=options.count_products,
        precision=options.dtype if options.dtype in LOWER else None,
    )
    unused = [name for name in inputs.SINCE if getattr(options, name) is None]
    config = {key: value for key, value in vars(options).items() if key not in (*NOT_SETTINGS, *unused)}
    config["checkpoint"] = options.model
    chosen = config.pop("blocks")
    blocks = chosen if chosen is None or chosen != ["layers"] else "layers"
    together(lambda: _check_same(options.out, config))
    found = together(lambda: inputs.load(options))
    ParameterSpace(found.model, options.params)  # refuses a glob that matches nothing before a folder is made
    config |= found.facts
    shard(found.model)
    if next(found.model.parameters()).device.type == "cpu":
        settings = settings.changed(engine="reverse")  # a choice by time could change the last digits from run to run
    with quiet_transformers(), _progress() as show:
        probe = SpectrumProbe(
            found.model,
            found.batches,
            out=options.out,
            params=options.params,
            blocks=blocks,
            loss=found.loss,
            settings=settings,
            config=config,
            progress=show,
            strict=True,
        )
        probe.notes += found.notes
        return _measure_once(probe)


def _check_same(out: str, config: Mapping[str, Any]) -> None:
    """Raise an InputError where a folder holds anything but a spectrum that was measured with these options.

    Options that are None, such as the length, follow from the model; the probe compares them, with the batches.
    """
    if not is_recorded(out) or "checkpoint" not in Run(out).config:
        check_free(out)
        return
    run = Run(out)
    given = {name: value for name, value in config.items() if value is not None or name == "params"}
    refuse_differences(run, plain(given), {name for name in run.config if name not in given})


def _measure_once(probe: SpectrumProbe) -> list[SpectrumRecord]:
    """Measure, or take the records that the folder holds; if that fails, leave the folder free for another try."""
    try:
        weights = {record.weights for record in probe.records}
        if weights - {"", fingerprint_of_weights(probe.model)}:
            raise InputError("out= holds the spectrum of a checkpoint with other weights: choose another out=")
        return probe.measure(0)
    finally:
        run = probe.run
        if run is not None:
            run.close()
        if run is not None and not run.records:
            for path in (*(run.folder / name for name in (CONFIG, RECORDS)), *(run.folder / LANCZOS).glob("*-step-*")):
                path.unlink(missing_ok=True)


def _record_lines(record: SpectrumRecord) -> list[str]:
    """The lines that show a record: a heading, a table of its estimates, why some are unresolved, its notes."""
    vectors = f"{record.probes} probe vector{'s' if record.probes > 1 else ''} of {record.lanczos_steps} Lanczos steps"
    heading = (
        f"{record.dimension:,} parameters, loss {record.loss:.4g}, {vectors}, {record.products} "
        f"Hessian-vector products in {record.seconds:.1f} s on {record.device}"
    )
    if record.count:
        heading += f", {record.count['products']} of them to count the negative eigenvalues"
    rows = [("quantity", "value", "95 % interval")]
    reasons: dict[str, list[str]] = {}
    for key, estimate in record.estimates.items():
        value, low, high = estimate.rounded()
        rows.append((quantity_name(key, record), value, f"[{low}, {high}]{'' if estimate.resolved else ' ?'}"))
        if not estimate.resolved:
            reasons.setdefault(estimate.reason, []).append(describe(key).name)
    lines = [heading, *aligned(rows, "<><")]
    if reasons:
        lines.append("?: unresolved, the interval is all that is known")
    lines += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return [*lines, *(f"note: {note}" for note in record.notes)]


def _rows(record: SpectrumRecord) -> list[dict[str, Any]]:
    """The estimates of a record, a row each; the block is empty for the whole."""
    return [{"block": record.block, "quantity": key, **found.to_dict()} for key, found in record.estimates.items()]


def _block_lines(records: list[SpectrumRecord]) -> list[str]:
    """The lines that show the records of blocks: a table with a row for each."""
    if not records:
        return []
    keys = [key for key in IN_BLOCKS if key in records[0].estimates]
    rows = [("block", "parameters", *(quantity_name(key, records[0]) for key in keys))]
    for record in records:
        cells = [str(record.estimates[key]).replace(" (unresolved)", " ?") for key in keys]
        rows.append((record.block, f"{record.dimension:,}", *cells))
    unresolved = any("?" in cell for row in rows for cell in row)
    return ["", *aligned(rows, "<>" + ">" * len(keys)), *(["?: unresolved"] if unresolved else [])]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Progress with the time left, as the callback of a `SpectrumProbe`."""
    shown = progress(None, "measuring", "products")

    def show(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)

    try:
        yield show
    finally:
        shown.close()
