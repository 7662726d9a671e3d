"""An extension of Griffe, which reads the docstrings for the site: examples as code, and code after "::" as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)  # Griffe knows the section as "Examples"
CODE_FOLLOWS = re.compile(r"::$", re.MULTILINE)  # in Markdown the indentation says it


class Docstrings(griffe.Extension):
    """Docstrings in the project's style, as Griffe and Markdown read them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of a docstring before it is read."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = CODE_FOLLOWS.sub(":", text)
