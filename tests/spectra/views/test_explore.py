from importlib.util import find_spec

import matplotlib.pyplot as plt
import pytest
import run_folders

import spectra
from spectra.backend.errors import InputError
from spectra.backend.extras import MissingExtraError
from spectra.views import explore as module

HAS_WIDGETS = all(map(find_spec, ("plotly", "ipywidgets", "anywidget")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folders.run_folder(tmp_path_factory.mktemp("run") / "a", marks=((0, ""), (10, "")))


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(module, "in_notebook", lambda: True)


def test_without_a_kernel_it_is_the_picture_of_the_last_spectrum(run):
    ax = spectra.explore(run, level=0.9)
    assert "90" in ax.get_ylabel()
    assert "share of eigenvalues below" in ax.get_ylabel()
    assert not module.in_notebook()
    plt.close("all")


@pytest.mark.skipif(not HAS_WIDGETS, reason="needs plotly, ipywidgets and anywidget")
def test_in_a_notebook_it_is_the_widget(run, notebook):
    view = spectra.explore(str(run.folder), level=0.9)
    assert view.level == 0.9
    assert view.choice.step == 10
    assert "90 % band" in view.figure.layout.yaxis.title.text


def test_in_a_notebook_a_missing_package_is_one_line(run, notebook, monkeypatch):
    monkeypatch.setattr("spectra.backend.extras.find_spec", lambda name: None if name == "plotly" else name)
    with pytest.raises(MissingExtraError) as caught:
        spectra.explore(run)
    assert str(caught.value) == 'plotly is not installed: pip install "spectra-qat[interactive]"'


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_is_a_probability(run, level):
    with pytest.raises(InputError, match="level between 0 and 1"):
        spectra.explore(run, level=level)
