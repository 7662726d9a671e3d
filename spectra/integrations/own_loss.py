"""The user's own loss, by the name of its module."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from spectra.backend.errors import InputError, first_line


def loss_named(name: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    The module is looked for as Python does, and in the folder that the process is in.

    Args:
        name: The name, such as "losses:focal" for `focal` in losses.py.

    Returns:
        The function.

    Raises:
        InputError: If the name has another form, the module cannot be imported, or has no such function.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise InputError(
            f"expected a loss as module:function, such as losses:focal for focal in losses.py, got {name!r}"
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise InputError(f"the module {module_name} has no {function}: check the name of the loss") from None
    except Exception as error:  # whatever the user's module raises while it is imported
        raise InputError(f"the module {module_name} of the loss cannot be imported: {first_line(error)}") from error
    finally:
        sys.path.remove(here)
    if not callable(found) or isinstance(found, type):
        raise InputError(f"expected a function of (model, batch) or (outputs, batch), but {name} is {_kind(found)}")
    return found


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}: name an instance of it"
    return f"an object of {type(value).__name__}"
