"""Curvature by layer as a heat map: a row for each diagonal block, a column for each quantity or training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import NEAR_ZERO, QUANTITIES, summarize
from spectra.runs.folder import HasRun, Run, open_run
from spectra.runs.record import SpectrumRecord
from spectra.views import marks
from spectra.views.style import TEXT_COLOUR, UNRESOLVED_HATCH, inches, literal, note
from spectra.views.wording import describe, sentence_case, typeset, value_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("rms", "lambda_max", "lambda_min", "trace", "negative_share", "negative_energy_share")
DECADES = 3  # of a size that the colours tell apart
COLOURS = "YlGnBu"
TEXT_POINTS = 7.5


@dataclass(frozen=True)
class LayerTable:
    """Estimates by layer.

    Attributes:
        layers: The names of the rows.
        columns: The names of the columns.
        keys: The key of the quantity of each column.
        estimates: A row for each layer, a cell for each column; None where nothing was measured.
        together: Whether all columns share their colours, as those of one quantity do.
        about: What all cells are about, "" where the columns say it.
    """

    layers: list[str]
    columns: list[str]
    keys: list[str]
    estimates: list[list[Estimate | None]]
    together: bool = False
    about: str = ""


def table_of(blocks: Any, quantities: str | Sequence[str], *, mode: str | None, step: int | None) -> LayerTable:
    """Read what a heat map of layers shows.

    Args:
        blocks: See `spectra.plots.layers`.
        quantities: Keys of quantities for columns, or one key for columns of training steps.
        mode: The Hessian mode of a run; None for its first.
        step: The training step of a run; None for its last.

    Returns:
        The estimates by layer.

    Raises:
        InputError: There are no blocks, or a quantity is not known or not there.
    """
    if isinstance(blocks, Run | HasRun) or not isinstance(blocks, Mapping):
        return _of_run(open_run(blocks), quantities, mode=mode, step=step)
    if not blocks:
        raise InputError('results by block are expected, as slq(op, blocks="layers") gives them, got none')
    keys = [quantities] if isinstance(quantities, str) else list(quantities)
    if all(isinstance(result, Estimate) for result in blocks.values()):
        return LayerTable(list(blocks), ["estimate"], [""], [[result] for result in blocks.values()])
    found = {name: _summary(name, result) for name, result in blocks.items()}
    return _table(found, keys, [])


def _summary(name: str, result: Any) -> Mapping[str, Estimate]:
    """The estimates of one block."""
    if not isinstance(result, SpectralDensity):
        raise InputError(
            f"a SpectralDensity or an Estimate is expected for each block, got {type(result).__name__} for {name!r}"
        )
    return summarize(result, NEAR_ZERO)


def _of_run(run: Run, quantities: str | Sequence[str], *, mode: str | None, step: int | None) -> LayerTable:
    """The estimates of the blocks that a run has measured."""
    records = [record for record in run.measured if record.block]
    if not records:
        raise InputError(f'{run.folder} holds no spectra of blocks: measure with blocks="layers"')
    known = list(dict.fromkeys(_whole_mode(record) for record in records))
    if mode is not None and mode not in known:
        raise InputError(f"expected one of the modes {', '.join(known)} of {run.folder}, got {mode!r}")
    records = [record for record in records if _whole_mode(record) == (mode or known[0])]
    steps = list(dict.fromkeys(record.step for record in records))
    if isinstance(quantities, str):
        return _along(records, quantities, steps, run)
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        listed = ", ".join(map(str, steps))
        raise InputError(f"{run.folder} has no blocks of step {wanted}: choose among {listed}")
    found = {record.block: record.estimates for record in records if record.step == wanted}
    return _table(found, list(quantities), [run])


def _along(records: Sequence[SpectrumRecord], key: str, steps: Sequence[int], run: Run) -> LayerTable:
    """One quantity of every layer over training steps, the last record of each step."""
    there = dict.fromkeys(name for record in records for name in record.estimates)
    if key not in there:
        raise InputError(f"expected one of the quantities {', '.join(there)}, got {key!r}")
    found = {(record.block, record.step): record.estimates.get(key) for record in records}
    layers = list(dict.fromkeys(record.block for record in records))
    cells = [[found.get((layer, step)) for step in steps] for layer in layers]
    about = sentence_case(describe([run], key).axis)
    return LayerTable(layers, [f"{step}" for step in steps], [key] * len(steps), cells, together=True, about=about)


def _table(found: Mapping[str, Mapping[str, Estimate]], keys: Sequence[str], runs: Sequence[Run]) -> LayerTable:
    """Quantities across, layers down."""
    there = dict.fromkeys(key for estimates in found.values() for key in estimates)
    for key in keys:
        if key not in there:
            raise InputError(f"expected quantities among {', '.join(there)}, got {key!r}")
    columns = [describe(runs, key).name for key in keys]
    return LayerTable(list(found), columns, list(keys), [[row.get(key) for key in keys] for row in found.values()])


def _whole_mode(record: SpectrumRecord) -> str:
    """The mode of a record without the name of its block."""
    return record.mode.removesuffix(f": {record.block}")


def draw_layers(ax: Axes, table: LayerTable) -> None:
    """Draw the heat map: the first layer at the top, darker cells for larger sizes, hatching for what is unresolved.

    Args:
        ax: The axes.
        table: What to draw.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours, strengths = colormaps[COLOURS], _strengths(table)
    rows, columns = strengths.shape
    numbers = _fits(ax, rows, columns)
    for row in range(rows):
        for column in range(columns):
            estimate, strength = table.estimates[row][column], strengths[row, column]
            face = "white" if math.isnan(strength) else colours(0.08 + 0.77 * strength)
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=1))
            if estimate is None:
                continue
            if not estimate.resolved:
                hatched = {"facecolor": "none", "edgecolor": "#888888", "hatch": UNRESOLVED_HATCH, "linewidth": 0}
                ax.add_patch(Rectangle((column, row), 1, 1, **hatched))
            if numbers:
                ink = "white" if strength > 0.62 else TEXT_COLOUR
                box = None if estimate.resolved else {"facecolor": face, "edgecolor": "none", "pad": 1.0}
                words = typeset(f"{estimate.value:.3g}")
                place = {"ha": "center", "va": "center", "fontsize": TEXT_POINTS, "color": ink, "bbox": box}
                ax.text(column + 0.5, row + 0.5, words, **place)
    if any(estimate is not None and not estimate.resolved for row in table.estimates for estimate in row):
        note(ax, "hatched: not resolved")
    _read_rows(ax, table)
    _name_sides(ax, table)


