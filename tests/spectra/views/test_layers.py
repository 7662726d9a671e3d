"""Heat maps of layers against results by block, of which the numbers are known."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import run_folders
import tiny_models

import spectra
from spectra import plots
from spectra.backend.errors import InputError
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.views import page
from spectra.views.layers import DECADES, _strengths, table_of
from spectra.views.pictures import layer_pictures, whole_modes

BLOCKS = {
    "first": SpectralDensity.from_eigenvalues(np.array([-1.0, 1.0, 2.0, 10.0])),
    "second": SpectralDensity.from_eigenvalues(np.array([0.5, 1.0])),
    "third": SpectralDensity.from_eigenvalues(np.array([-0.001, -0.001])),
}


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    plt.close("all")


def labels(axis):
    return [label.get_text().replace("\n", " ") for label in axis.get_ticklabels()]


def test_rows_are_layers_and_columns_quantities_with_their_numbers():
    ax = plots.layers(BLOCKS, ["lambda_max", "negative_share"])
    assert labels(ax.yaxis) == ["first", "second", "third"]
    assert labels(ax.xaxis) == ["largest eigenvalue", "negative share"]
    assert ax.yaxis_inverted()  # the first layer at the top
    found = {tuple(np.floor(text.get_position()).astype(int)): text.get_text() for text in ax.texts}
    assert found == {(0, 0): "10", (1, 0): "0.25", (0, 1): "1", (1, 1): "0", (0, 2): "−0.001", (1, 2): "1"}


def test_sizes_are_coloured_by_decades_and_shares_as_they_are():
    strengths = _strengths(table_of(BLOCKS, ["lambda_max", "negative_share"], mode=None, step=None))
    np.testing.assert_allclose(strengths[:, 0], [1, 1 - 1 / DECADES, 0], atol=1e-12)
    np.testing.assert_allclose(strengths[:, 1], [0.25, 0, 1], atol=1e-12)


def test_what_is_unresolved_is_hatched_and_estimates_are_a_column():
    traces = {"a": Estimate(2.0, 1.0, 3.0, False, "few"), "b": Estimate(4.0, 3.9, 4.1)}
    ax = plots.layers(traces)
    hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch()]
    assert hatched == [(0, 0)]
    assert ax.get_title(loc="right") == "hatched: not resolved"
    assert [text.get_text() for text in ax.texts] == ["2", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    options = {"probes": 2, "steps": 3, "deflate": 0, "loss": tiny_models.nn.functional.mse_loss}
    model, batches = tiny_models.mlp(), tiny_models.regression([5])
    with spectra.SpectrumProbe(model, batches, every=1, out=folder, blocks="layers", **options) as probe:
        for step in (0, 1):
            probe.step(step)
            for parameter in model.parameters():
                parameter.data *= 1.1
    return spectra.Run(folder)


def test_a_run_is_shown_by_quantity_at_its_last_step_or_by_step(run):
    records = {(record.block, record.step): record for record in run.measured}
    blocks = list(dict.fromkeys(block for block, _ in records if block))
    table = table_of(run, ["rms", "trace"], mode=None, step=None)
    assert table.layers == blocks
    assert len(blocks) > 1
    assert [row[0] for row in table.estimates] == [records[block, 1].estimates["rms"] for block in blocks]
    along = table_of(run, "rms", mode=None, step=None)
    assert along.columns == ["0", "1"]
    assert along.estimates[0] == [records[blocks[0], step].estimates["rms"] for step in (0, 1)]
    assert plots.layers(run, "rms").get_xlabel() == "training step"
    assert plots.layers(run.folder, step=0).get_title(loc="left") == ""


def test_the_report_has_heat_maps_in_place_of_figures_for_every_block(run):
    assert [picture.name for picture in layer_pictures(run)] == ["layers-a", "layers-rms-a"]
    names = set(page.figures(run))
    assert whole_modes(run) == ["full"]
    assert {"density-full", "cumulative-full", "layers-a"} <= names
    assert not [name for name in names if "full-" in name]


@pytest.mark.parametrize(
    ("blocks", "options", "words"),
    [
        ({}, {}, "results by block are expected"),
        ({"a": 1.0}, {}, "got float for 'a'"),
        (BLOCKS, {"quantities": ["size"]}, "expected quantities among"),
    ],
)
def test_what_cannot_be_drawn_is_refused(blocks, options, words):
    with pytest.raises(InputError, match=words):
        plots.layers(blocks, **options)
    assert not plt.get_fignums()


def test_a_run_without_blocks_and_what_a_run_has_not_are_refused(tmp_path, run):
    with pytest.raises(InputError, match='measure with blocks="layers"'):
        plots.layers(run_folders.run_folder(tmp_path / "a", marks=((0, ""),)))
    with pytest.raises(InputError, match="no blocks of step 7: choose among 0, 1"):
        plots.layers(run, step=7)
    with pytest.raises(InputError, match="one of the quantities"):
        plots.layers(run, "size")
    with pytest.raises(InputError, match="one of the modes full of"):
        plots.layers(run, mode="ste")
