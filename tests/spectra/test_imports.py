"""What `import spectra` costs and brings in."""

import json
import subprocess
import sys

import pytest

import spectra

LOADED = """
import json, sys
import spectra
print(json.dumps(list(sys.modules)))
spectra.plots, spectra.report, spectra.explore
print(json.dumps(list(sys.modules)))
spectra.SpectrumCallback
assert "transformers" in sys.modules
"""
HEAVY = ("transformers", "matplotlib", "datasets", "accelerate", "pyhessian", "qat", "tokenizers", "pandas")
HEAVY += ("pytorch_lightning", "tensorboard", "plotly", "ipywidgets", "jinja2", "IPython", "scipy.optimize")


def fresh(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_spectra_brings_in_nothing_heavy():
    """Nor do its figures before they are drawn; transformers comes with the callback."""
    for loaded in map(json.loads, fresh(LOADED).splitlines()):
        assert set(loaded).isdisjoint(HEAVY)


def test_lightning_that_is_not_installed_is_said_in_one_line():
    program = """
import importlib.util
found = importlib.util.find_spec
hidden = ("lightning", "pytorch_lightning")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)
try:
    import spectra.integrations.lightning
except ImportError as error:
    print(error)
"""
    assert fresh(program) == 'pytorch_lightning is not installed: pip install "spectra-qat[lightning]"\n'


@pytest.mark.parametrize("name", spectra.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(spectra, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        spectra.no_such_name  # noqa: B018
