"""Draw the figures of docs/gallery.md, each with the code that stands above it there.

python docs/site/gallery.py
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from spectra.views.embedded import LONG_NUMBER
from spectra.views.style import rendered

PAGE = Path(__file__).parent.parent / "gallery.md"
TAG = re.compile(r"<[^>]+>")  # numbers between tags are read, and keep their digits
PART = re.compile(r"```python\n(.*?)```|!\[[^\]]*\]\((gallery/[\w-]+\.svg)\)", re.DOTALL)


def main() -> None:
    """Run the page from top to bottom and save the figure of `ax` under each picture's name."""
    names: dict[str, Any] = {"__name__": "gallery"}
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for code, picture in PART.findall(text):
            if code:
                exec(compile(code, str(PAGE), "exec"), names)
            else:
                save(names["ax"], PAGE.parent / picture)
    print("docs/gallery holds", len(list((PAGE.parent / "gallery").glob("*.svg"))), "figures")


def save(ax: Any, path: Path) -> None:
    """The figure as a small SVG on white ground, the same from the same code."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = rendered(ax.figure, "svg", facecolor="white").decode()
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = TAG.sub(lambda tag: LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", tag[0]), drawn)
    path.parent.mkdir(exist_ok=True)
    path.write_text(re.sub(r" +$", "", drawn, flags=re.MULTILINE), encoding="utf-8")
    pyplot.close(ax.figure)


if __name__ == "__main__":
    main()
