"""Every notebook runs from top to bottom in a fresh kernel, offline, with small stored outputs or none."""

import os
import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SECONDS = 60  # of this kernel's own computing, so that other work on the machine does not count
MOST_SECONDS = 300  # by the clock, for all of that other work
INTERVAL = re.compile(r"-?\d[\w.+-]* \[-?\d[\w.+-]*, -?\d[\w.+-]*\]")
MOST_BYTES = 150_000  # of a notebook with its outputs
CLOCK = "import time; print(time.process_time())"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    """A notebook after it ran, with how many seconds its kernel computed, and its path."""
    notebook = read(request.param)
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))
    folder = tmp_path_factory.mktemp("notebook")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "QAT_CACHE": str(folder / "cache")}
    environment["TMPDIR"] = str(folder)  # what the notebook writes goes with the test's folder
    environment.pop("MPLBACKEND", None)  # conftest keeps windows away; a notebook shows its figures
    client = NotebookClient(
        notebook, timeout=MOST_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    started = time.perf_counter()
    client.execute(env=environment)
    print(f"{request.param.name}: {time.perf_counter() - started:.0f} s")
    clock = notebook.cells.pop()
    return notebook, float(clock.outputs[0].text), request.param


def test_there_is_a_quickstart():
    assert "01_quickstart.ipynb" in [path.name for path in NOTEBOOKS]


def kinds(cell):
    """What a code cell shows: the names of streams and the types of data."""
    shown = [output.get("name") or "|".join(sorted(output.data)) for output in cell.outputs]
    return [kind for kind, before in zip(shown, [None, *shown], strict=False) if kind != before or kind != "stdout"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_or_with_small_ones(path):
    """Without numbers of execution, complaints and errors; tests/test_project.py looks for a machine's paths."""
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.execution_count is None for cell in cells)
    assert all(output.output_type in ("stream", "display_data") for cell in cells for output in cell.outputs)
    assert all(output.get("name", "stdout") == "stdout" for cell in cells for output in cell.outputs)
    assert path.stat().st_size < MOST_BYTES


def test_what_is_stored_is_what_its_cells_show(executed):
    """The same kinds of output from the same cells; numbers may differ on another machine."""
    notebook, _, path = executed
    stored = [cell for cell in read(path).cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in stored):
        pytest.skip("stored without outputs")
    shown = [kinds(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert [kinds(cell) for cell in stored] == shown


def test_it_runs_and_shows_figures_and_intervals(executed):
    notebook, _, _ = executed
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    complaints = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert len(figures) >= 2
    assert INTERVAL.search(printed), printed
    assert "(unresolved)" in printed  # a notebook that teaches these numbers shows one that cannot be had
    assert not complaints


def test_it_is_quick(executed):
    assert executed[1] < SECONDS
