"""Every notebook runs from top to bottom in a fresh kernel, offline, and is stored without outputs."""

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
CLOCK = "import time; print(time.process_time())"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    """A notebook after it ran, with what it printed and how many seconds its kernel computed."""
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
    return notebook, float(clock.outputs[0].text)


def test_there_is_a_quickstart():
    assert "01_quickstart.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path):
    """Outputs would carry a machine's paths and make every change a change of images."""
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_it_runs_and_shows_figures_and_intervals(executed):
    notebook, _ = executed
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
