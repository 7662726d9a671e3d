"""Optional packages: what needs one that is not installed says which extra brings it."""

from importlib.util import find_spec

from spectra.backend.errors import InputError

# Which extra of pyproject.toml installs a package.
EXTRA_OF = {
    "matplotlib": "plots",
    "jinja2": "plots",
    "PIL": "plots",  # with matplotlib
    "plotly": "interactive",
    "ipywidgets": "interactive",
    "anywidget": "interactive",
    "transformers": "qat",
    "huggingface_hub": "qat",
    "accelerate": "qat",
    "tokenizers": "qat",
    "datasets": "qat",
    "pandas": "pandas",
    "pyhessian": "pyhessian",
    "pytorch_lightning": "lightning",
    "gguf": "export",
    "torchao": "torchao",
    "lm_eval": "lm-eval",
    "shtab": "completion",
}


class MissingExtraError(InputError, ImportError):
    """An optional package is not installed; the message says how to install the extra that brings it."""


def missing(package: str) -> MissingExtraError:
    """Return the error for an optional package that is not installed.

    Args:
        package: A key of `EXTRA_OF`.

    Returns:
        The error, to be raised.

    Example:
        >>> print(missing("matplotlib"))
        matplotlib is not installed: pip install "spectra-qat[plots]"
    """
    return MissingExtraError(f'{package} is not installed: pip install "spectra-qat[{EXTRA_OF[package]}]"')


def need(*packages: str) -> None:
    """Check that optional packages are installed.

    Args:
        *packages: Keys of `EXTRA_OF`, such as "matplotlib".

    Raises:
        MissingExtraError: If one of them is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise missing(package)