def _strengths(table: LayerTable) -> np.ndarray:
    """How dark each cell is, in [0, 1]: shares as they are, sizes by decades below the largest; NaN for no value."""
    sizes = np.array([[math.nan if e is None else abs(e.value) for e in row] for row in table.estimates], dtype=float)
    shares = np.array([key in QUANTITIES and QUANTITIES[key].is_share for key in table.keys])
    largest = np.nanmax(sizes, axis=0, initial=0.0, where=np.isfinite(sizes))
    if table.together:
        largest = np.full(len(largest), largest.max(initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = 1 + np.log10(sizes / largest) / DECADES
    strengths = np.where(shares, sizes, np.clip(decades, 0.0, 1.0))
    return np.where(np.isfinite(sizes), np.nan_to_num(strengths), math.nan)


def _fits(ax: Axes, rows: int, columns: int) -> bool:
    """Whether cells have room for numbers."""
    width, height = inches(ax)
    return 72 * height / rows > TEXT_POINTS + 1 and 72 * width / columns > 5 * TEXT_POINTS


def _read_rows(ax: Axes, table: LayerTable) -> None:
    """Note the values of each layer, with intervals."""
    for layer, row in zip(table.layers, table.estimates, strict=True):
        says = ["" if estimate is None else value_in_words(estimate) for estimate in row]
        edges = np.arange(len(row) + 1, dtype=float)
        marks.read(ax, literal(layer), TEXT_COLOUR, edges, [*says, ""], axis="", cells=True)


def _name_sides(ax: Axes, table: LayerTable) -> None:
    """The names of layers and columns."""
    from matplotlib.ticker import FixedLocator

    rows, columns = len(table.layers), len(table.columns)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.spines[:].set_visible(False)
    size = float(np.clip(72 * inches(ax)[1] / rows - 1.5, 4.0, 9.0))
    ax.yaxis.set_major_locator(FixedLocator([row + 0.5 for row in range(rows)]))
    ax.set_yticklabels([literal(layer) for layer in table.layers], fontsize=size, color=TEXT_COLOUR)
    ax.xaxis.set_major_locator(FixedLocator([column + 0.5 for column in range(columns)]))
    names = [name.replace(" ", "\n") for name in table.columns]
    ax.set_xticklabels(names, fontsize=8 if columns <= 12 else 6, color=TEXT_COLOUR)
    ax.tick_params(length=0)
    if table.together:
        ax.set_xlabel("training step")
    if table.about:
        ax.set_title(literal(table.about), fontsize=10, loc="left", color=TEXT_COLOUR)


def height_of(table: LayerTable) -> float:
    """The height in inches of a figure in which every layer has room."""
    return float(np.clip(0.9 + 0.21 * len(table.layers), 2.2, 12.0))
